"""Resuming at 90 % of an epoch of 30 million samples in 6,388 shards: time, files opened and bytes read until a sample.

The index is of the size of Merged30M: three sources with a summary each, and a table for each shard. All shards are
links to one shard, and all tables are links to its table, so that every shard is there. What a resumed run does is
measured: open the indexes, compute the place in the order, find the sample; then the same, and read and decode one
batch. The benchmark counts the index files opened (by an audit hook) and bytes: all that the process reads meanwhile
(/proc/self/io, on Linux), and every mapped file as if it were read whole.

A pass over one shard with webdataset takes turns with it. A loader without an index skips in this way what was seen: it
reads every sample and decodes none. The time is scaled up to 90 % of the epoch, for one reader; several readers share
it. The samples are tiny, and the bytes of real samples come on top.
"""

import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/seek.py`

import numpy as np
import webdataset
from PIL import Image

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.data.shards.index import index_shards, open_sources
from cosmos_scale.data.shards.reader import Location
from cosmos_scale.data.shards.summary import FORMAT, SUMMARY
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.merged import MERGED

SAMPLES = 4697  # a shard: 6,388 of them make 30 million
READ = 0.9
BATCH = 64  # samples of one rank


class Reached(NamedTuple):
    """The index files opened on the way to a sample, and the bytes read, mapped files counted whole."""

    opened: list[str]
    bytes_read: int


def write_index(folder: Path) -> Path:
    """Write the index files of all sources, and no shard; returns the one shard that they describe."""
    (folder / "one").mkdir()
    shard = _write_shard(folder / "one" / "shard.tar")
    index_shards(str(shard), None, workers=1, progress=False)
    for name, (_, shards) in MERGED.items():
        (folder / name).mkdir()
        stems = [f"{name.lower()}-{number:05d}" for number in range(shards)]
        for stem in stems:
            (folder / name / f"{stem}.index.npy").symlink_to(shard.with_suffix(".index.npy"))
        lines = ",\n".join(json.dumps([f"{stem}.tar", SAMPLES, shard.stat().st_size]) for stem in stems)
        (folder / name / SUMMARY).write_text(f'{{"format": {json.dumps(FORMAT)}, "shards": [\n{lines}\n]}}\n')
    return shard


def link_shards(folder: Path, shard: Path) -> None:
    """Put a shard beside each table."""
    for table in folder.glob("*/*-*.index.npy"):
        (table.parent / table.name.replace(".index.npy", ".tar")).symlink_to(shard)


def run_config(folder: Path) -> RunConfig:
    """Return a run over the sources, with small views: how long decoding takes is measured elsewhere."""
    sources = [{"name": name.lower(), "shards": str(folder / name)} for name in MERGED]
    views = {"local_crops": 1, "local_size": 16}
    return RunConfig.model_validate(
        {
            "model": {"vision": {"image_size": 32}},
            "data": {"sources": sources, "views": views, "workers": 0},
            "train": {"global_batch": BATCH},
        }
    )


def find_sample(config: RunConfig) -> Location:
    """Open the indexes and find the sample at 90 % of the third epoch, as a run does that begins there."""
    index = open_sources(config.data.sources)
    order = EpochOrder(index.source_shards(), config.seed, config.data.window)
    return index.locate(order.sample(2, int(READ * order.samples)))


def first_batch(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Open the indexes and make the batch at 90 % of the third epoch; returns its size."""
    loader = TrainLoader(config, open_sources(config.data.sources), tokenizer, 0, 1)
    with closing(loader.batches(2 * loader.steps_per_epoch + int(READ * loader.steps_per_epoch))) as batches:
        return len(next(batches).sample_ids)


def pass_over(shard: Path) -> int:
    """Read a shard's samples one after the other, as a loader does that skips them; returns their number."""
    return sum(1 for _ in webdataset.WebDataset(str(shard), shardshuffle=False))


def count(folder: Path, reach: Callable[[], object]) -> Reached:
    """Count the files under a folder that something opens, and the bytes that it reads."""
    reach()  # not counted: it loads modules, and fills the system's file cache
    with _audited(folder) as seen:
        before = _bytes_read()
        reach()
        read = _bytes_read() - before
    return Reached(seen().opened, read + seen().bytes_read)


def main() -> int:
    parser = argument_parser("seek", "Resuming at 90 % of 30 million samples.", ["", "--rounds 1"])
    parser.add_argument("--rounds", type=positive, default=5, help="of which the median is taken (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard = write_index(folder)
        config, tokenizer = run_config(folder), Tokenizer(77)
        reached = count(folder, lambda: find_sample(config))
        link_shards(folder, shard)
        sides: dict[str, Callable[[], object]] = {
            "sample": lambda: find_sample(config),
            "batch": lambda: first_batch(config, tokenizer),
            "pass": lambda: pass_over(shard),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, act in sides.items():
                start = time.perf_counter()
                act()
                seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    shards = sum(shards for _, shards in MERGED.values())
    skipped = medians["pass"] * shards * READ
    where = f"90 % of {shards * SAMPLES:,} samples in {shards:,} shards"
    rounds = f"median of {arguments.rounds}"
    figures = [
        Figure("seek_files", len(reached.opened), "openings", f"index files, to the sample at {where}"),
        Figure("seek_bytes", reached.bytes_read, "bytes", f"to the sample at {where}; mapped tables counted whole"),
        Figure("seek_sample", 1000 * medians["sample"], "ms", f"indexes, order, table: {where}; {rounds}"),
        Figure(
            "seek_batch", 1000 * medians["batch"], "ms", f"the same, and {BATCH} samples read and decoded; {rounds}"
        ),
        Figure("seek_pass_shard", 1000 * medians["pass"], "ms", f"webdataset over {SAMPLES:,} tiny samples; {rounds}"),
        Figure("seek_pass", skipped, "s", f"that times {READ:g} x {shards:,} shards: one reader, scaled up"),
    ]
    report("Resuming at 90 % of an epoch", figures, arguments.json)
    return 0


def _write_shard(path: Path) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    members = {"jpg": buffer.getvalue(), "json": json.dumps({"raw_caption": ["a square of noise"]}).encode()}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number in range(SAMPLES):
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def _bytes_read() -> int:
    """Return the bytes that this process has read so far through system calls, from any file."""
    status = Path("/proc/self/io").read_text(encoding="ascii")
    return int(status.partition("rchar: ")[2].partition("\n")[0])


@contextmanager
def _audited(folder: Path) -> Iterator[Callable[[], Reached]]:
    """Note files under a folder as they are opened, and the bytes of files as they are mapped.

    The hook stays, since hooks cannot be removed, and notes nothing afterwards.
    """
    opened: list[str] = []
    mapped = 0
    recording = True

    def note(event: str, arguments: Any) -> None:
        nonlocal mapped
        if recording and event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.append(str(Path(arguments[0]).relative_to(folder)))
        elif recording and event == "mmap.__new__":
            mapped += arguments[1] or os.fstat(arguments[0]).st_size

    sys.addaudithook(note)
    try:
        yield lambda: Reached(opened, mapped)
    finally:
        recording = False


if __name__ == "__main__":
    leave_after(main)
