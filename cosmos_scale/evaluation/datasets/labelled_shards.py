"""Labelled pictures in .tar files, as webdataset and clip-benchmark write them: a picture and a .cls file a sample."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.data.samples.caption_keys import plain_column
from cosmos_scale.data.samples.document import parse_json
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import FilePictures, PlacedFile
from cosmos_scale.evaluation.evaluator import Setting
from cosmos_scale.evaluation.prompts.texts import CLASS_NAMES_FILE, read_names
from cosmos_scale.files import reason_of, regular_only, whole_path

LAYOUT = "a folder with test/*.tar or *.tar, and classnames.txt: a picture and its label (.cls, from 0) a sample"
PICTURES = ("webp", "png", "jpg", "jpeg")  # endings, in the order in which clip-benchmark takes them
LABEL = "cls"
_DOCUMENT = "json"
NAME_KEYS = ("class_name", "classname", "label_name", "category_name", "class", "category", "label")
_UNLABELLED = -1
_MOST_BYTES = 1 << 20  # of a label or of captions


class TarSample(NamedTuple):
    """A sample of a .tar file. other: the bytes of its member of an asked ending. document: the place of its .json."""

    picture: PlacedFile
    other: bytes | None
    document: PlacedFile | None


class LabelledShards(FilePictures):
    """Pictures in .tar files; one whose label is missing counts as damaged.

    named: what the json of a sample calls its class, by label, where it does.
    """

    def __init__(
        self, files: Sequence[PlacedFile], labels: Sequence[int], classes: Sequence[str], named: dict[int, str]
    ) -> None:
        super().__init__(files, labels, classes)
        self.named = named

    def pixels(self, place: int, setting: Setting) -> Pixels:
        """Read and decode a picture; raises DamagedSample, also where it has no label."""
        if self.labels[place] == _UNLABELLED:
            raise DamagedSample(f"it has no label (.{LABEL})")
        return super().pixels(place, setting)


def open_webdataset(config: ClassificationConfig) -> LabelledShards:
    """Find the pictures and labels in the .tar files of a folder; the classes are the lines of its classnames.txt.

    Raises UserError where there are no such files, no sample has a label, or a label has no class.
    """
    root = Path(config.data)
    shards = shards_of(root, LAYOUT)
    names = Path(config.classes or root / CLASS_NAMES_FILE)
    if not names.is_file():
        rule = f"rule: {LAYOUT}; or --classes FILE (in a run's eval section classes)"
        raise UserError(f"{whole_path(names)}: no such file; {rule}")
    classes = [name[0] for name in read_names(names, several=False)]
    files: list[PlacedFile] = []
    labels: list[int] = []
    named: dict[int, str | None] = {}
    for shard in shards:
        shown = str(shard.relative_to(root))
        for sample in tar_samples(shard, shown, LABEL):
            label = _UNLABELLED
            if sample.other is not None:
                where = f"{shard}: {sample.picture.name.removeprefix(f'{shown}: ')}.{LABEL}"
                label = _label(sample.other, where, len(classes), names)
                if label not in named:  # the first sample of a class speaks for it
                    named[label] = _class_name(sample.document)
            files.append(sample.picture)
            labels.append(label)
    if all(label == _UNLABELLED for label in labels):
        what = "no sample has a label" if labels else "no sample has a picture"
        raise UserError(f"{root}: {what}; rule: {LAYOUT}")
    return LabelledShards(files, labels, classes, {label: name for label, name in named.items() if name})


def _numbered(path: Path) -> tuple[int, str]:
    """Sort 10.tar behind 9.tar."""
    return (int(path.stem) if path.stem.isdecimal() else -1, path.name)


def _class_name(document: PlacedFile | None) -> str | None:
    """Return what a sample's json calls the class; None where there is no such document, key or name."""
    if document is None:
        return None
    try:
        with open(document.path, "rb", opener=regular_only) as opened:
            opened.seek(document.offset)
            found = parse_json(opened.read(min(document.size, _MOST_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None
    cells = {plain_column(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    names = [cells[key] for key in NAME_KEYS if isinstance(cells.get(key), str) and cells[key].strip()]
    return names[0].strip() if names else None


def shards_of(root: Path, layout: str) -> list[Path]:
    """Return the .tar files of a folder, or of its folder `test`, in order; raises UserError where there are none.

    Hidden ones are none: a Mac leaves a `._0.tar` beside each on disks of others, and rsync what it has not copied yet.
    """
    if not root.is_dir():
        raise UserError(f"{redact_urls(whole_path(root))}: no such folder; rule: {layout}")
    found = ([path for path in root.glob(each) if not path.name.startswith(".")] for each in ("test/*.tar", "*.tar"))
    shards = sorted(next(filter(None, found), []), key=_numbered)
    if not shards:
        raise UserError(f"{root}: no .tar file in it nor in {root / 'test'}; rule: {layout}")
    return shards


def tar_samples(shard: Path, shown: str, other: str) -> list[TarSample]:
    """Return each picture of a .tar file, in its order, with the bytes of the sample's member of another ending."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    found: list[TarSample] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if member.isfile() and ending.lower() in (*PICTURES, other, _DOCUMENT):
                    parts.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending.lower()] = member
            for key, members in parts.items():
                picture = next((members[ending] for ending in PICTURES if ending in members), None)
                if picture is None:
                    continue
                file = tar.extractfile(members[other]) if other in members else None
                name = f"{shown}: {key}"
                placed = None
                if document := members.get(_DOCUMENT):
                    placed = PlacedFile(str(shard), name, document.offset_data, document.size)
                found.append(
                    TarSample(
                        PlacedFile(str(shard), name, picture.offset_data, picture.size),
                        None if file is None else file.read(_MOST_BYTES),
                        placed,
                    )
                )
    except tarfile.TarError as error:
        raise UserError(f"{shard}: is no readable .tar file: {error}") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {reason_of(error)}") from error
    return found


def _label(data: bytes, where: str, classes: int, names: Path) -> int:
    text = data.decode(errors="replace").strip()
    if not text.isdecimal() or not int(text) < classes:
        raise UserError(f"{where}: {text!r} is no label; rule: a number from 0 to {classes - 1}, the lines of {names}")
    return int(text)
