"""Every layout of labelled pictures that can be classified: its pictures, and what its classes are called."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.folders import open_folders
from cosmos_scale.evaluation.datasets.pictures import LabelledPictures
from cosmos_scale.evaluation.prompts.texts import (
    CLASS_NAMES_FILE,
    DEFAULT_TEMPLATES,
    TEMPLATES_FILE,
    Names,
    read_names,
    read_templates,
)
from cosmos_scale.words import counted


class LabelledSet(NamedTuple):
    """Pictures with labels, the names of the classes, and the templates that names are put into."""

    pictures: LabelledPictures
    names: Names
    templates: tuple[str, ...]


OPENERS: Mapping[str, Callable[[ClassificationConfig], LabelledPictures]] = {"folders": open_folders}


def open_labelled_set(config: ClassificationConfig) -> LabelledSet:
    """Find the pictures, names and templates of a section; raises UserError where anything is missing or wrong."""
    pictures = OPENERS[config.dataset](config)
    names, origin = _names(config, pictures)
    if len(names) != len(pictures.classes):
        shown = ", ".join(pictures.classes[:3]) + (", ..." if len(pictures.classes) > 3 else "")
        raise UserError(
            f"{origin}: names {counted(len(names), 'class', 'classes')}, but {config.data} has "
            f"{len(pictures.classes)} ({shown}); rule: a line for each class, in the order of the labels"
        )
    return LabelledSet(pictures, names, _templates(config))


def _names(config: ClassificationConfig, pictures: LabelledPictures) -> tuple[Names, str]:
    """Return the names of the classes, and where they come from."""
    path = Path(config.classes or Path(config.data) / CLASS_NAMES_FILE)
    if config.classes is not None or path.is_file():
        return read_names(path), str(path)
    return tuple((name.replace("_", " "),) for name in pictures.classes), config.data


def _templates(config: ClassificationConfig) -> tuple[str, ...]:
    path = Path(config.templates or Path(config.data) / TEMPLATES_FILE)
    return read_templates(path) if config.templates is not None or path.is_file() else DEFAULT_TEMPLATES
