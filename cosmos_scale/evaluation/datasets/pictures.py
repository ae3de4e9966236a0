"""Pictures with a class each, whatever they lie in: read one by one, in an order that all ranks share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosmos_scale.data.decode.picture import Pixels, decode_rgbx, other_format, picture_format
from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.ahead import prepared_blocks
from cosmos_scale.evaluation.evaluator import Setting, digest_of
from cosmos_scale.evaluation.left_out import LeftOutWords
from cosmos_scale.files import reason_of, regular_only
from cosmos_scale.words import counted

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Found too, so that what cannot be read is left out by name and counted.
_OTHER_PICTURES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".ppm", ".tif", ".tiff")
# Of file servers, archives and disks, whose bins hold pictures that were deleted; in small letters.
_TOOLS_FOLDERS = (
    *("@eadir", "__macosx", "lost+found", "#recycle", "@recycle", "#snapshot"),
    *("$recycle.bin", "recycler", "system volume information"),
)
_NONE: Mapping[str, Sequence[str]] = MappingProxyType({})


def is_picture(path: str) -> bool:
    """Whether a file is called as pictures are, in letters of either case; hidden files are none."""
    name = os.path.basename(path)
    return not name.startswith(".") and name.lower().endswith(PICTURES + _OTHER_PICTURES)


def is_misnamed(path: str) -> bool:
    """Whether a file whose name ends as no picture's is one by its first bytes; none where it cannot be read."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            head = file.read(12)
    except OSError:
        return False
    return picture_format(head) is not None or other_format(head) is not None


def is_hidden(folder: str) -> bool:
    """Whether a folder of this name is a program's, and no class and no place of pictures."""
    return folder.startswith(".") or folder.lower() in _TOOLS_FOLDERS


class LabelledPictures(ABC):
    """Pictures of one set. labels: the class of each picture, from 0. classes: what the data calls its classes.

    passed_over: names of pictures that lie there too, but are none of the set's, by the words on why.
    """

    def __init__(
        self, labels: Sequence[int], classes: Sequence[str], passed_over: Mapping[str, Sequence[str]] = _NONE
    ) -> None:
        self.labels, self.classes, self.passed_over = labels, classes, passed_over

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.labels)

    @abstractmethod
    def name(self, place: int) -> str:
        """Where a picture lies, for people, the same on all hosts but for the folder of the set."""

    @abstractmethod
    def pixels(self, place: int, setting: Setting) -> Pixels:
        """A picture, decoded: [H, W, 4] uint8, the fourth channel without meaning; raises DamagedSample."""

    def describe(self) -> str:
        """Say in words and a digest which pictures these are, with which labels."""
        listed = "".join(f"{self.name(place)}\0{label}\0" for place, label in enumerate(self.labels))
        return f"{counted(len(self), 'picture')}, digest {digest_of(listed)}"


class PlacedFile(NamedTuple):
    """Where the bytes of a picture lie: a file, or `size` bytes of it from `offset` on; name: for people."""

    path: str
    name: str
    offset: int = 0
    size: int = -1


def placed_pixels(file: PlacedFile, setting: Setting) -> Pixels:
    """Read and decode a picture: [H, W, 4] uint8, the fourth channel without meaning; raises DamagedSample."""
    try:
        with open(file.path, "rb", opener=regular_only) as opened:
            opened.seek(file.offset)
            image_bytes = opened.read(file.size)
    except OSError as error:
        raise DamagedSample(f"the picture cannot be read: {reason_of(error)}") from error
    return decode_rgbx(image_bytes, setting.max_pixels, setting.background)


class FilePictures(LabelledPictures):
    """Pictures that are files, or parts of files."""

    def __init__(
        self,
        files: Sequence[PlacedFile],
        labels: Sequence[int],
        classes: Sequence[str],
        passed_over: Mapping[str, Sequence[str]] = _NONE,
    ) -> None:
        super().__init__(labels, classes, passed_over)
        self._files = files

    def name(self, place: int) -> str:
        """The name that the file was given."""
        return self._files[place].name

    def pixels(self, place: int, setting: Setting) -> Pixels:
        """Read and decode a file."""
        return placed_pixels(self._files[place], setting)


class ArrayPictures(LabelledPictures):
    """Pictures that lie in memory: arrays [H, W, 3] uint8."""

    def __init__(self, arrays: Sequence[Pixels], labels: Sequence[int], classes: Sequence[str]) -> None:
        super().__init__(labels, classes)
        self._arrays = arrays

    def name(self, place: int) -> str:
        """The number of the picture."""
        return f"picture {place}"

    def pixels(self, place: int, setting: Setting) -> Pixels:
        """The picture with a fourth channel."""
        picture = self._arrays[place]
        return np.concatenate([picture, picture[:, :, :1]], axis=2)


class PictureBatch(NamedTuple):
    """Some pictures of a set: images [N, 3, H, W] float32 on the CPU, their labels [N] int64."""

    images: Tensor
    labels: Tensor


class RankPictures:
    """One rank's share of a set, in batches. damaged: how many pictures the last `batches` has left out so far."""

    def __init__(self, pictures: LabelledPictures, setting: Setting, batch: int) -> None:
        self._pictures, self._setting, self._batch = pictures, setting, batch
        self._words = LeftOutWords()
        self.damaged = 0

    def batches(self) -> Iterator[PictureBatch]:
        """Yield every picture of this rank, prepared as the model sees it; reports each batch.

        The set is cut into blocks of `batch` pictures, and a rank takes whole blocks: the batches, and so the last bits
        of the features, are the same on any number of ranks. A picture that cannot be used is left out, and named once.
        """
        rank, world_size, batch = self._setting.rank, self._setting.world_size, self._batch
        blocks = -(-len(self._pictures) // batch)
        mine = range(blocks * rank // world_size, blocks * (rank + 1) // world_size)
        places = range(mine.start * batch, min(mine.stop * batch, len(self._pictures)))
        self.damaged = 0
        for found in prepared_blocks(lambda place: partial(self._prepare, place), places, batch, world_size):
            sound = [(place, image) for place, image in found if isinstance(image, Tensor)]
            for place, damage in found:
                if isinstance(damage, DamagedSample):
                    self.damaged += 1
                    self._words.say(f"{self._pictures.name(place)}: {damage}")
            if sound:
                labels = [self._pictures.labels[place] for place, _ in sound]
                yield PictureBatch(torch.stack([image for _, image in sound]), torch.tensor(labels))
            self._setting.report("pictures", found[-1][0] + 1 - places.start, len(places))

    def _prepare(self, place: int) -> Tensor:
        """Return a picture as the model sees it: [3, H, W] float32."""
        return evaluation_crop(self._pictures.pixels(place, self._setting), self._setting.image_size)
