"""Whether a build was finished before, of the same pictures, captions and options: then nothing is left to do."""

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.checksums import ShardSum
from cosmos_scale.data.shards.summary import SUMMARY
from cosmos_scale.data.tools.captions_file import CaptionRow
from cosmos_scale.data.tools.picture_path import picture_path
from cosmos_scale.data.work import MANIFEST
from cosmos_scale.files import load_json, read_regular, regular_only

MADE_OF = "made_of"
"""The manifest's key for the digest of what a build was made of; builds of older versions have none."""


def captions_digest(path: Path) -> str:
    """Return a digest of a captions file."""
    digest = sha256()
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def pictures_digest(images: Path, rows: Iterable[CaptionRow]) -> str:
    """Return a digest of the sizes and times of the pictures that rows name."""
    digest = sha256()
    for row in rows:
        try:
            status = None if row.image is None else os.stat(picture_path(images, row.image))
            seen = None if status is None else (status.st_size, status.st_mtime_ns)
        except (DamagedSample, OSError, ValueError):
            seen = None
        digest.update(f"{seen}\n".encode())
    return digest.hexdigest()[:16]


def made_of(options: Mapping[str, Any], pictures: Iterable[str]) -> str:
    """Return the digest of a build's options and of its pictures. pictures: the digest of each shard's."""
    digest = sha256(json.dumps(options).encode())
    for one in pictures:
        digest.update(one.encode())
    return digest.hexdigest()[:16]


def finished_shards(out: Path) -> tuple[str, list[ShardSum]] | None:
    """Return what a finished build was made of, and its shards; None where it does not say, or not all are there."""
    try:
        content = load_json(read_regular(out / MANIFEST))
        shards = [ShardSum(**shard) for shard in content["shards"]]
        there = all((out / shard.shard).stat().st_size == shard.bytes for shard in shards)
        return (str(content[MADE_OF]), shards) if there and (out / SUMMARY).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
