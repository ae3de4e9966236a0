"""Samples a second of the whole training loader with 0, 1, 2, ... worker processes, and what a batch's handover costs.

Shards of 256 photos of about 0.24 megapixels with DreamLIP's captions, batches of 32 samples with 2 views of 224 and 6
of 96 pixels; batches are thrown away. The numbers of workers take turns in every round, so that other programs slow all
of them alike. Timing starts at a batch by which all workers are busy. The handover is timed in one process: the work of
a worker that sends a finished batch. A batch in our shared block needs little work. The same block in a worker's own
memory is timed for comparison: it is copied into shared memory when it is sent.
"""

import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/loader_workers.py`

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode.blocks import TensorBlock
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.data.shards.index import index_shards, open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.worker import Loaded
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.photos import PIXELS, caption_documents, jpeg_photos

PHOTOS, SHARDS, BATCH, ROUNDS = 256, 4, 32, 5
BATCHES = 4  # timed batches for each worker
HANDOVERS = 20


class Handover(NamedTuple):
    """Sending one batch: the bytes of its block and of the message about it; milliseconds in place and with a copy."""

    block_bytes: int
    message_bytes: int
    milliseconds: float
    copied_milliseconds: float


def write_photos(folder: Path, photos: int) -> None:
    """Write indexed shards of photos."""
    samples = list(zip(jpeg_photos(photos), caption_documents(photos), strict=True))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard, photos, SHARDS):
                photo, document = samples[number]
                for extension, content in (("jpg", photo), ("json", json.dumps(document).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    index_shards(str(folder), None, workers=1, progress=False)


def config_of(folder: Path, workers: int, batch: int) -> RunConfig:
    """Return a run that reads a folder's shards."""
    source = {"name": "photos", "shards": str(folder)}
    sections = {"data": {"sources": [source], "workers": workers, "prefetch": 2}, "train": {"global_batch": batch}}
    return RunConfig.model_validate(sections)


def samples_per_second(config: RunConfig) -> float:
    """Start a loader, wait until its workers are busy, and return its samples a second."""
    workers = max(1, config.data.workers or 0)
    loader = TrainLoader(config, open_sources(config.data.sources), Tokenizer(config.model.text.context_length), 0, 1)
    with closing(loader.batches(0)) as batches:
        _drop(batches, 2 * workers)
        start = time.perf_counter()
        _drop(batches, BATCHES * workers)
        seconds = time.perf_counter() - start
    return BATCHES * workers * config.train.global_batch / seconds


def _drop(batches: Iterator[object], count: int) -> None:
    for _ in islice(batches, count):
        pass


def handover(config: RunConfig) -> Handover:
    """Time and count what a worker sends of a batch, in place and with a copy in turns."""
    loader = TrainLoader(config, open_sources(config.data.sources), Tokenizer(config.model.text.context_length), 0, 1)
    with closing(loader.batches(0)) as batches:
        tensors = list(next(batches))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    block_bytes = message_bytes = 0
    for _ in range(HANDOVERS):
        for shared in seconds:
            loaded = Loaded(TensorBlock.of(tensors, shared=shared))  # a new one: a block that was sent stays shared
            assert loaded.block is not None
            start = time.perf_counter()
            message = ForkingPickler.dumps(loaded)
            seconds[shared].append(time.perf_counter() - start)
            block_bytes, message_bytes = loaded.block.memory.nbytes, len(message)
    in_place, copied = (1000 * statistics.median(seconds[shared]) for shared in (True, False))
    return Handover(block_bytes, message_bytes, in_place, copied)


def numbers_of_workers(most: int) -> list[int]:
    """Return 0, 1, 2, 4, ... up to `most`, and `most`."""
    return sorted({0, *(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def figures(photos: int, batch: int, most: int, rounds: int) -> list[Figure]:
    """Measure all numbers of workers up to `most`; speeds are medians of rounds."""
    torch.set_num_threads(1)  # as in a worker
    counts = numbers_of_workers(most)
    speeds: dict[int, list[float]] = {workers: [] for workers in counts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, photos)
        with progress_bar("rounds", rounds, show=True) as advance:
            for _ in range(rounds):
                for workers in counts:
                    speeds[workers].append(samples_per_second(config_of(folder, workers, batch)))
                advance(1)
        sent = handover(config_of(folder, 0, batch))
    medians = {workers: statistics.median(values) for workers, values in speeds.items()}
    setting = f"{photos} photos of {PIXELS / 1e6:g} MP, batches of {batch}, medians of {rounds} rounds in turns"
    scaling = (
        statistics.median(of_most / of_one for of_most, of_one in zip(speeds[most], speeds[1], strict=True)) / most
    )
    return [
        *(
            Figure(
                f"loader_workers_{workers}_samples_per_second",
                speed,
                "samples/s",
                f"{workers} workers, {speed / max(1, workers):.4g} each; {setting}",
            )
            for workers, speed in medians.items()
        ),
        Figure("loader_workers_scaling", scaling, "of linear", f"{most} workers beside {most} times 1; {setting}"),
        Figure("loader_handover_mb", sent.block_bytes / 1e6, "MB", f"of one batch of {batch}, in shared memory"),
        Figure("loader_handover_message_bytes", sent.message_bytes, "bytes", "sent through the queue for it"),
        Figure("loader_handover_ms", sent.milliseconds, "ms", f"to send a batch, medians of {HANDOVERS}"),
        Figure("loader_handover_copied_ms", sent.copied_milliseconds, "ms", "the same from a worker's own memory"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    cores = len(os.sched_getaffinity(0))
    parser = argument_parser("loader_workers", (__doc__ or "").partition("\n")[0], ("", "--most 2 --rounds 3"))
    parser.add_argument("--photos", type=positive, default=PHOTOS, metavar="N", help=f"photos; default: {PHOTOS}")
    parser.add_argument("--batch", type=positive, default=BATCH, metavar="N", help=f"samples a batch; default: {BATCH}")
    parser.add_argument("--most", type=positive, default=cores, metavar="N", help="most workers; default: the cores")
    parser.add_argument(
        "--rounds", type=positive, default=ROUNDS, metavar="N", help=f"measured rounds; default: {ROUNDS}"
    )
    arguments = parser.parse_args(argv)
    rows = figures(arguments.photos, arguments.batch, arguments.most, arguments.rounds)
    report("The loader by number of worker processes", rows, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
