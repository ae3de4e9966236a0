"""A folder of pictures for each class, as torchvision's ImageFolder reads it, but for programs' folders and loops."""

import os
from pathlib import Path

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import (
    PICTURES,
    FilePictures,
    PlacedFile,
    is_hidden,
    is_misnamed,
    is_picture,
)
from cosmos_scale.files import reason_of, whole_path
from cosmos_scale.words import counted

PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "images")  # of a set
LAYOUT = "a folder for each class, with its pictures in it"


def open_folders(config: ClassificationConfig) -> FilePictures:
    """Find the pictures below the folders of a folder; the classes are the folders' names, sorted.

    Pictures beside the folders are passed over, since nothing tells their class, and those whose names end as no
    picture's, as torchvision does.
    Raises UserError where there is no such folder, no picture in it, where its folders hold those of the classes,
    where one of them cannot be listed, or where a link among them leads nowhere: it may be a class.
    """
    root = Path(config.data)
    if not root.is_dir():
        raise UserError(f"{whole_path(root)}: no such folder; rule: {LAYOUT}")
    names = _listed(str(root))
    folders = {name for name in names if (root / name).is_dir()}
    for name in names:
        if not is_hidden(name) and not is_picture(name) and _leads_nowhere(root / name):
            where = f"leads nowhere, to {os.readlink(root / name)}, where a class may lie"
            raise UserError(f"{root}: its link {name} {where}; rule: {LAYOUT}; delete the link where it is none")
    classes = [name for name in names if name in folders and not is_hidden(name)]
    if not classes:
        raise UserError(f"{root}: has no folder in it; rule: {LAYOUT}")
    below = [_files_below(str(root / name)) for name in classes]
    samples = [(path, label) for label, files in enumerate(below) for path in files if is_picture(path)]
    others = [path for files in below for path in files if not is_picture(path)]
    misnamed = [os.path.relpath(path, root) for path in others if is_misnamed(path)]
    nowhere = [os.path.relpath(path, root) for path in others if _leads_nowhere(path)]
    if not samples:
        rule = f"the names of pictures end with {', '.join(PICTURES)}" if misnamed else LAYOUT
        those = counted(len(misnamed), "file that is one", "files that are some")
        found = f", but {those}, such as {misnamed[0]}" if misnamed else ""
        raise UserError(f"{root}: no picture in its {counted(len(classes), 'folder')}{found}; rule: {rule}")
    # ImageFolder would take each part for a class: one part for one class, of which every answer is right.
    nested = all(os.path.dirname(path) != str(root / classes[label]) for path, label in samples)
    if nested and (len(classes) == 1 or all(name.lower() in PARTS for name in classes)):
        named = f"its folder {classes[0]} is" if len(classes) == 1 else f"its folders {', '.join(classes)} are"
        raise UserError(
            f"{root}: {named} no class, but a part of a set with folders in it; rule: {LAYOUT}; name one part"
        )
    files = [PlacedFile(path, os.path.relpath(path, root)) for path, _ in samples]
    loose = [name for name in names if name not in folders and is_picture(name)]
    passed_over = {
        "beside the folders of the classes, in no class": loose,
        "named as no picture is": misnamed,
        "behind a link that leads nowhere": nowhere,
    }
    return FilePictures(files, [label for _, label in samples], classes, passed_over)


def _files_below(folder: str) -> list[str]:
    """Return the paths of the files below a folder, by folder, then by name; links to folders are followed.

    A link to a folder that the link lies in adds nothing: its pictures would count again and again.
    """
    found: list[tuple[str, list[str]]] = []
    waiting: list[tuple[str, tuple[Path, ...]]] = [(folder, ())]
    while waiting:
        place, above = waiting.pop()
        real = Path(os.path.realpath(place))
        if any(outer.is_relative_to(real) for outer in above):
            continue
        names = _listed(place)
        folders = {name for name in names if os.path.isdir(os.path.join(place, name))}
        waiting += [(os.path.join(place, name), (*above, real)) for name in folders if not is_hidden(name)]
        found.append((place, [name for name in names if name not in folders and not name.startswith(".")]))
    return [os.path.join(place, name) for place, names in sorted(found) for name in names]


def _leads_nowhere(path: str | Path) -> bool:
    """Return whether a path is a link to what is not there; a link in a circle leads to itself, and adds nothing."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.islink(path)
    except OSError:
        pass
    return False


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be listed: {reason_of(error)}; rule: {LAYOUT}") from error
