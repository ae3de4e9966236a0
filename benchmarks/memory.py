"""Memory per rank at each stage of ZeRO against the formula, and what recomputing and micro-batches save.

States: every rank of 1, 2 and 4 gloo processes trains a step and then goes through the next step up to its update.
There it counts the memory of all tensors that did not exist before the model: each piece of memory once, however many
tensors lie in it. Python's garbage collector knows these tensors. It may not know gradients, so these are looked for
beside their parameters. Tensors that only autograd holds are gone by then. DeepSpeed holds all its tensors in Python,
so nothing is missed, its buffers included. The formula is cosmos_scale/engine/memory.py.

Steps: the most bytes that a whole step holds at one time, beside those that were held before it, by torch's allocator.

Nothing here depends on the machine's speed. On a CPU the host's and the device's memory are the same.
"""

import gc
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/memory.py`

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.report import LOG_WIDTH, Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.memory import MemoryRow, state_memory, total_bytes
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.states import tensors_by_part
from cosmos_scale.step import train_step
from cosmos_scale.testing.allocation import held_bytes, peak_bytes
from cosmos_scale.testing.batches import random_batch
from cosmos_scale.testing.ranks import run_ranks

MIB = 2**20
WIDTH, LAYERS, VOCABULARY = 256, 6, 8192
WORLD_SIZES = (1, 2, 4)
CAPTION_LENGTHS = (4, 16)  # tokens of a caption, at least and at most
SECONDS = 400.0


class Load(NamedTuple):
    """What a step works on: two global crops, local crops of half their side, and captions."""

    samples: int
    image_size: int
    local_crops: int
    captions: int


LITTLE = Load(8, 32, 1, 2)  # enough for states, which do not depend on the load; bf16 is slow on a CPU
MUCH = Load(16, 64, 6, 8)


class Case(NamedTuple):
    """What one measurement sets."""

    stage: int
    precision: str
    offload: bool = False
    micro_batches: int = 1
    recompute: int = 0
    load: Load = LITTLE

    @property
    def name(self) -> str:
        """The case's name in figures, which leaves out fp32."""
        return (
            f"stage{self.stage}"
            + ("" if self.precision == "fp32" else f"_{self.precision}")
            + ("_offload" if self.offload else "")
        )


STATES = [Case(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
STATES += [Case(stage, "bf16", offload=True) for stage in (1, 2, 3)]
STEPS = {
    "all kept": Case(0, "fp32", load=MUCH),
    "recompute 2": Case(0, "fp32", recompute=2, load=MUCH),
    "recompute 1": Case(0, "fp32", recompute=1, load=MUCH),
    "2 micro-batches": Case(0, "fp32", micro_batches=2, load=MUCH),
    "4 micro-batches": Case(0, "fp32", micro_batches=4, load=MUCH),
    "4 micro-batches, recompute 1": Case(0, "fp32", micro_batches=4, recompute=1, load=MUCH),
}


class Model(NamedTuple):
    """The size of each tower; both are equal."""

    width: int
    layers: int
    vocabulary: int


class Measured(NamedTuple):
    """Bytes on one rank. parts: by part of the formula; memory of no known part counts as buffers.

    step: the most that a step holds, beside what was held before it. forward: what the student's forward leaves for the
    backward.
    """

    parts: dict[str, int]
    step: int
    forward: int

    @property
    def states(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def run_config(case: Case, model: Model) -> RunConfig:
    """Return the run of a case."""
    load = case.load
    return RunConfig.model_validate(
        {
            "precision": case.precision,
            "zero": {"stage": case.stage, "offload": case.offload},
            "model": {
                "embed_dim": model.width,
                "vision": {
                    **{"image_size": load.image_size, "patch_size": 16},
                    **{"width": model.width, "layers": model.layers},
                },
                "text": {
                    **{"context_length": 32, "vocab_size": model.vocabulary},
                    **{"width": model.width, "heads": model.width // 64, "layers": model.layers},
                },
            },
            "data": {
                "views": {"local_size": load.image_size // 2, "local_crops": load.local_crops},
                "captions": {"count": load.captions},
            },
            "train": {
                **{"global_batch": load.samples, "schedule_steps": 100},
                **{"micro_batches": case.micro_batches, "recompute": case.recompute},
            },
            "optimizer": {"warmup_steps": 10},
        }
    )


def formula(case: Case, model: Model, world_size: int) -> list[MemoryRow]:
    """Return the formula's rows for a case."""
    config = run_config(case, model)
    with torch.device("meta"):
        return state_memory(CosmosModel(config.model), config, world_size)


def measure_all(rank: int, world_size: int, cases: list[Case], model: Model) -> list[Measured]:
    """Measure cases on one of several ranks."""
    ranks = start_ranks("cpu")
    return [measure(run_config(case, model), ranks) for case in cases]


def measure(config: RunConfig, ranks: Ranks) -> Measured:
    """Measure one run; collective."""
    lengths = [CAPTION_LENGTHS] * config.data.captions.count
    batch = random_batch(config.model, config.data.views, config.train.global_batch, lengths)  # the same on all ranks
    share = batch.split(ranks.world_size)[ranks.rank]
    others = set(_storages())
    pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
    student, teacher = pair

    def step() -> None:
        train_step(student, teacher, loss, share, lr=1e-4, momentum=0.99)
        _ = teacher.model  # waits for the refresh: recorded threads must not outlive the recording

    step()  # DeepSpeed makes some of its buffers now
    peak = peak_bytes(step)
    features, forward = held_bytes(lambda: student(share))
    gradients = loss(student.with_full_scales(features), teacher(share)).gradients
    student.backward(share, features, gradients)
    del features, gradients
    held = {place: nbytes for place, nbytes in _storages().items() if place not in others}
    parts: dict[str, int] = {}
    named: dict[int, str] = {}
    for part, tensors in tensors_by_part(student, teacher).items():
        for tensor in tensors:
            named.setdefault(tensor.untyped_storage().data_ptr(), part)
    for place, nbytes in held.items():
        part = named.get(place, "buffers")
        parts[part] = parts.get(part, 0) + nbytes
    student.update(lr=1e-4, momentum=0.99, finite=torch.tensor(True))
    pair.close()
    return Measured(parts, peak, forward)


def _storages() -> dict[int, int]:
    """Return the bytes of each piece of memory that some tensor lies in, by address."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would run code of some objects, which warns
            tensors = [thing, thing.grad] if thing.is_leaf else [thing]
            for storage in (tensor.untyped_storage() for tensor in tensors if tensor is not None):
                if storage.nbytes():
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def main() -> int:
    """Run the benchmark."""
    arguments = argument_parser("memory", __doc__ or "", ["", "--json memory.json"]).parse_args()
    figures: list[Figure] = []
    table = Table("ranks", "run", "measured MiB", "formula MiB", "ratio", "step's peak MiB", title_justify="left")
    table.title = "Memory per rank between backward and update, of the rank with most"
    for column in table.columns[2:]:
        column.justify = "right"
    model = Model(WIDTH, LAYERS, VOCABULARY)
    parameters = sum(row.nbytes for row in formula(STATES[0], model, 1) if row.part == "weights") // 4
    for world_size in WORLD_SIZES:
        results = run_ranks(measure_all, world_size, STATES, model, timeout=SECONDS)
        for number, case in enumerate(STATES):
            measured = max((result[number] for result in results), key=lambda found: found.states)
            expected = total_bytes(formula(case, model, world_size))
            ratio, name = measured.states / expected, f"{case.name}_ranks{world_size}"
            sizes = [f"{nbytes / MIB:,.1f}" for nbytes in (measured.states, expected)]
            table.add_row(str(world_size), case.name, *sizes, f"{ratio:.3f}", f"{measured.step / MIB:,.1f}")
            note = f"{parameters / 1e6:.1f} M parameters, {case.precision}; by formula {expected / MIB:,.1f} MiB"
            figures.append(Figure(f"memory_{name}", measured.states / MIB, "MiB", note))
            figures.append(Figure(f"memory_ratio_{name}", ratio, "of formula", note))
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    (steps,) = run_ranks(measure_all, 1, list(STEPS.values()), model, timeout=SECONDS)
    whole = steps[0].step
    for (title, case), measured in zip(STEPS.items(), steps, strict=True):
        name = f"memory_step_recompute{case.recompute}_micro{case.micro_batches}"
        saved = f"{title}: {1 - measured.step / whole:.0%} less than with all kept"
        figures.append(Figure(name, measured.step / MIB, "MiB", f"peak of a step, batch {MUCH.samples}; {saved}"))
    report("Memory per rank", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
