"""Shards that two sources of a run have in common, or training and an evaluation: a warning, since it may be meant."""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from itertools import combinations

from cosmos_scale.data.shards.index import SourceIndex
from cosmos_scale.data.shards.reader import ShardFile
from cosmos_scale.data.shards.store import is_remote
from cosmos_scale.words import counted


def describe_shared(sources: Sequence[SourceIndex]) -> str:
    """Return one line on the shards that several sources read, by whichever paths or links; empty where there is none.

    Only shards of one size and one mark are looked at on the disk. Shards elsewhere are told by their addresses.
    """
    shared: dict[tuple[int, int], list[ShardFile]] = defaultdict(list)
    for alike in _alike(sources):
        readers: dict[Hashable, dict[int, ShardFile]] = defaultdict(dict)
        for source, file in alike:
            readers[_identity(file)].setdefault(source, file)
        for files_by_source in readers.values():
            for pair in combinations(sorted(files_by_source), 2):
                shared[pair].append(files_by_source[pair[1]])
    if not shared:
        return ""
    (one, other), files = min(shared.items(), key=lambda item: item[0])
    more = f" (and {counted(len(shared) - 1, 'more pair')} of sources)" if len(shared) > 1 else ""
    return (
        f"data sources {sources[one].name} and {sources[other].name} have {counted(len(files), 'shard')} in common, "
        f"such as {files[0].shown}{more}: an epoch visits their samples once for each source; rule: name shards once, "
        "with a weight for more visits, unless this is meant"
    )


def describe_seen(trained: Sequence[SourceIndex], evaluated: Sequence[ShardFile]) -> str:
    """Return what to say of an evaluation whose shards a run trains on, links and copies too; empty without one.

    Only shards of one size are compared. A copy is told by its mark, the digest of its first bytes.
    """
    sizes = {file.size for file in evaluated}
    alike = [
        source.shard_file(shard)
        for source in trained
        for shard, row in enumerate(source.rows)
        if row.samples and row.size in sizes
    ]
    places, marks = {_identity(file) for file in alike}, {(file.size, file.mark) for file in alike if file.mark}
    seen = [file for file in evaluated if (file.size, file.mark) in marks or _identity(file) in places]
    if not seen:
        return ""
    return (
        f"reads {counted(len(seen), 'shard')} that the run trains on, such as {seen[0].shown}: its "
        "numbers are of samples seen in training; rule: evaluate on shards held out, unless this is meant"
    )


def _alike(sources: Sequence[SourceIndex]) -> Iterator[list[tuple[int, ShardFile]]]:
    """Yield shards of one size, mark and number of samples, with their sources' positions, if of several sources."""
    groups: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for position, source in enumerate(sources):
        for shard, row in enumerate(source.rows):
            groups[row.size, row.samples, source.marks.get(row.name, "")].append((position, shard))
    for group in groups.values():
        if len({position for position, _ in group}) > 1:
            yield [(position, sources[position].shard_file(shard)) for position, shard in group]


def _identity(file: ShardFile) -> Hashable:
    """Return what tells a shard from others: its place on a disk, else its address."""
    if not is_remote(file.address):
        with suppress(OSError):  # a shard that is away is told of elsewhere
            status = os.stat(file.address)
            return status.st_dev, status.st_ino
    return file.address
