"""The names of public sets' classes: how many, which, and how published and correct spellings differ."""

from typing import get_args

import pytest

from cosmos_scale.evaluation.segmentation.layouts import PUBLIC_LAYOUTS
from cosmos_scale.evaluation.segmentation.names import public_names
from cosmos_scale.set_names import MaskedSet

CLASSES = {
    "voc20": 20,
    "voc21": 21,
    "context59": 59,
    "context60": 60,
    "coco_object": 81,
    "coco_stuff": 171,
    "cityscapes": 19,
    "ade20k": 150,
}
JOINED = {
    "ade20k": "chestofdrawers pooltable screendoor coffeetable kitchenisland swivelchair arcademachine "
    "televisionreceiver dirttrack conveyerbelt swimmingpool tradename trafficlight crtscreen bulletinboard",
    "coco_stuff": "trafficlight firehydrant stopsign parkingmeter sportsball baseballbat baseballglove tennisracket "
    "wineglass hotdog pottedplant diningtable cellphone teddybear hairdrier",
    "cityscapes": "trafficlight trafficsign",
}


def test_every_set_has_names_and_a_layout() -> None:
    assert set(CLASSES) == set(get_args(MaskedSet)) == set(PUBLIC_LAYOUTS)


@pytest.mark.parametrize("dataset", get_args(MaskedSet))
def test_only_blanks_differ_between_spellings(dataset: MaskedSet) -> None:
    corrected, published = public_names(dataset, "corrected"), public_names(dataset, "published")
    assert len(corrected) == len(published) == CLASSES[dataset]
    assert all(name == name.strip() and name for names in (*corrected, *published) for name in names)
    others = [new for old, new in zip(corrected, published, strict=True) if old != new]
    assert sorted(name for names in others for name in names) == sorted(JOINED.get(dataset, "").split())


def test_sets_with_background_ask_for_its_parts() -> None:
    voc20, voc21 = public_names("voc20", "corrected"), public_names("voc21", "corrected")
    assert voc21[1:] == voc20
    assert len(voc21[0]) == 26
    assert voc21[0][:2] == ("sky", "wall")
    assert voc20[3] == ("ship",)
    assert voc20[10] == ("table",)
    assert voc20[14][:2] == ("person", "person in shirt")
    assert len(voc20[14]) == 7
    assert len(voc20[19]) == 5
    context59, context60 = public_names("context59", "corrected"), public_names("context60", "corrected")
    assert context60 == (("background",), *context59)
    objects = public_names("coco_object", "published")
    assert objects[0] == voc21[0]
    assert objects[1] == (*voc20[14], "body")
    assert objects[2:] == public_names("coco_stuff", "corrected")[1:80]
    assert objects[10] == ("traffic light",)
    assert objects[80] == ("toothbrush",)
