"""The index of shards: how many samples each holds, and where each sample lies.

An index lies in one folder, beside the shards or elsewhere. `index.json` has one line a shard, with the shard's name,
samples and bytes: the order of the data needs no more. For each shard there is a `.index.npy`, a table of its samples,
which is memory-mapped when a sample of the shard is first asked for. So any position of a large dataset costs one small
file and a page or two.
"""

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.config import RemoteConfig, SourceConfig
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.samples.sample import UnreachableShard, reason_class
from cosmos_scale.data.shards.checksums import gone_shards
from cosmos_scale.data.shards.index_report import IndexReport, Unindexed, count_unindexed, key_hints, write_faults
from cosmos_scale.data.shards.members import DEFAULT_RULES, ScanRules
from cosmos_scale.data.shards.patterns import ShardPattern, parse_pattern, passed_over
from cosmos_scale.data.shards.reader import MARKED, Folders, Location, ShardFile, ShardReader
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.shards.store import Transient, is_remote, join_url, redact
from cosmos_scale.data.shards.summary import (
    SUMMARY,
    ShardRow,
    Summary,
    alike_shards,
    lacks_summary,
    read_index_summary,
    summary_before,
    write_index_summary,
)
from cosmos_scale.data.shards.table import (
    SampleTable,
    entry_of,
    open_table,
    pack_table,
    refuse_one_table,
    table_digest,
    table_name,
)
from cosmos_scale.data.shards.unfinished import IndexedShard, Unfinished
from cosmos_scale.data.work import refuse_unfinished
from cosmos_scale.errors import UserError
from cosmos_scale.files import make_folder, make_output_folder, replace_file, whole_path
from cosmos_scale.words import counted

UNFINISHED = "unfinished.jsonl"
_OPEN_TABLES = 64  # memory-mapped tables kept per process


