"""Every layout of labelled pictures that can be classified: its pictures, and what its classes are called."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.folders import PARTS, open_folders
from cosmos_scale.evaluation.datasets.labelled_shards import LABEL, LabelledShards, open_webdataset
from cosmos_scale.evaluation.datasets.pictures import LabelledPictures
from cosmos_scale.evaluation.datasets.published_sets import PUBLISHED, open_published
from cosmos_scale.evaluation.prompts.class_pairs import ClassPairs, DataNames, alike_names, number_doubt, pair_names
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
OWN_LAYOUTS = ("folders", "webdataset")  # whose names and templates lie beside the pictures
_WNID = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


class LabelledSet(NamedTuple):
    """Pictures with labels, the names of the classes, and the templates that names are put into.

    pairs: how names of a file go with what the data calls its classes.
    """

    pictures: LabelledPictures
    names: Names
    templates: tuple[str, ...]
    pairs: ClassPairs


def open_labelled_set(config: ClassificationConfig) -> LabelledSet:
    """Find the pictures, names and templates of a section; raises UserError where anything is missing or wrong."""
    pictures = _pictures(config)
    path = _names_file(config)
    names = _own_names(config, pictures.classes) if path is None else _read_names(path, config)
    origin = path or (config.data if config.dataset in OWN_LAYOUTS else f"the names of {config.dataset}")
    if len(names) != len(pictures.classes):
        shown = ", ".join(pictures.classes[:3]) + (", ..." if len(pictures.classes) > 3 else "")
        raise UserError(
            f"{origin}: names {counted(len(names), 'class', 'classes')}, but {config.data} has "
            f"{len(pictures.classes)} ({shown}); rule: a line for each class, in the order of the labels"
        )
    templates = _templates(config)
    return LabelledSet(pictures, names, templates, _class_pairs(config, pictures, path, names, templates))


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


def _names_file(config: ClassificationConfig) -> Path | None:
    """Return the file that names the classes; None where the set or its folders do."""
    if config.classes is not None:
        return Path(config.classes)
    path = Path(config.data) / CLASS_NAMES_FILE
    return path if config.dataset in OWN_LAYOUTS and path.is_file() else None


def _own_names(config: ClassificationConfig, folders: Sequence[str]) -> Names:
    if config.dataset not in OWN_LAYOUTS:
        return published_names(config.dataset, config.names)
    return tuple((name.replace("_", " "),) for name in folders)


def _read_names(path: Path, config: ClassificationConfig) -> Names:
    return read_names(path, several=not (Path(config.data) / BENCHMARK_TEMPLATES_FILE).is_file())


def _class_pairs(
    config: ClassificationConfig,
    pictures: LabelledPictures,
    path: Path | None,
    names: Names,
    templates: Sequence[str],
) -> ClassPairs:
    """Compare names with what the data calls its classes; raises UserError where lines are those of other classes."""
    if path is not None:
        rule = "rule: a line for each class, of names that no other class has"
        alike = alike_names(f"{path}: lines", names, range(1, len(names) + 1), rule)
        data = _data_names(config, pictures)
        pairs = pair_names(path, names, data)._replace(alike=alike)
        if config.dataset == "folders" and pairs.shown and not pairs.doubt:
            pairs = pairs._replace(doubt=number_doubt(path, names, pictures.classes, data.rule))
        return pairs
    if config.dataset != "folders":
        return ClassPairs("", "")
    rule = f"rule: {CLASS_NAMES_FILE} or --classes FILE names the classes"
    doubt, alike = "", alike_names(f"{config.data}: folders", names, pictures.classes, rule)
    if wnid := next(filter(_WNID.fullmatch, pictures.classes), None):
        text = templates[0].replace("{}", wnid)
        doubt = f"{config.data}: its folder {wnid} is a wnid and no name, so a text is {text!r}; {rule}"
        if len(pictures.classes) == _IMAGENET_CLASSES:  # it refuses a part of them
            doubt += "; --dataset imagenet knows ImageNet's"
    elif all(name.lower() in PARTS for name in pictures.classes):
        parts = f"{', '.join(pictures.classes)}: called as parts of a set are, and taken for classes"
        doubt = f"{config.data}: its folders are {parts}; rule: --data names the folder of the classes' folders"
    elif unreadable := next((name for name in pictures.classes if not _is_text(name)), None):  # as old zips unpack
        said = os.fsencode(unreadable).decode(errors="backslashreplace")
        doubt = f"{config.data}: the name of its folder {said} is no {sys.getfilesystemencoding()} "
        doubt += f"text, so it cannot mean its class; {rule}"
    return ClassPairs("", doubt, alike)


def _is_text(name: str) -> bool:
    """Whether a folder's name is one of the disk's encoding; Python reads other bytes as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _data_names(config: ClassificationConfig, pictures: LabelledPictures) -> DataNames:
    if isinstance(pictures, LabelledShards):
        # A list of synonyms, as ImageNet's, is one text.
        synonyms = {label: (name, *name.split(", ")) for label, name in pictures.named.items()}
        rule = f"rule: line N is the class of the label N - 1 (.{LABEL})"
        return DataNames("by the shards' json class", synonyms, rule)
    folders = pictures.classes
    if config.dataset not in ("folders", "imagenet"):
        known = published_names(config.dataset)
        return DataNames(
            f"{config.dataset}'s class",
            {label: (*known[label], folder) for label, folder in enumerate(folders)},
            "rule: the lines have the order of the set's labels",
        )
    rule = "rule: the lines have the order of the sorted folders"
    if all(map(_WNID.fullmatch, folders)) and len(folders) == _IMAGENET_CLASSES:
        of_wnids = published_names("imagenet")
        return DataNames("folder", {label: (wnid, *of_wnids[label]) for label, wnid in enumerate(folders)}, rule)
    return DataNames("folder", {label: (folder,) for label, folder in enumerate(folders)}, rule)


def _templates(config: ClassificationConfig) -> tuple[str, ...]:
    root = Path(config.data)
    if config.templates is not None:
        return read_templates(Path(config.templates))
    if config.dataset not in OWN_LAYOUTS:
        return published_templates(config.dataset)
    for name in (TEMPLATES_FILE, BENCHMARK_TEMPLATES_FILE):
        if (root / name).is_file():
            return read_templates(root / name)
    return DEFAULT_TEMPLATES
