"""A trained model in Python: features, classes, segmentation and attention maps of pictures and texts.

`loaded_model.py` is a thin face over `evaluation/`: the numbers are those that the evaluators measure. `inputs.py` says
which pictures, classes and templates are taken; `results.py` holds what is returned.
"""

from cosmos_scale.inference.inputs import ClassNames, PictureLike
from cosmos_scale.inference.loaded_model import LoadedModel, load
from cosmos_scale.inference.results import CaptionAttention, ClassifiedPictures, SegmentedPicture

__all__ = [
    "CaptionAttention",
    "ClassNames",
    "ClassifiedPictures",
    "LoadedModel",
    "PictureLike",
    "SegmentedPicture",
    "load",
]
