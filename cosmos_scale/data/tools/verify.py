"""Every sample of indexed shards, read whole: which are damaged, where they lie, and why. `cosmos-scale data verify`.

A sample is sound if training would use it: its members lie where the index says, its picture decodes to the end and is
not too large, and its json has text for the sampling. Each shard's tar structure is compared with the shard's index:
where the shard breaks off, what the index leaves out, what the index names and the shard does not hold. The shard's
bytes are compared with the checksum that `data build` or `data prepare` noted in manifest.json, if there is one:
flipped bits of a JPEG often decode, to other pixels.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import DataConfig, RemoteConfig, SourceConfig
from cosmos_scale.data.decode.orientation import UPRIGHT, orientation_of
from cosmos_scale.data.decode.picture import decode_rgbx, is_animated, is_transparent
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.origin import describe_origin
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey
from cosmos_scale.data.shards.checksums import file_sha256, noted_checksums
from cosmos_scale.data.shards.index import SourceIndex, open_sources
from cosmos_scale.data.shards.members import ScanRules, holds_string
from cosmos_scale.data.shards.reader import Entry, OldIndex, ShardFile, ShardReader
from cosmos_scale.data.shards.scan import ShardScan, scan_shard
from cosmos_scale.data.shards.shared import describe_seen, describe_shared
from cosmos_scale.data.shards.store import Transient, fetch_into, is_remote
from cosmos_scale.data.tools.passes import Pass, begin_pass, opened_index
from cosmos_scale.data.tools.verdict import OLD_INDEX, Fault, Verdict
from cosmos_scale.data.work import MANIFEST
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, temporary_copy, whole_file, writing

SAMPLES_A_JOB = 128

# Said of a shard whose size is the index's: one of another size is refused before.
CHANGED = (
    f"bytes have changed since {MANIFEST} was written: the SHA-256 differs; rule: a shard stays as it was built, so "
    f"restore it, or build anew (where the change is meant, delete {MANIFEST})"
)


class _Job(NamedTuple):
    """Samples `first` to `last` of one shard of one source."""

    source: int
    shard: int
    first: int
    last: int


class _Checked(NamedTuple):
    """The faults of the job's samples. The first job of a shard adds the faults of the tar structure.

    unreadable: why the shard cannot be read.
    """

    job: _Job
    samples: list[Fault]
    structure: list[Fault]
    unreadable: Fault | None
    checksum: bool = False  # whether there was a checksum to compare with
    transparent: int = 0  # sound pictures with transparent pixels
    turned: int = 0  # sound pictures whose EXIF tag says to turn them
    unread: int = 0  # pictures that are not read, since their sample has another
    animated: int = 0  # sound pictures of several frames
    again: int = 0  # samples whose key another one before them in the shard has


def verify_shards(
    data: DataConfig,
    *,
    galleries: Sequence[SourceConfig] = (),
    log: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Verdict:
    """Read every sample of the sources; captions are drawn with the config's sampling, pictures up to its max_pixels.

    galleries: shards that evaluations read; a sample of theirs needs some text, whichever its key. log: file for all
    faults, one json object a line.
    Raises: UserError where an index is missing or unreadable or the log cannot be written.
    """
    read_alike = {(source.shards, source.index) for source in data.sources}
    more = [gallery for gallery in galleries if (gallery.shards, gallery.index) not in read_alike]
    trained = len(data.sources)
    data = data.model_copy(update={"sources": (*data.sources, *more)})
    indexes = open_sources(data.sources, data.remote).sources
    if shared := describe_shared(indexes[:trained]):
        print(f"warning: {shared}", file=sys.stderr)
    opened = {(source.shards, source.index): index for source, index in zip(data.sources, indexes, strict=True)}
    for gallery in galleries:
        index = opened[gallery.shards, gallery.index]
        if seen := describe_seen(indexes[:trained], [index.shard_file(shard) for shard in range(len(index.rows))]):
            print(f"warning: {gallery.name}: {seen}", file=sys.stderr)
    verdict = Verdict(
        shards=sum(len(index.rows) for index in indexes),
        samples=sum(row.samples for index in indexes for row in index.rows),
        size=sum(row.size for index in indexes for row in index.rows),
    )
    check = partial(_check, begin_pass(data), trained)
    with ExitStack() as stack:
        write = None if log is None else stack.enter_context(_open_log(log))
        advance = stack.enter_context(progress_bar("verifying samples", verdict.samples, show=progress))
        for _, shard in groupby(map_jobs(check, _jobs(indexes), workers), key=lambda checked: checked.job[:2]):
            parts = []
            for part in shard:
                parts.append(part)
                advance(part.job.last - part.job.first)
            lost = sum(part.job.last - part.job.first for part in parts if part.unreadable)
            if any(part.unreadable and part.unreadable.of_old_index for part in parts):
                verdict.outdated += lost
            else:
                verdict.unreadable += lost
            verdict.transparent += sum(part.transparent for part in parts)
            verdict.turned += sum(part.turned for part in parts)
            verdict.unread += sum(part.unread for part in parts)
            verdict.animated += sum(part.animated for part in parts)
            verdict.again += sum(part.again for part in parts)
            verdict.checksums += any(part.checksum for part in parts)
            for fault in _faults(parts):
                verdict.note(fault)
                if write is not None:
                    write(fault)
    return verdict


def _faults(parts: Sequence[_Checked]) -> Iterator[Fault]:
    """Yield the faults of one shard: first the shard's own, then each sample's once, by the samples' places."""
    unreadable = next((part.unreadable for part in parts if part.unreadable), None)
    if unreadable:
        yield unreadable
    structure = [fault for part in parts for fault in part.structure]
    yield from (fault for fault in structure if fault.key is None)
    samples = {(str(fault.key), fault.byte): fault for fault in structure if fault.key is not None}
    # The fault that reading found replaces the structure's: training would meet the former.
    samples.update({(str(fault.key), fault.byte): fault for part in parts for fault in part.samples})
    yield from sorted(samples.values(), key=lambda fault: fault.byte or 0)


