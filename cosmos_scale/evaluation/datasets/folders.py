"""A folder of pictures for each class, as torchvision's ImageFolder reads it."""

import os
from pathlib import Path

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import FilePictures, PlacedFile

LAYOUT = "a folder for each class, with its pictures in it"


def open_folders(config: ClassificationConfig) -> FilePictures:
    """Find the pictures below the folders of a folder; the classes are the folders' names, sorted.

    Raises UserError where there is no such folder, or no picture in it.
    """
    root = Path(config.data)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; rule: {LAYOUT}")
    from torchvision.datasets import ImageFolder  # here: the import takes a second

    try:
        found = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{root}: has no folder in it; rule: {LAYOUT}") from None
    if not found.samples:
        raise UserError(f"{root}: no picture in its {len(found.classes)} folders; rule: {LAYOUT}")
    files = [PlacedFile(path, os.path.relpath(path, root)) for path, _ in found.samples]
    return FilePictures(files, [label for _, label in found.samples], found.classes)
