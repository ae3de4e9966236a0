"""Small shards of real JPEGs for tests, written by webdataset."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from cosmos_scale.config import RunConfig, SourceConfig
from cosmos_scale.data.shards.index import MergedIndex, index_shards, open_sources

Member = dict[str, Any]


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20)) -> bytes:
    """Return an encoded picture of noise, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int) -> Member:
    """Return the members of a sound sample: a picture of its own and four sentences."""
    sentences = [f"sentence {place} of picture {number}" for place in range(4)]
    return {
        "__key__": f"{number:06d}",
        "jpg": picture(number),
        "json": json.dumps({"raw_caption": sentences}).encode(),
    }


def write_shard(path: Path, samples: Iterable[Member]) -> Path:
    """Write one shard of samples, given by their members."""
    with TarWriter(str(path), encoder=False, mtime=0) as shard:
        for members in samples:
            shard.write(members)
    return path


def write_shards(folder: Path, counts: Iterable[int]) -> Path:
    """Write and index shards of so many sound samples each; samples are numbered across all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        write_shard(folder / f"{shard:05d}.tar", [sample(number + place) for place in range(count)])
        number += count
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def flip_bytes(path: Path, offset: int, count: int) -> None:
    """Damage a file in place, keeping its size."""
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(byte ^ 0xFF for byte in data[offset : offset + count])
    path.write_bytes(data)


def open_folder(folder: Path) -> MergedIndex:
    """Open the index of a folder of shards."""
    return open_sources([SourceConfig(name="test", shards=str(folder))])


def shards_config(folder: Path, *, global_batch: int = 4, **data: Any) -> RunConfig:
    """Return a run over a folder's shards with few, small views."""
    return RunConfig.model_validate(
        {
            "model": {"vision": {"image_size": 16, "patch_size": 8}, "text": {"context_length": 16}},
            "data": {
                "sources": [{"name": "test", "shards": str(folder)}],
                "views": {"local_crops": 1, "local_size": 8},
                "captions": {"count": 3},
                "window": 8,
                "workers": 0,
                **data,
            },
            "train": {"global_batch": global_batch},
        }
    )