@contextmanager
def _open_log(path: Path) -> Iterator[Callable[[Fault], None]]:
    """Yield a function that writes a fault to the log, which is there whole at the end, or not at all.

    Raises: UserError where the log cannot be written.
    """
    with ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
            # What is no plain file, such as /dev/stdout, is written to as it is.
            whole = path if path.exists() and not path.is_file() else stack.enter_context(whole_file(path))
            file = stack.enter_context(whole.open("w", encoding="utf-8"))

        def write(fault: Fault) -> None:
            with writing(path):
                file.write(json.dumps(fault.as_record()) + "\n")

        yield write
        with writing(path):
            stack.close()


def _refuse_foreign(path: Path) -> None:
    """Raise UserError where a file is there that is no log: a mistyped option must lose no shard or index."""
    if path.is_file():
        with open(path, "rb", opener=regular_only) as file:
            line = file.readline(1 << 20)
            if line and not (line.startswith(b'{"shard": ') and b', "indexed": ' in line):
                rule = "name another file with --out"
                raise UserError(f"{path}: holds something else than a report of `data verify`; {rule}")


def _jobs(indexes: Sequence[SourceIndex]) -> Iterator[_Job]:
    for source, index in enumerate(indexes):
        for shard, row in enumerate(index.rows):
            at_once = row.samples if is_remote(index.shard_file(shard).address) else SAMPLES_A_JOB
            for first in range(0, max(1, row.samples), max(1, at_once)):
                yield _Job(source, shard, first, min(first + at_once, row.samples))


@lru_cache(maxsize=1)
def _checksums(pass_: Pass) -> list[dict[str, str]]:
    """For each source, the SHA-256 of its shards by name, read once a process."""
    return [noted_checksums(Path(index.folder) / MANIFEST) for index in opened_index(pass_).sources]


def _check(pass_: Pass, trained: int, job: _Job) -> _Checked:
    """Do a job. trained: how many sources are trained on; all behind them are galleries."""
    index = opened_index(pass_).sources[job.source]
    row, file = index.rows[job.shard], index.shard_file(job.shard)
    checksum = _checksums(pass_)[job.source].get(row.name)
    structure: list[Fault] = []
    unread = again = 0
    try:
        _require_table(index, job.shard)
        with _here(file, pass_.data.remote) as local:
            if job.first == 0:
                structure, unread, again = _compare(index, job.shard, local, pass_.data.captions.keys or ())
            if job.first == 0 and checksum is not None and checksum != file_sha256(local.address):
                structure.append(Fault(file.shown, None, None, CHANGED, indexed=True))
            try:
                read = _read(pass_.data, index, job, local, gallery=job.source >= trained)
            except OldIndex as error:
                # A shard that is cut off has another size too, but is damaged.
                if job.first == 0 and scan_shard(local.address, local.shown, rules=ScanRules()).torn is None:
                    raise UserError(f"{OLD_INDEX}: {str(error).removeprefix(f'{file.shown}: ')}") from error
                raise
    except UserError as error:  # the shard or its table is missing, or is not the one that was indexed
        reason = str(error).removeprefix(f"{file.shown}: ").removeprefix(f"shard of source {index.name} ")
        return _Checked(job, [], [], Fault(file.shown, None, None, reason, indexed=True))
    return _Checked(
        *(job, read.faults, structure, None, checksum is not None, read.transparent, read.turned, unread),
        *(read.animated, again),
    )


