"""What the classes of a public segmentation set are called in texts, as published and spelt correctly.

The lists lie in `class_names/`, whose NOTICE names their source; `prompts/texts.py` reads such files, users' too.
"""

from pathlib import Path
from typing import Literal

from cosmos_scale.evaluation.prompts.texts import Names, read_names
from cosmos_scale.set_names import MaskedSet

_LISTS = Path(__file__).with_name("class_names")
_THINGS = 80  # COCO's classes of objects; they are the first of COCO-Stuff's
# Sets whose names the published evaluation wrote without blanks. COCO-Object has the names of COCO-Stuff, with blanks.
_WITHOUT_BLANKS = ("ade20k", "coco_stuff", "cityscapes")


def public_names(dataset: MaskedSet, spelling: Literal["corrected", "published"]) -> Names:
    """Return the names of each class of a set, in the order of its labels.

    published: spelt as the published evaluation did ("trafficlight"), which changes tokens, and so its numbers.
    """
    if dataset == "voc21":
        return _list("background") + _list("voc20")
    if dataset == "context60":
        return (("background",), *_list("context59"))
    if dataset == "coco_object":
        (person,) = _list("voc20")[14:15]
        return (*_list("background"), (*person, "body"), *_list("coco_stuff")[1:_THINGS])
    names = _list(dataset)
    if spelling == "published" and dataset in _WITHOUT_BLANKS:
        return tuple(tuple(name.replace(" ", "") for name in of_class) for of_class in names)
    return names


def _list(name: str) -> Names:
    return read_names(_LISTS / f"{name}.txt")
