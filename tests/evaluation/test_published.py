"""Published numbers: which of one's own they stand beside, and the table of both."""

from pathlib import Path

import pytest

from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.evaluation.all_sets import PUBLIC_PLACES
from cosmos_scale.evaluation.comparison import Measured, Results
from cosmos_scale.evaluation.published import PUBLISHED_ROWS


@pytest.mark.parametrize("name", [name for name in PUBLISHED_ROWS if not name.startswith("sclip")])
def test_rows_are_named_as_the_shipped_configs(name: str) -> None:
    assert load_config(shipped_file(name), ["train.schedule_steps=100000"]).name == name


def test_a_number_compares_with_the_same_of_the_same_model_and_mode() -> None:
    merged, sclip = PUBLISHED_ROWS["merged30m_vitb16"], PUBLISHED_ROWS["sclip_openai_vitb16"]
    assert merged.share("coco_val2017", "text_to_image_R@1", "student", None) == 52.5
    assert merged.share("flickr30k_val", "image_to_text_R@1", "teacher", None) == 92.9
    assert merged.share("flickr30k_test", "image_to_text_R@1", "teacher", None) is None
    assert merged.share("imagenet", "top1", "student", None) == 57.6
    assert [merged.share("ade20k", "mIoU", "teacher", csa) for csa in (False, True)] == [17.7, 17.7]
    assert merged.share("ade20k", "mIoU", "student", True) is None
    assert [sclip.share("voc21", "mIoU", "student", csa) for csa in (False, True)] == [None, 59.63]
    assert all(row.caveats for row in PUBLISHED_ROWS.values())


def test_the_table_has_the_difference_in_points_and_the_trivial_answer() -> None:
    row = PUBLISHED_ROWS["merged30m_vitb16"]
    place = next(place for place in PUBLIC_PLACES if place.title == "ade20k-csa")
    numbers = {"pictures": 1900, "mIoU": 0.182, "trivial_mIoU": 0.01, "aAcc": 0.5, "mAcc": 0.4}
    results = Results("checkpoint", "/data", "published", "merged30m_vitb16", row)
    results.measured.append(Measured(place, "teacher", {"dataset": "ade20k"}, numbers))
    assert "| ade20k-csa | mIoU | teacher | 18.20 | 1.00 | 17.70 | +0.50 |" in results.as_markdown()
    assert "ade20k-csa: 1,900 pictures used, of 2,000 of the whole set" in results.notes()
    (compared,) = results.as_json()["comparison"]
    assert compared["difference"] == pytest.approx(0.5, abs=1e-9)
    assert not any("corrected names" in note for note in results.notes())


def test_every_set_has_a_name_of_its_own_and_a_layout() -> None:
    titles = [place.title for place in PUBLIC_PLACES]
    assert len(set(titles)) == len(titles) == 4 + 11 + 2 * 8
    assert all(place.layout and place.marks and place.pictures for place in PUBLIC_PLACES)
    assert all(place.places[0] == "" and len(place.places) > 1 for place in PUBLIC_PLACES)
    coco = next(place for place in PUBLIC_PLACES if place.dataset == "coco_stuff")
    assert coco.expected.endswith("*.png; in it or in coco_stuff164k or coco or COCO or coco2017 below it")


@pytest.mark.parametrize("place", ["", "flickr30k", "flickr30k-images"])
def test_flickr30k_is_found_where_its_list_lies(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "flickr30k_val.json").touch()
    (found,) = [public.dataset for public in PUBLIC_PLACES if public.folder(tmp_path) == tmp_path / place]
    assert found == "flickr30k_val"