def _require_table(index: SourceIndex, shard: int) -> None:
    """Raise UserError where a shard's table is missing; to read the table would be to wait for its return."""
    path = index.table_path(shard)
    if not is_remote(path) and not os.path.lexists(path):
        missing = f"its index {path} cannot be read: {os.strerror(errno.ENOENT)}"
        raise UserError(f"{missing}; run `cosmos-scale data index`")


@contextmanager
def _here(file: ShardFile, remote: RemoteConfig) -> Iterator[ShardFile]:
    """A shard as a file of this machine: a shard from elsewhere is fetched whole into a temporary file."""
    if not is_remote(file.address):
        yield file
        return
    with temporary_copy() as copy, open(copy.name, "r+b") as writable:
        try:
            fetch_into(writable, file.address, remote)
        except Transient as failure:
            raise UserError(f"{file.shown}: cannot be read: {failure}") from failure
        yield file._replace(address=copy.name)


class _Read(NamedTuple):
    """The faults of samples that were read; how many sound pictures are transparent, turned by their tag, animated."""

    faults: list[Fault]
    transparent: int
    turned: int
    animated: int


def _read(data: DataConfig, index: SourceIndex, job: _Job, local: ShardFile, *, gallery: bool) -> _Read:
    """Read a job's samples as training or evaluation does; raises UserError where the shard is missing or stale."""
    faults: list[Fault] = []
    transparent = turned = animated = 0
    with closing(ShardReader()) as reader:
        reader.check([local])  # fails at once where the shard is missing; reading would wait for its return
        for place in range(job.first, job.last):
            location = index.locate(job.shard, place)._replace(file=local)
            origin = None
            try:
                image_bytes, document = reader.read(location)
                origin = describe_origin(document)
                if not gallery:
                    draw_captions(data.captions, document, SampleKey(0, 0, place))
                elif not holds_string(document):
                    raise DamagedSample(f"empty text: no string in its {location.entry.text_kind}")
                decode_rgbx(image_bytes, data.max_pixels)
                transparent += is_transparent(image_bytes, data.max_pixels)
                turned += orientation_of(image_bytes) != UPRIGHT
                animated += is_animated(image_bytes, data.max_pixels)
            except DamagedSample as damage:
                entry = location.entry
                faults.append(Fault(local.shown, entry.key, entry.start, str(damage), indexed=True, origin=origin))
    return _Read(faults, transparent, turned, animated)


def _scan_as_indexed(local: ShardFile, indexed: Mapping[str, Entry], captions: tuple[str, ...]) -> ShardScan:
    """Scan a shard by the rule for keys with dots that its index was made by; the index does not say which it was."""
    scan = scan_shard(local.address, local.shown, rules=ScanRules(captions))
    if indexed.keys() <= {entry.key for entry in scan.entries}:
        return scan
    by_last_dot = scan_shard(local.address, local.shown, rules=ScanRules(captions, last_dot=True))
    known = [len(indexed.keys() & {entry.key for entry in found.entries}) for found in (scan, by_last_dot)]
    return by_last_dot if known[1] > known[0] else scan


def _compare(
    index: SourceIndex, shard: int, local: ShardFile, captions: tuple[str, ...]
) -> tuple[list[Fault], int, int]:
    """Walk a shard's headers and compare what they say with its index.

    Also count pictures that are not read, and samples of the index whose key another one before them has.
    """
    row, path = index.rows[shard], local.shown
    indexed: dict[str, Entry] = {}
    for place in range(row.samples):
        entry = index.locate(shard, place).entry
        indexed[entry.key] = entry
    scan = _scan_as_indexed(local, indexed, captions)
    if scan.size != row.size:
        # The size differs. `_read` reports this, and the index's offsets mean nothing now.
        return [], 0, 0
    faults = [Fault(path, None, None, scan.torn, indexed=True)] if scan.torn else []
    found = {entry.key: entry for entry in scan.entries}
    for rejected in scan.rejected:
        known = rejected.key in indexed and indexed[rejected.key].start == rejected.byte
        faults.append(Fault(path, rejected.key, rejected.byte, rejected.reason, indexed=known))
    named = {fault.key for fault in faults}
    for key, entry in indexed.items():
        if key in found and entry != found[key]:
            faults.append(Fault(path, key, entry.start, "the index places it elsewhere", indexed=True))
        elif key not in found and key not in named and scan.torn is None:
            faults.append(Fault(path, key, entry.start, "in the index but not in the shard", indexed=True))
    for key, entry in found.items():
        if key not in indexed:
            faults.append(Fault(path, key, entry.start, "in the shard but not in the index", indexed=False))
    return faults, len(scan.unread), row.samples - len(indexed)
