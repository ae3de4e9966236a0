"""Every layout of pictures with captions that retrieval can be measured on."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cosmos_scale.config import RetrievalConfig, SourceConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.captioned import CaptionedPictures, NoCaptions
from cosmos_scale.evaluation.datasets.captioned_files import (
    LIST_THEM,
    open_coco,
    open_flickr30k,
    open_karpathy,
    open_pairs,
)
from cosmos_scale.evaluation.datasets.labelled_shards import shards_of, tar_samples
from cosmos_scale.evaluation.datasets.pictures import PlacedFile, placed_pixels
from cosmos_scale.evaluation.evaluator import Setting, digest_of
from cosmos_scale.evaluation.gallery import NAME_THE_KEY, Gallery
from cosmos_scale.words import counted

CAPTIONS = "txt"
WEBDATASET = f"a folder with test/*.tar or *.tar: a picture and its captions (.{CAPTIONS}, a line each) a sample"


class CaptionedFile(NamedTuple):
    """Where a picture lies, and its texts."""

    file: PlacedFile
    texts: Sequence[str]


class FileGallery(CaptionedPictures):
    """Pictures that are files, or parts of files, with their texts in memory."""

    def __init__(self, pictures: Sequence[CaptionedFile], setting: Setting) -> None:
        super().__init__(len(pictures))
        self._pictures, self._setting = pictures, setting

    def describe(self) -> str:
        """How many pictures and captions there are, and a digest of the names and captions."""
        digest = digest_of(repr([(picture.file.name, list(picture.texts)) for picture in self._pictures]))
        texts = sum(len(picture.texts) for picture in self._pictures)
        return f"{counted(len(self), 'picture')}, {counted(texts, 'caption')}, digest {digest}"

    def contents(self) -> str:
        """What `describe` says, and a digest of the sizes and times of all files."""
        paths = dict.fromkeys(picture.file.path for picture in self._pictures)
        return f"{self.describe()}, files {digest_of(repr(list(map(_state, paths))))}"

    def read(self, sample: int) -> tuple[Callable[[], Tensor], list[str]]:
        """Return what reads and decodes a picture, and its texts; both may raise DamagedSample."""
        file, texts = self._pictures[sample]
        if not texts:
            raise NoCaptions("it has no caption")
        return lambda: evaluation_crop(placed_pixels(file, self._setting), self._setting.image_size), list(texts)

    def name(self, sample: int) -> str:
        """The name that the picture's file was given."""
        return self._pictures[sample].file.name


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def open_captioned(config: RetrievalConfig, setting: Setting) -> CaptionedPictures:
    """Find the pictures and captions of a section; raises UserError where anything is missing or wrong."""
    if config.dataset == "shards":
        return _open_shards(config, setting)
    root = Path(config.place)
    if config.dataset == "webdataset":
        pictures = _webdataset(root)
    elif config.dataset == "pairs":
        tell = _say if setting.rank == 0 else None
        pictures = [CaptionedFile(*pair) for pair in open_pairs(root, config.captions, tell)]
    elif config.dataset == "coco_val2017":
        pictures = [CaptionedFile(*pair) for pair in open_coco(root)]
    elif config.dataset == "coco_karpathy_test":
        pictures = [CaptionedFile(*pair) for pair in open_karpathy(root)]
    else:
        pictures = [CaptionedFile(*pair) for pair in open_flickr30k(root, config.dataset.removeprefix("flickr30k_"))]
    return FileGallery(pictures[: config.max_samples], setting)


def _open_shards(config: RetrievalConfig, setting: Setting) -> Gallery:
    source = SourceConfig(name=config.name, shards=config.place, index=config.index)
    index = open_sources([source], setting.remote)
    if setting.rank == 0 and (left := index.unindexed().describe()):
        _say(f"{redact_urls(config.place)}: {left}")
    gallery = Gallery(
        index,
        config.captions,
        image_size=setting.image_size,
        max_pixels=setting.max_pixels,
        background=setting.background,
        max_samples=config.max_samples,
        remote=setting.remote,
    )
    if setting.rank == 0 and (oversized := gallery.oversized()):
        _say(f"{redact_urls(config.place)}: {oversized}: they are left out")
    if setting.rank == 0 and gallery.unread:
        unread = f"its samples have text under {', '.join(gallery.unread)} too, which is not read"
        _say(f"{redact_urls(config.place)}: {unread}; {LIST_THEM}; {NAME_THE_KEY}")
    return gallery


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _webdataset(root: Path) -> list[CaptionedFile]:
    """Find the samples of .tar files in clip-benchmark's form; an empty line of captions is none."""
    found = []
    for shard in shards_of(root, WEBDATASET):
        for file, data, _ in tar_samples(shard, str(shard.relative_to(root)), CAPTIONS):
            # By splitlines, as clip-benchmark does: it also cuts at U+2028 and others.
            texts = () if data is None else [line for line in _text(data, file).splitlines() if line.strip()]
            found.append(CaptionedFile(file, texts))
    if not any(picture.texts for picture in found):
        raise UserError(f"{root}: no sample has a picture and captions; rule: {WEBDATASET}")
    return found


def _text(data: bytes, file: PlacedFile) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file.path}: {file.name}.{CAPTIONS}: is no UTF-8; rule: {WEBDATASET}") from error
