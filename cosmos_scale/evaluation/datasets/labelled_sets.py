"""Every layout of labelled pictures that can be classified: its pictures, and what its classes are called."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.folders import open_folders
from cosmos_scale.evaluation.datasets.labelled_shards import open_webdataset
from cosmos_scale.evaluation.datasets.pictures import LabelledPictures
from cosmos_scale.evaluation.datasets.published_sets import PUBLISHED, open_published
from cosmos_scale.evaluation.prompts.texts import (
    CLASS_NAMES_FILE,
    DEFAULT_TEMPLATES,
    TEMPLATES_FILE,
    Names,
    published_names,
    published_templates,
    read_names,
    read_templates,
)
from cosmos_scale.words import counted

# clip-benchmark's name of the file. Where it is there, a line of classnames.txt is one name, as that program reads it.
BENCHMARK_TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_WNID = re.compile(r"n\d{8}")


class LabelledSet(NamedTuple):
    """Pictures with labels, the names of the classes, and the templates that names are put into."""

    pictures: LabelledPictures
    names: Names
    templates: tuple[str, ...]


def open_labelled_set(config: ClassificationConfig) -> LabelledSet:
    """Find the pictures, names and templates of a section; raises UserError where anything is missing or wrong."""
    pictures = _pictures(config)
    names, origin = _names(config, pictures.classes)
    if len(names) != len(pictures.classes):
        shown = ", ".join(pictures.classes[:3]) + (", ..." if len(pictures.classes) > 3 else "")
        raise UserError(
            f"{origin}: names {counted(len(names), 'class', 'classes')}, but {config.data} has "
            f"{len(pictures.classes)} ({shown}); rule: a line for each class, in the order of the labels"
        )
    return LabelledSet(pictures, names, _templates(config))


def _pictures(config: ClassificationConfig) -> LabelledPictures:
    if config.dataset in PUBLISHED:
        return open_published(config)
    if config.dataset == "webdataset":
        return open_webdataset(config)
    pictures = open_folders(config)
    if config.dataset == "imagenet":
        _check_wnids(config.data, pictures.classes)
    return pictures


def _check_wnids(data: str, folders: Sequence[str]) -> None:
    """Raise UserError unless the folders can be ImageNet's 1,000 classes."""
    rule = "rule: 1,000 folders named by wnids (n01440764/...), the pictures of the validation set moved into them"
    other = next((folder for folder in folders if not _WNID.fullmatch(folder)), None)
    if other is not None:
        raise UserError(f"{data}: its folder {other} is no wnid; {rule}")
    if len(folders) != len(published_names("imagenet")):
        raise UserError(f"{data}: {counted(len(folders), 'folder')}; {rule}")


def _names(config: ClassificationConfig, classes: Sequence[str]) -> tuple[Names, str]:
    """Return the names of the classes, and where they come from."""
    root = Path(config.data)
    if config.classes is None and config.dataset not in ("folders", "webdataset"):
        return published_names(config.dataset, config.names), f"the names of {config.dataset}"
    path = Path(config.classes or root / CLASS_NAMES_FILE)
    if config.classes is None and not path.is_file():
        return tuple((name.replace("_", " "),) for name in classes), config.data
    names = read_names(path, several=not (root / BENCHMARK_TEMPLATES_FILE).is_file())
    if config.dataset == "folders":
        _check_order(path, names, classes)
    return names, str(path)


def _check_order(path: Path, names: Names, folders: Sequence[str]) -> None:
    """Raise UserError where lines name the folders, but in another order: then labels would be wrong without a word."""
    lines = [_plain(of_class[0]) for of_class in names]
    sorted_folders = [_plain(folder) for folder in folders]
    if lines != sorted_folders and sorted(lines) == sorted(sorted_folders):
        place = next(place for place, line in enumerate(lines) if line != sorted_folders[place])
        raise UserError(
            f"{path}: line {place + 1} is {names[place][0]!r}, but folder {place + 1} is {folders[place]!r}; rule: the "
            "lines have the order of the sorted folders"
        )


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _templates(config: ClassificationConfig) -> tuple[str, ...]:
    root = Path(config.data)
    if config.templates is not None:
        return read_templates(Path(config.templates))
    if config.dataset not in ("folders", "webdataset"):
        return published_templates(config.dataset)
    for name in (TEMPLATES_FILE, BENCHMARK_TEMPLATES_FILE):
        if (root / name).is_file():
            return read_templates(root / name)
    return DEFAULT_TEMPLATES