def index_shards(
    pattern: str,
    out: Path | None,
    *,
    rules: ScanRules = DEFAULT_RULES,
    finishing: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> IndexReport:
    """Index the shards of a folder or a glob or brace pattern, without repacking them.

    Shards at a URL or from a command are read once, each through a temporary file. Where the reading breaks off, the
    next call goes on after the shards that are done.
    out: folder of the index; default: the folder of the shards. If the folder has an index already, shards in it that
    the pattern does not mean stay in it. Unusable samples and torn shards are named in `rejected.jsonl`;
    where no sample is left and an index is there, which stays, they are named in `rejected.refused.jsonl`.
    finishing: whether this is the last step of the work that makes the shards; other callers get no unfinished shards.
    Raises: UserError where there is no shard, a shard is compressed or unreadable, no sample is left, the shards are
    not on this machine and `out` is not given, or the folder has the index of other shards.
    """
    shards = parse_pattern(pattern)
    if out is None and is_remote(pattern):
        raise UserError(f"--out: must name a folder of this machine for the index, since {shards.shown} is none")
    names = shards.list_names()
    if not finishing:
        refuse_unfinished(_local_folders(shards, names))
    if not names:
        where = shards.shown if is_remote(pattern) else whole_path(pattern)
        others_there = passed_over(pattern, names)
        raise UserError(f"{where}: no .tar shards match{f'; it holds {others_there[0]}' if others_there else ''}")
    folder = Path(str(shards.folder)) if out is None else out
    if out is None and folder.resolve() == Path.cwd() and any(os.path.dirname(name) for name in names):
        raise UserError(f"--out: must name a folder for the index: {shards.shown} means shards in several folders")
    make_output_folder(folder)
    before = summary_before(folder)
    _require_own_shards(before, folder, shards, names)
    others = [row for row in before.rows if row.name not in names and _may_exist(shards.address(row.name))]
    refuse_one_table([*names, *(row.name for row in others)], shards.show)
    marks = {row.name: before.marks[row.name] for row in others if row.name in before.marks}
    rows: list[ShardRow] = []
    faults: list[dict[str, str | None]] = []
    torn, rejected, counts, texts = 0, Counter[str](), Counter[str](), Counter[str]()
    unfinished = Unfinished(folder / UNFINISHED, rules, shards.address) if is_remote(pattern) else None
    known = unfinished.read(names) if unfinished else {}
    work = map_jobs(partial(_index_one, shards, folder, rules), [name for name in names if name not in known], workers)
    with progress_bar("indexing shards", len(names), show=progress) as advance:
        for done in chain(known.values(), work):
            # Not a shard that breaks off: a server may have sent a page of its own, or less than the whole.
            if unfinished and done.name not in known and done.torn is None:
                unfinished.append(done)
            rows.append(ShardRow(done.name, done.samples, done.size))
            counts.update(dotted=done.dotted, unnamed=done.unnamed, unread=len(done.unread), again=len(done.again))
            texts.update(dict(done.texts))
            marks[done.name] = done.mark
            rejected.update(reason_class(reason) for _, reason in done.rejected)
            named = [*done.rejected, *done.unread, *done.again]
            faults += [{"shard": done.name, "key": key, "reason": reason} for key, reason in named]
            if done.torn is not None:
                torn += 1
                faults.append({"shard": done.name, "key": None, "reason": done.torn})
            advance(1)
    samples = sum(row.samples for row in rows)
    noted = write_faults(folder, set(names), faults, refused=bool(before.rows) and not samples)
    if samples == 0:
        raise UserError(
            f"{shards.shown}: no usable sample in {counted(len(names), 'shard')}"
            f"{f'; see {noted}' if faults else ''}"
            f"{''.join(f'; {hint}' for hint in key_hints(rejected))}"
        )
    for row in (row for row in rows if row.samples == 0):  # a refusal leaves the tables of an earlier index
        replace_file(folder / table_name(row.name), pack_table([]))
    write_index_summary(folder / SUMMARY, Summary(sorted([*others, *rows]), marks))
    if unfinished:
        unfinished.remove()
    gone = [] if finishing else gone_shards(shards, names, before.rows)
    found = alike_shards(rows, marks), passed_over(pattern, names), gone
    dotted, unnamed, unread, again = (counts[kind] for kind in ("dotted", "unnamed", "unread", "again"))
    return IndexReport(folder, len(rows), samples, rejected, torn, dotted, unnamed, unread, *found, again, texts)


class SourceShards(NamedTuple):
    """What the order of the data needs of a source: the samples in each shard, [shards] int64, and the weight."""

    samples: NDArray[np.int64]
    weight: float = 1.0

    @property
    def visits(self) -> int:
        """Visits to this source in an epoch: weight x samples, rounded, and one at least."""
        return max(1, round(self.weight * int(self.samples.sum())))


class SourceIndex:
    """The index of one source: its shards, and the tables of the shards that were asked for.

    folder: where the tables lie, a path or URL. marks: by shards' names, of shards that have one. remote: how often to
    try again; None: do not wait for missing files.
    """

    def __init__(
        self,
        name: str,
        shards: ShardPattern,
        folder: str,
        rows: Sequence[ShardRow],
        marks: Mapping[str, str],
        weight: float = 1.0,
        remote: RemoteConfig | None = None,
    ) -> None:
        self.name = name
        self.shards = shards
        self.folder = folder
        self.rows = rows
        self.marks = marks
        self.weight = weight  # see training.order.EpochOrder
        self._remote = remote
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()
        self._files: dict[int, ShardFile] = {}

    def locate(self, shard: int, place: int) -> Location:
        """Say where the sample at one place of one shard lies.

        Raises: UnreachableShard where the shard's table cannot be read after all retries; UserError where the table
        does not fit the summary.
        """
        entry = entry_of(self._table(shard), place)  # opening the table completes what is known of the shard
        return Location(self.shard_file(shard), entry)

    def shard_file(self, shard: int) -> ShardFile:
        """Say where a shard lies."""
        if shard not in self._files:
            name, _, size = self.rows[shard]
            shown, address = self.shards.show(name), self.shards.address(name)
            self._files[shard] = ShardFile(self.name, shown, size, address, self.marks.get(name, ""))
        return self._files[shard]

    def table_path(self, shard: int) -> str:
        """Say where a shard's table lies, a path or URL."""
        return _place(self.folder, table_name(self.rows[shard].name))

    def _table(self, shard: int) -> SampleTable:
        table = self._tables.get(shard)
        if table is None:
            row, path, file = self.rows[shard], self.table_path(shard), self.shard_file(shard)
            try:
                table = open_table(path, self._remote)
            except Transient as failure:
                reason = f"its index {redact(path)} cannot be read: {failure}; run `cosmos-scale data index`"
                raise UnreachableShard(file.source, file.shown, reason) from failure
            if len(table) != row.samples:
                raise UserError(
                    f"{redact(path)}: holds {counted(len(table), 'sample')}, but {SUMMARY} says {row.samples}; "
                    "run `cosmos-scale data index` again"
                )
            self._tables[shard] = table
            if is_remote(file.address):
                self._files[shard] = file._replace(table=table_digest(table))
            if len(self._tables) > _OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return table


class MergedIndex:
    """The samples of all sources, one after the other; a sample's id is its position among them.

    shard_samples: [shards] int64, the samples of every shard of every source.
    """

    def __init__(self, sources: Sequence[SourceIndex]) -> None:
        self.sources = sources
        self._shards = [(source, shard) for source in sources for shard in range(len(source.rows))]
        self.shard_samples = np.array([row.samples for source in sources for row in source.rows], dtype=np.int64)
        self._ends = np.cumsum(self.shard_samples)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def shard_files(self) -> Iterator[ShardFile]:
        """Yield where every shard lies, in the order of `shard_samples`."""
        return (source.shard_file(shard) for source, shard in self._shards)

    def check_tables(self, shards: Iterable[int]) -> None:
        """Raise UserError where this machine lacks the table of a shard, given by its place in `shard_samples`.

        MARKED tables of this machine at most, spread over all, are opened: a table may be cut off.
        """
        folders = Folders()
        wanted = [self._shards[place] for place in shards]
        every = -(-len(wanted) // MARKED)
        for place, (source, shard) in enumerate(wanted):
            path = source.table_path(shard)
            try:
                if not is_remote(path):
                    folders.require(path)
                    if place % every == 0 and source.rows[shard].samples:
                        source.locate(shard, 0)
            except OSError as error:
                rule = "run `cosmos-scale data index`"
                raise UserError(f"{path}: index cannot be read: {error.strerror or error}; {rule}") from error

    @property
    def epoch_samples(self) -> int:
        """Visits in an epoch: as many as there are samples, unless a source has a weight other than 1."""
        return sum(source.visits for source in self.source_shards())

    def source_shards(self) -> list[SourceShards]:
        """Return what the order of the data needs of every source."""
        return [
            SourceShards(np.array([row.samples for row in source.rows], dtype=np.int64), source.weight)
            for source in self.sources
        ]

    def locate(self, sample: int) -> Location:
        """Say where a sample lies, by its id.

        Raises: IndexError past the end, and what SourceIndex.locate raises.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        position = int(np.searchsorted(self._ends, sample, side="right"))
        source, shard = self._shards[position]
        return source.locate(shard, sample - int(self._ends[position] - self.shard_samples[position]))

    def unindexed(self) -> Unindexed:
        """Count what indexing left out of the shards, or took twice, as far as files of this machine tell."""
        counts = [count_unindexed(source.folder, {row.name for row in source.rows}) for source in self.sources]
        return Unindexed(*map(sum, zip(*counts, strict=True)))

    def fingerprint(self) -> str:
        """Return a digest of all that the order of the data depends on: the shards' names, sizes and counts."""
        rows = [[source.name, *row] for source in self.sources for row in source.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def open_index(source: SourceConfig, remote: RemoteConfig | None = None) -> SourceIndex:
    """Open the index of one source; reads its summary only.

    remote: see SourceIndex.
    Raises: UserError where the index is missing or unreadable, has no sample, or lacks shards that the pattern means.
    """
    shards = parse_pattern(source.shards)
    folder = shards.folder if source.index is None else source.index
    out = f" --out {'DIR' if source.index is None else redact(source.index)}"
    hint = f"run `cosmos-scale data index '{shards.shown}'{out if source.index or is_remote(source.shards) else ''}`"
    if folder is None:
        raise UserError(f"data source {source.name}: {shards.shown}: needs index, the folder of its index; {hint}")
    names, missing = shards.known_names()
    refuse_unfinished(_local_folders(shards, names))
    summary = _place(folder, SUMMARY)
    if not is_remote(folder) and lacks_summary(summary):
        if not names and not is_remote(source.shards):
            raise UserError(f"data source {source.name}: no .tar shards match {whole_path(source.shards)}")
        raise UserError(f"data source {source.name}: no index at {whole_path(summary)}; {hint}")
    means = shards.means()
    known = read_index_summary(summary, remote)
    rows = [row for row in known.rows if means(row.name)]
    # A shard that is named in full and indexed may be out of reach for now. Reading the shard would say so.
    unknown = sorted({*names, *missing} - {row.name for row in rows})
    if unknown:
        raise UserError(
            f"data source {source.name}: {counted(len(unknown), 'shard is', 'shards are')} not in {redact(summary)}, "
            f"the first is {unknown[0]}; {hint}"
        )
    if not any(row.samples for row in rows):
        raise UserError(f"data source {source.name}: no shard in {redact(summary)} matches {shards.shown}")
    return SourceIndex(source.name, shards, folder, rows, known.marks, source.weight, remote)


def open_sources(sources: Iterable[SourceConfig], remote: RemoteConfig | None = None) -> MergedIndex:
    """Open the indexes of all sources as one.

    remote: see SourceIndex.
    Raises: UserError where there is no source, and what `open_index` raises.
    """
    merged = MergedIndex([open_index(source, remote) for source in sources])
    if not merged.sources:
        raise UserError("data.sources is empty; name at least one source of shards")
    return merged


def _local_folders(shards: ShardPattern, names: Iterable[str]) -> list[Path]:
    """The folders of this machine that some shards, or those that a pattern will mean, lie in."""
    folders = {os.path.dirname(address) for address in map(shards.address, names) if not is_remote(address)}
    if shards.folder is not None and not is_remote(str(shards.folder)):
        folders.add(str(shards.folder))
    return [Path(folder) for folder in sorted(folders)]


def _index_one(shards: ShardPattern, folder: Path, rules: ScanRules, name: str) -> IndexedShard:
    """Scan one shard and write its table, unless the table is empty."""
    scan = scan_shard(shards.address(name), shards.show(name), rules=rules)
    path = folder / table_name(name)
    make_folder(path.parent)
    if scan.entries:
        replace_file(path, pack_table(scan.entries))
    lists = (scan.rejected, scan.unread, scan.again)
    rejected, unread, again = ([(fault.key, fault.reason) for fault in faults] for faults in lists)
    dotted = sum("." in entry.key.rpartition("/")[2].lstrip(".") for entry in scan.entries)
    of_file = (name, len(scan.entries), scan.size)
    return IndexedShard(*of_file, rejected, scan.torn, dotted, scan.unnamed, scan.mark, unread, again, scan.texts)


def _place(folder: str, name: str) -> str:
    return join_url(folder, name) if is_remote(folder) else str(Path(folder) / name)


def _may_exist(address: str) -> bool:
    return is_remote(address) or os.path.exists(address)


def _require_own_shards(before: Summary, folder: Path, shards: ShardPattern, names: Sequence[str]) -> None:
    """Raise UserError where the index in a folder, which does not lie beside the shards, is of other shards.

    Other shards: those of the same names differ, all of them; or no shard of the index is there.
    """
    beside = None if shards.folder is None or is_remote(shards.folder) else os.path.realpath(shards.folder)
    if beside == os.path.realpath(folder):
        return
    index = SourceIndex("index", shards, str(folder), before.rows, before.marks)
    wanted, differ = set(names), 0
    with closing(ShardReader(RemoteConfig(retries=0))) as reader:
        for place, row in enumerate(before.rows):
            if row.name not in wanted:
                if _may_exist(shards.address(row.name)):
                    return
            elif row.name not in before.marks or reader.is_same(index.shard_file(place)):
                return
            else:
                differ += 1
    if before.rows:
        held = (
            f"{counted(differ, 'shard')} of the same names" if differ else f"other shards ({before.rows[0].name}, ...)"
        )
        raise UserError(
            f"{folder}: has the index of {held} and other content; rule: an index belongs to its shards, so name "
            f"another folder with --out, or delete {SUMMARY} there if these are the same shards, changed"
        )
