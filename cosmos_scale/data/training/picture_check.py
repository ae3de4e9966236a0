"""Whether the pictures of a run are small enough for data.max_pixels, looked for before the run."""

import sys
from collections.abc import Iterable
from contextlib import closing
from typing import NamedTuple

import numpy as np

from cosmos_scale.config import DataConfig, RemoteConfig
from cosmos_scale.data.decode.picture import open_picture
from cosmos_scale.data.samples.sample import DamagedSample, UnreachableShard
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.shards.store import is_remote
from cosmos_scale.errors import UserError
from cosmos_scale.words import counted

LOOKED_AT = 64  # pictures, spread over a source or gallery


class PictureSizes(NamedTuple):
    """How many pictures were looked at, how many of them have too many pixels, and the size (width, height) of the
    largest."""

    looked_at: int
    too_large: int
    largest: tuple[int, int]

    def describe(self, max_pixels: int) -> str:
        """Say which share is too large."""
        width, height = self.largest
        exceed = "exceeds" if self.too_large == 1 else "exceed"
        return (
            f"{self.too_large:,} of {counted(self.looked_at, 'picture')} looked at {exceed} data.max_pixels "
            f"{max_pixels} (the largest: {width} x {height})"
        )


def picture_sizes(index: MergedIndex, samples: Iterable[int], max_pixels: int, remote: RemoteConfig) -> PictureSizes:
    """Look at the headers of some pictures; those that cannot be read prove nothing and do not count.

    Of shards elsewhere no more than one picture is read: each may cost the fetch of a shard.
    """
    sizes: list[tuple[int, int]] = []
    with closing(ShardReader(remote)) as reader:
        for sample in samples:
            try:
                location = index.locate(sample)
                picture = open_picture(reader.read(location)[0], sys.maxsize)
            except DamagedSample:
                continue
            except UnreachableShard:
                break
            except Exception:  # of any type, where the header is broken: training names it
                continue
            sizes.append((picture.width, picture.height))
            if is_remote(location.file.address):
                break
    too_large = sum(width * height > max_pixels for width, height in sizes)
    return PictureSizes(len(sizes), too_large, max(sizes, key=lambda size: size[0] * size[1], default=(0, 0)))


def check_pictures(index: MergedIndex, data: DataConfig) -> str:
    """Return in words whether the pictures of a run fit data.max_pixels; what does not is told on stderr too.

    Raises: UserError where none of a source's pictures looked at fits.
    """
    said = []
    first = looked_at = 0
    for source in index.sources:
        samples = sum(row.samples for row in source.rows)
        spread = np.unique(np.linspace(first, first + samples - 1, LOOKED_AT).astype(int)).tolist()
        first += samples
        sizes = picture_sizes(index, spread, data.max_pixels, data.remote)
        looked_at += sizes.looked_at
        if not sizes.too_large:
            continue
        text = f"data source {source.name}: {sizes.describe(data.max_pixels)}"
        if sizes.too_large == sizes.looked_at:
            raise UserError(f"{text}; rule: a larger data.max_pixels, or smaller pictures")
        said.append(
            f"{text}: they count as damaged, and training stops at more than data.max_damaged {data.max_damaged:g}"
        )
        print(said[-1], file=sys.stderr)
    return "; ".join(said) or f"{counted(looked_at, 'picture')} looked at, none exceeds data.max_pixels"
