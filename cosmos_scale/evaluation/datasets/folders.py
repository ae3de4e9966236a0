"""A folder of pictures for each class, as torchvision's ImageFolder reads it, but for folders that programs leave."""

import os
from pathlib import Path

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import FilePictures, PlacedFile, is_hidden, is_picture

_PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "images")  # of a set
LAYOUT = "a folder for each class, with its pictures in it"


def open_folders(config: ClassificationConfig) -> FilePictures:
    """Find the pictures below the folders of a folder; the classes are the folders' names, sorted.

    Raises UserError where there is no such folder, no picture in it, or where its folders hold those of the classes.
    """
    root = Path(config.data)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; rule: {LAYOUT}")
    from torchvision.datasets.folder import make_dataset  # here: the import takes a second

    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    if not classes:
        raise UserError(f"{root}: has no folder in it; rule: {LAYOUT}")
    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(root), numbers, is_valid_file=is_picture, allow_empty=True)
    if not samples:
        raise UserError(f"{root}: no picture in its {len(classes)} folders; rule: {LAYOUT}")
    # ImageFolder would take each part for a class: one part for one class, of which every answer is right.
    nested = all(os.path.dirname(path) != str(root / classes[label]) for path, label in samples)
    if nested and all(name.lower() in _PARTS for name in classes):
        named = f"its folder {classes[0]} is" if len(classes) == 1 else f"its folders {', '.join(classes)} are"
        raise UserError(
            f"{root}: {named} no class, but a part of a set with folders in it; rule: {LAYOUT}; name one part"
        )
    files = [PlacedFile(path, os.path.relpath(path, root)) for path, _ in samples]
    return FilePictures(files, [label for _, label in samples], classes)
