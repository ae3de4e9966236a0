"""Labelled pictures in .tar files, as webdataset and clip-benchmark write them: a picture and a .cls file a sample."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import FilePictures, PlacedFile
from cosmos_scale.evaluation.evaluator import Setting
from cosmos_scale.evaluation.prompts.texts import CLASS_NAMES_FILE, read_names
from cosmos_scale.files import reason_of

LAYOUT = "a folder with test/*.tar or *.tar, and classnames.txt: a picture and its label (.cls, from 0) a sample"
PICTURES = ("webp", "png", "jpg", "jpeg")  # endings, in the order in which clip-benchmark takes them
LABEL = "cls"
_UNLABELLED = -1
_MOST_BYTES = 1 << 20  # of a label or of captions


class LabelledShards(FilePictures):
    """Pictures in .tar files; one whose label is missing counts as damaged."""

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
        raise UserError(f"{names}: no such file; rule: {LAYOUT}; or --classes FILE (in a run's eval section classes)")
    classes = [name[0] for name in read_names(names, several=False)]
    files: list[PlacedFile] = []
    labels: list[int] = []
    for shard in shards:
        for file, label in _samples(shard, str(shard.relative_to(root)), len(classes), names):
            files.append(file)
            labels.append(label)
    if all(label == _UNLABELLED for label in labels):
        what = "no sample has a label" if labels else "no sample has a picture"
        raise UserError(f"{root}: {what}; rule: {LAYOUT}")
    return LabelledShards(files, labels, classes)


def _numbered(path: Path) -> tuple[int, str]:
    """Sort 10.tar behind 9.tar."""
    return (int(path.stem) if path.stem.isdecimal() else -1, path.name)


def _samples(shard: Path, shown: str, classes: int, names: Path) -> Iterator[tuple[PlacedFile, int]]:
    """Yield the picture and the label of each sample of a .tar file, in its order."""
    for picture, label in tar_samples(shard, shown, LABEL):
        where = f"{shard}: {picture.name.removeprefix(f'{shown}: ')}.{LABEL}"
        yield picture, _UNLABELLED if label is None else _label(label, where, classes, names)


def shards_of(root: Path, layout: str) -> list[Path]:
    """Return the .tar files of a folder, or of its folder `test`, in order; raises UserError where there are none."""
    if not root.is_dir():
        raise UserError(f"{redact_urls(str(root))}: no such folder; rule: {layout}")
    shards = sorted(root.glob("test/*.tar"), key=_numbered) or sorted(root.glob("*.tar"), key=_numbered)
    if not shards:
        raise UserError(f"{root}: no .tar file in it nor in {root / 'test'}; rule: {layout}")
    return shards


def tar_samples(shard: Path, shown: str, other: str) -> list[tuple[PlacedFile, bytes | None]]:
    """Return each picture of a .tar file, in its order, with the bytes of the sample's member of another ending."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    found: list[tuple[PlacedFile, bytes | None]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if member.isfile() and ending.lower() in (*PICTURES, other):
                    parts.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending.lower()] = member
            for key, members in parts.items():
                picture = next((members[ending] for ending in PICTURES if ending in members), None)
                if picture is None:
                    continue
                file = tar.extractfile(members[other]) if other in members else None
                placed = PlacedFile(str(shard), f"{shown}: {key}", picture.offset_data, picture.size)
                found.append((placed, None if file is None else file.read(_MOST_BYTES)))
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
