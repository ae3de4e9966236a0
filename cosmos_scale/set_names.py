"""The names of sets and layouts that can be evaluated, for config and command line: importing them takes no time."""

from typing import Literal

CaptionedLayout = Literal[
    "shards",
    "webdataset",
    "pairs",
    "coco_val2017",
    "coco_karpathy_test",
    "flickr30k_val",
    "flickr30k_test",
]
LabelledLayout = Literal[
    "folders",
    "webdataset",
    "imagenet",
    "food101",
    "cifar10",
    "cifar100",
    "sun397",
    "stanford_car",
    "aircraft",
    "dtd",
    "pets",
    "caltech101",
    "flowers",
]
MaskedSet = Literal["voc20", "voc21", "context59", "context60", "coco_object", "coco_stuff", "cityscapes", "ade20k"]
