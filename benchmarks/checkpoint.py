"""What checkpoints cost a run: how long the step that asks for one stalls, and how much slower the steps beside it are.

The benchmark trains in one process, on random samples, and saves with the trainer's own writer. The stall is compared
with a plain copy of as many bytes from memory to memory; stalls and copies take turns.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/checkpoint.py`

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.checkpoint.files import TensorFile
from cosmos_scale.checkpoint.state import RunState, checkpoint_name, load_checkpoint, newest, read_manifest
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.step import train_step
from cosmos_scale.testing.batches import random_batch

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "run"
MODELS = {"vitb16": ("ViT-B/16", "cc3m_vitb16.yaml"), "tiny": ("the demo's model", "demo.yaml")}
PIECE = 1 << 27  # floats that the plain copy moves at a time: two buffers of half a gigabyte, larger than any cache


class Training:
    """A run's student and teacher, which take steps on the same batch again and again."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.pair = drawn_pair(config, ranks)
        self._loss = CosmosLoss(config.optimizer.gradient_scale)
        length = config.model.text.context_length  # captions of full length
        lengths = [(length, length)] * config.data.captions.count
        batch = random_batch(config.model, config.data.views, config.train.global_batch, lengths)
        self._batch = batch.to(ranks.device)

    def step(self) -> float:
        """Take a step; returns its seconds."""
        synchronize()
        start = time.perf_counter()
        train_step(*self.pair, self._loss, self._batch, lr=1e-4, momentum=0.99)
        synchronize()
        return time.perf_counter() - start


class Times(NamedTuple):
    """Seconds of each round. writes: from the start of a save until the checkpoint is whole, without steps beside."""

    copies: list[float]
    stalls: list[float]
    writes: list[float]
    steps: list[float]
    steps_beside: list[float]
    loads: list[float]
    verifications: list[float]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PlainCopy:
    """Copies as many bytes as a checkpoint has, from one place in memory to another; on a GPU, to pinned memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._floats = size // 4
        count = min(self._floats, PIECE)
        self._source = torch.ones(count, device=device)
        self._target = torch.zeros(count, pin_memory=device.type == "cuda").fill_(0.0)  # touches its pages

    def seconds(self) -> float:
        """Copy once and return the seconds; a checkpoint larger than the buffers is copied buffer by buffer."""
        synchronize()
        start = time.perf_counter()
        left = self._floats
        while left > 0:
            count = min(left, len(self._source))
            self._target[:count].copy_(self._source[:count], non_blocking=True)
            left -= count
        synchronize()
        return time.perf_counter() - start


def measure(training: Training, config: RunConfig, ranks: Ranks, root: Path, rounds: int) -> tuple[Times, int]:
    """Take all times in turn; returns them and the bytes of a checkpoint's tensors."""
    student = training.pair.student
    size = sum(16 * fragment.weight.numel() for fragment in student.fragments if fragment.owned)
    copy = PlainCopy(size, ranks.device)
    times = Times(*([] for _ in Times._fields))
    plain = config.model_dump(mode="json")
    training.step()  # allocates what steps need
    with CheckpointWriter(root, student.fragments, ranks.control, config.checkpoint) as writer:

        def save(step: int) -> None:
            synchronize()
            start = time.perf_counter()
            writer.save(RunState(step, step, student.updates, 1, student.layout.loss_scaler(), "random", plain))
            synchronize()  # a GPU's next step waits for the copies
            times.stalls.append(time.perf_counter() - start)

        save(0)  # not counted: it makes the folder, and touches the copies' memory again
        writer.wait()
        times.stalls.clear()
        for number in range(1, rounds + 1):
            times.copies.append(copy.seconds())
            start = time.perf_counter()
            save(2 * number)
            writer.wait()
            times.writes.append(time.perf_counter() - start)
            times.copies.append(copy.seconds())
            times.steps.append(training.step())
            save(2 * number + 1)
            unfinished = (root / checkpoint_name(2 * number + 1)).with_suffix(".tmp")
            while True:
                seconds = training.step()
                times.steps_beside.append(seconds)
                if not unfinished.exists():
                    break
            writer.wait()
        for _ in range(2):
            folder = newest(root)
            assert folder is not None
            start = time.perf_counter()
            load_checkpoint(folder, student.fragments)
            times.loads.append(time.perf_counter() - start)
            start = time.perf_counter()
            for record in read_manifest(folder).files.values():
                file = TensorFile(folder, record)
                file.verify()
                file.close()
            times.verifications.append(time.perf_counter() - start)
    return times, size


def main() -> int:
    parser = argument_parser(
        "checkpoint", __doc__ or "", ["", "--model tiny --rounds 4", "--batch 4 --json stall.json"]
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="vitb16", help="default: vitb16")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="samples a step; default: 1")
    parser.add_argument("--rounds", type=positive, default=2, metavar="N", help="of all times; default: 2")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the checkpoints; default: a temporary one")
    arguments = parser.parse_args()

    ranks = start_ranks("auto")
    title, file = MODELS[arguments.model]
    overrides = ["zero.stage=0", f"train.global_batch={arguments.batch}", "precision=fp32", "checkpoint.keep_last=1"]
    if ranks.device.type == "cuda":
        overrides[2] = "precision=bf16"
    config = load_config(CONFIGS / file, overrides)
    training = Training(config, ranks)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        times, size = measure(training, config, ranks, Path(folder) / "checkpoints", arguments.rounds)
    median = {name: statistics.median(values) for name, values in times._asdict().items()}
    what = f"{title}, {size / 1e9:.2f} GB of weights, moments and average"
    rounds = f"medians of {arguments.rounds} rounds"
    beside, alone = median["steps_beside"], median["steps"]
    lost = (sum(times.steps_beside) - len(times.steps_beside) * alone) / arguments.rounds
    cached = "from the page cache"
    figures = [
        Figure(
            "checkpoint_stall_ratio",
            median["stalls"] / median["copies"],
            "of a copy",
            f"stall of the step that saves, over a memory copy of the same bytes; {what}; target <= 1.5; {rounds}",
        ),
        Figure("checkpoint_stall", 1e3 * median["stalls"], "ms", "of the step that saves"),
        Figure("checkpoint_copy", 1e3 * median["copies"], "ms", "the plain copy; both sides in turn"),
        Figure(
            "checkpoint_step_slowdown",
            beside / alone,
            "of a step",
            f"steps begun during a write, over steps without; {1e3 * alone:,.0f} ms at batch {arguments.batch}",
        ),
        Figure(
            "checkpoint_steps_lost",
            1e3 * lost,
            "ms",
            f"longer steps beside a write, summed, for each checkpoint; {len(times.steps_beside)} steps",
        ),
        Figure("checkpoint_write", median["writes"], "s", "stall, checksums, files, fsync, rename; nothing beside"),
        Figure("checkpoint_write_rate", size / 1e6 / median["writes"], "MB/s", "the same"),
        Figure("checkpoint_load", median["loads"], "s", f"into one rank, every checksum checked; {cached}"),
        Figure("checkpoint_load_rate", size / 1e6 / median["loads"], "MB/s", "the same"),
        Figure("checkpoint_verify_rate", size / 1e6 / median["verifications"], "MB/s", f"reading alone; {cached}"),
    ]
    report(f"Checkpoints of {title}", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
