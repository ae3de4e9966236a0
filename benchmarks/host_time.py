"""The host's time for a training step: a model of the real depth, so narrow that the computation hardly counts.

A GPU waits for the host where its kernels take less time than the host needs to launch them. One process plays rank 0
of eight (torch's fake process group), on a CPU, in float32. Beside the stages of ZeRO: the same model's forward and
backward with torch alone, so that the difference is what loss, engine, optimizer and teacher cost the host. Operators
are counted as a GPU's launches are; torch's operators do here what kernels of the project do on a GPU.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/host_time.py`

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import Batch
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.operators import DeviceCounter, total
from cosmos_scale.step import train_step
from cosmos_scale.testing.batches import random_batch
from cosmos_scale.testing.ranks import run_ranks

WORLD_SIZE = 8
STAGES = (0, 1, 2, 3)
WARM_UP, STEPS = 4, 25
ALONE = "torch alone"


Step = Callable[[], object]


class HostTime(NamedTuple):
    """What a step takes of the host: CPU milliseconds, the median of some, and how many operators it calls."""

    ms: float
    operators: int


def times_of(rank: int, world_size: int, stages: Sequence[int], steps: int) -> dict[str, HostTime]:
    """Return a step's time for each stage and for torch alone, taken in turns."""
    ranks = start_fake_ranks(WORLD_SIZE)
    configs = {f"stage {stage}": narrow_config(stage) for stage in stages}
    calls = {name: trainer_step(config, ranks) for name, config in configs.items()}
    calls[ALONE] = torch_step(next(iter(configs.values())))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + steps):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number >= WARM_UP:
                times[name].append(time.process_time() - start)
    found = {}
    for name, call in calls.items():
        with DeviceCounter() as counter:
            call()
        operators = total(counter.counts.values()).launches
        found[name] = HostTime(1e3 * statistics.median(times[name]), operators)
    return found


def narrow_config(stage: int) -> RunConfig:
    """Return a run of ViT-B/16's depth at a stage of ZeRO."""
    sections = {
        "precision": "fp32",
        "zero": {"stage": stage},
        "model": {
            "embed_dim": 64,
            "vision": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 12},
            # A table of 49,408 rows would take time of the memory, not of the host.
            "text": {"context_length": 32, "vocab_size": 512, "width": 64, "heads": 1, "layers": 12},
        },
        "data": {"views": {"local_size": 16}},
        "train": {"global_batch": WORLD_SIZE, "schedule_steps": 100},
        "optimizer": {"warmup_steps": 10},
    }
    return RunConfig.model_validate(sections)


def batch_of(config: RunConfig) -> Batch:
    """Return one sample."""
    lengths = [(4, config.model.text.context_length)] * config.data.captions.count
    return random_batch(config.model, config.data.views, 1, lengths)


def trainer_step(config: RunConfig, ranks: Ranks) -> Step:
    """Return a call that trains on one sample, as the trainer does."""
    (student, teacher), loss, batch = drawn_pair(config, ranks), CosmosLoss("true"), batch_of(config)

    def step() -> None:
        train_step(student, teacher, loss, batch, lr=1e-4, momentum=0.99)
        _ = teacher.model  # waits for the refresh

    return step


def torch_step(config: RunConfig) -> Step:
    """Return a call that does forward and backward of the student and forward of the teacher, and nothing else."""
    model, batch = CosmosModel(config.model), batch_of(config)
    model.init_weights(torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.no_grad():
            model.teacher_features(batch, config.data.captions.global_count)
        features = model(batch)
        torch.autograd.backward(list(features), [torch.ones_like(feature) for feature in features])
        model.zero_grad(set_to_none=True)

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("host_time", (__doc__ or "").partition("\n")[0], ("", "--stages 1 --steps 50"))
    parser.add_argument("--stages", type=int, choices=STAGES, nargs="+", default=list(STAGES), help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    arguments = parser.parse_args(argv)
    (found,) = run_ranks(times_of, 1, arguments.stages, arguments.steps, timeout=600.0)
    figures = []
    for name, (ms, operators) in found.items():
        each = f"{operators:,} operators, {1e3 * ms / operators:.1f} us each"
        note = f"{name}; {ms - found[ALONE].ms:+.1f} ms beside student and teacher with torch alone; {each}"
        figures.append(Figure(f"host_step_{name.replace(' ', '_')}", ms, "ms", note))
    report("Host time of a step, real depth and tiny width", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
