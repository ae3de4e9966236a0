"""Whether a build was finished before, of the same pictures, captions and options: then nothing is left to do."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.checksums import ShardSum
from cosmos_scale.data.shards.summary import SUMMARY
from cosmos_scale.data.shards.table import table_name
from cosmos_scale.data.tools.captions_file import CaptionRow
from cosmos_scale.data.tools.picture_path import picture_path
from cosmos_scale.data.work import MANIFEST, Work, check_options
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only
from cosmos_scale.words import counted

# Keys of the manifest: the digest of all that a build was made of, its options, and the digest of its pictures.
# Builds of older versions have none of them, or the first alone.
MADE_OF, OPTIONS, PICTURES = "made_of", "options", "pictures_digest"


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


def made_of(options: Mapping[str, Any], pictures: Iterable[str]) -> dict[str, Any]:
    """Return what the manifest says of a build's options and pictures. pictures: the digest of each shard's.

    The folder of pictures counts, but is not named: shards are handed on, and its path is of this machine.
    """
    digests = list(pictures)
    noted = {name: value for name, value in options.items() if name != "images"}
    return {MADE_OF: _digest(options, digests), OPTIONS: noted, PICTURES: _digest({}, digests)}


def _digest(options: Mapping[str, Any], pictures: Iterable[str]) -> str:
    digest = sha256(json.dumps(options).encode())
    for one in pictures:
        digest.update(one.encode())
    return digest.hexdigest()[:16]


class FinishedBuild(NamedTuple):
    """What the manifest of a finished build says. made_of, pictures: digests. options: None of older versions."""

    shards: list[ShardSum]
    made_of: str
    options: dict[str, Any] | None
    pictures: str


def finished_build(out: Path) -> FinishedBuild | None:
    """Return what a folder's manifest says of its build; None where it says nothing, or no shard of it is there.

    Raises: UserError where some of its shards or its index are gone, or a shard has another size.
    """
    try:
        content = load_json(read_regular(out / MANIFEST))
        shards = [ShardSum(**shard) for shard in content["shards"]]
        options = content.get(OPTIONS)
        found = FinishedBuild(
            *(shards, str(content[MADE_OF])),
            *(dict(options) if isinstance(options, dict) else None, str(content.get(PICTURES))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sizes = [_size(out / shard.shard) for shard in shards]
    if not any(size is not None for size in sizes):
        return None
    for shard, size in zip(shards, sizes, strict=True):
        if size != shard.bytes:
            what = "is missing" if size is None else f"has {counted(size, 'byte')}, not {shard.bytes:,}"
            raise UserError(
                f"{out}: its build was done, but since then shard {shard.shard} of its {MANIFEST} {what}; rule: copy "
                f"it back, {_anew(out)}"
            )
    index = (SUMMARY, *(table_name(shard.shard) for shard in shards))
    if gone := next((name for name in index if not (out / name).is_file()), None):
        command = f"cosmos-scale data index {shlex.quote(str(out))}"
        raise UserError(
            f"{out}: its build was done, but since then its {gone} is missing; rule: run `{command}`, {_anew(out)}"
        )
    return found


def _size(path: Path) -> int | None:
    """Return a file's bytes; None where it is not there, or cannot be looked at."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _anew(out: Path) -> str:
    return f"name another folder with --out, or delete {out} to build anew"


def refuse_other_build(
    finished: FinishedBuild, work: Work, options: Mapping[str, Any], pictures: Iterable[str]
) -> None:
    """Raise UserError where a finished build was made of other files or with other options: it says of which.

    options, pictures: those of now, as `made_of` takes them.
    """
    now = made_of(options, pictures)
    if now[MADE_OF] == finished.made_of:
        return
    before = finished.options
    if before is None:
        raise UserError(
            f"{work.out}: its build was done by an older version, of other files or with other options; rule: "
            f"{_anew(work.out)}"
        )
    digest = "captions_digest"
    check_options(work, {name: value for name, value in now[OPTIONS].items() if name != digest}, before, "done")
    if before.get(digest) != options[digest]:
        what = f"{options['captions']} has changed since this build"
        what += f" (its digest is {options[digest]}, then {before.get(digest)})"
    elif now[PICTURES] != finished.pictures:
        what = f"pictures in {options['images']} have changed since this build (their sizes or times)"
    else:
        what = f"its build was done with another folder of pictures than {options['images']}"
    raise UserError(f"{work.out}: {what}; rule: {_anew(work.out)}")
