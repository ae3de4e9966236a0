"""How right the planner's counts are, which are taken without other ranks and without the work.

- collectives: phase, kind, dtype, bytes and calls of a step, against 2 and 4 gloo ranks, at every stage of ZeRO
- states: bytes between backward and update, counted and by the formula of cosmos_scale/engine/memory.py, for 1 to 1,024
  ranks and every stage
- peaks: the most bytes of a step beside those held before it, counted and by torch's allocator, in fp32 on the CPU
- activations: what the forward keeps for each of 64 samples in bf16, as a GPU runs it

Nothing here depends on the machine's speed. With --world-sizes 1024 stage 3 alone takes minutes.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/plan.py`

import torch

from benchmarks.memory import MUCH, Case, Model, run_config
from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.memory import state_memory, total_bytes
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.counts import Counts
from cosmos_scale.profiling.fake_run import count_run, count_runs
from cosmos_scale.profiling.plan import states_of
from cosmos_scale.testing.counted_steps import fake_counts, real_and_counted_peaks, real_exchanges
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import tiny_config

STAGES = (0, 1, 2, 3)
SAMPLES = 2
MODEL = Model(width=256, layers=6, vocabulary=8192)
LOADS = {
    "all_kept": Case(0, "fp32", load=MUCH),
    "recompute_2": Case(0, "fp32", recompute=2, load=MUCH),
    "recompute_1": Case(0, "fp32", recompute=1, load=MUCH),
    "micro_batches_4": Case(0, "fp32", micro_batches=4, load=MUCH),
}
EXPECTED_ACTIVATIONS = {"cc3m_vitb16": 214.0, "cc3m_vitb32": 88.0}  # MiB a sample
SECONDS = 1200.0


def stage_config(stage: int, world_size: int) -> RunConfig:
    """Return a tiny run at a stage."""
    train = {"global_batch": world_size * SAMPLES, "schedule_steps": 100}
    return tiny_config(precision="bf16", zero={"stage": stage}, train=train, optimizer={"warmup_steps": 0})


def exchange_figures(world_size: int) -> list[Figure]:
    """Return how many collectives of a step differ between real ranks and a counted one, by stage."""
    configs = [stage_config(stage, world_size) for stage in STAGES]
    real, *_ = run_ranks(real_exchanges, world_size, configs, SAMPLES, timeout=SECONDS)
    (counted,) = run_ranks(fake_counts, 1, configs, world_size, SAMPLES, timeout=SECONDS)
    figures = []
    for stage, exchanges, counts in zip(STAGES, real, counted, strict=True):
        differ = Counter(exchanges) - Counter(counts.exchanges) + (Counter(counts.exchanges) - Counter(exchanges))
        note = f"of {sum(found.calls for found in exchanges)} collectives"
        figures.append(Figure(f"plan_exchanges_stage{stage}_ranks{world_size}", sum(differ.values()), "differ", note))
    return figures


def state_figures(world_size: int, stages: Sequence[int]) -> list[Figure]:
    """Return the counted states over those of the formula, by stage."""
    figures = []
    for stage in stages:
        config = run_config(Case(stage, "bf16"), MODEL)
        counts = count_run(config, world_size, 1)
        with torch.device("meta"):
            expected = total_bytes(state_memory(CosmosModel(config.model), config, world_size))
        states = states_of(counts.memory_of("backward").left.items())
        note = f"counted {states / 2**20:,.1f} MiB in {counts.seconds:.0f} s; peak {counts.peak.peak / 2**20:,.1f} MiB"
        figures.append(Figure(f"plan_states_stage{stage}_ranks{world_size}", states / expected, "of formula", note))
    return figures


def peak_figures() -> list[Figure]:
    """Return counted peaks over those of torch's allocator."""
    configs = [run_config(case, MODEL) for case in LOADS.values()]
    (found,) = run_ranks(real_and_counted_peaks, 1, configs, timeout=SECONDS)
    return [
        Figure(f"plan_peak_{name}", counted / real, "of allocator", f"{real / 2**20:,.1f} MiB by the allocator")
        for name, (real, counted) in zip(LOADS, found, strict=True)
    ]


def activation_figures() -> list[Figure]:
    """Return the bytes that the student's forward keeps for a sample, of 64 in bf16."""
    figures = []
    for run, expected in EXPECTED_ACTIVATIONS.items():
        config = load_config(shipped_file(run), ["precision=bf16", "train.schedule_steps=100000"])
        kept, recomputed = (_activations(counts) for counts in count_runs([(config, 64), (_recomputed(config), 64)], 8))
        note = f"expected about {expected:g}; all blocks computed again: {recomputed:.1f}"
        figures.append(Figure(f"plan_activations_{run}", kept, "MiB a sample", note))
    return figures


def _activations(counts: Counts) -> float:
    return counts.memory_of("student").left["activations"] / counts.samples / 2**20


def _recomputed(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": 1})})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    examples = ("", "--world-sizes 1 8 64 1024")
    parser = argument_parser("plan", (__doc__ or "").partition("\n")[0], examples)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 8, 64], metavar="W", help="default: 1 8 64")
    arguments = parser.parse_args(argv)
    figures = [figure for world_size in (2, 4) for figure in exchange_figures(world_size)]
    figures += peak_figures() + activation_figures()
    for world_size in arguments.world_sizes:
        figures += state_figures(world_size, STAGES)
    report("Planner's counts against what they stand for", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
