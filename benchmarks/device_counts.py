"""What a training step asks of a GPU, counted without one: launches, bytes, matrix products, by phase and kind.

Student, teacher, loss and backward run on tensors without memory at the asked size, with torch's varlen attention and
bfloat16 weights. What the engine does beside the model (gradients, update, the teacher's refresh) is counted on a real
step of one process on the CPU, with a model of the same depth, and its bytes are scaled by the number of elements.

All of this is one rank alone. `cosmos-scale plan` counts one of many ranks with the trainer's whole step: alone, it
counts the same launches. What other ranks add is printed as `rank_launches_*`: parts of the loss that are exchanged, a
copy into each bucket of gradients, and the values that norms and scales have in float32.

See cosmos_scale/testing/device_counts.py for what counts as a launch and as a byte. Nothing here is a time.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/device_counts.py`

from rich.console import Console
from rich.table import Table

from benchmarks.report import LOG_WIDTH, Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.fake_run import count_run
from cosmos_scale.profiling.flops import step_flops
from cosmos_scale.profiling.operators import GROUPS, META, Count, total
from cosmos_scale.profiling.planned_batch import planned_batch, planned_lengths
from cosmos_scale.testing.device_counts import count_step, count_update
from cosmos_scale.testing.ranks import run_ranks

RUNS = {"vitb16": "cc3m_vitb16", "vitb32": "cc3m_vitb32"}
SAMPLES = (32, 64, 256)
# Of a model of the same depth that a CPU can train.
NARROW = (
    *("model.attention=sdpa", "model.embed_dim=64", "model.vision.image_size=32", "model.vision.patch_size=16"),
    *("model.vision.width=64", "model.text.context_length=32", "model.text.width=64"),
    *("model.text.heads=1", "data.views.local_size=16", "train.global_batch=1"),
)
RANKS = 8  # one of them is counted beside a rank alone
STEP_PHASES, ENGINE_PHASES = ("student", "teacher", "loss", "backward"), ("gradients", "update", "refresh")


def case_config(run: str, samples: int, *overrides: str) -> RunConfig:
    """Return a shipped run at ZeRO stage 1 in bfloat16, with so many samples a rank."""
    fixed = ["precision=bf16", "zero.stage=1", "train.schedule_steps=100000", "model.attention=torch_varlen"]
    return load_config(shipped_file(RUNS[run]), [*fixed, f"train.global_batch={samples}", *overrides])


def count(run: str, samples: int, engine: dict[str, dict[str, Count]], narrow: int) -> dict[str, dict[str, Count]]:
    """Return the counts of one step by phase and group. engine: of a model of `narrow` elements."""
    config = case_config(run, samples)
    counter = count_step(config, planned_lengths(config, samples))
    with META:
        elements = sum(parameter.numel() for parameter in CosmosModel(config.model).parameters())
    scale = elements / narrow
    phases = {phase: counter.by_group(phase) for phase in STEP_PHASES}
    for phase, groups in engine.items():
        phases[phase] = {
            group: found._replace(read=round(found.read * scale), written=round(found.written * scale))
            for group, found in groups.items()
        }
    return phases


def block_counts(run: str, samples: int) -> dict[str, dict[str, Count]]:
    """Return what all blocks of each tower ask for, by phase; CUDA graphs of the blocks would replay their launches.

    It is what one block asks for, which a tower with one block fewer does not have, times the number of blocks.
    """
    config = case_config(run, samples)
    whole = count_step(config, planned_lengths(config, samples))
    found = {}
    for tower, section, layers in (
        ("image", "vision", config.model.vision.layers),
        ("text", "text", config.model.text.layers),
    ):
        fewer = count_step(
            case_config(run, samples, f"model.{section}.layers={layers - 1}"),
            planned_lengths(config, samples),
        )
        found[tower] = {
            phase: Count(*(layers * (a - b) for a, b in zip(whole.of_phase(phase), fewer.of_phase(phase), strict=True)))
            for phase in ("student", "teacher", "backward")
        }
    return found


def block_figures(run: str, samples: int) -> list[Figure]:
    """Return the launches of each tower's blocks, and their products."""
    found = []
    for tower, phases in block_counts(run, samples).items():
        whole = total(phases.values())
        launches, tflop = (
            ", ".join(f"{phase} {text}" for phase, text in of)
            for of in (
                [(phase, f"{count.launches}") for phase, count in phases.items()],
                [(phase, f"{count.flops / 1e12:.2f}") for phase, count in phases.items()],
            )
        )
        name = f"{run}_{samples}_{tower}"
        found += [
            Figure(f"block_launches_{name}", whole.launches, "launches", f"of all blocks: {launches}"),
            Figure(f"block_tflop_{name}", whole.flops / 1e12, "TFLOP", f"of all blocks: {tflop}"),
        ]
    return found


def needed(run: str, samples: int) -> int:
    """Return the operations that the step needs in matrix products."""
    config = case_config(run, samples)
    return step_flops(planned_batch(config, planned_lengths(config, samples), META), config)


def table_of(run: str, samples: int, phases: dict[str, dict[str, Count]]) -> Table:
    """Return a table: a row a phase, and launches, GB by kind and TFLOP of products."""
    table = Table("phase", "launches", *(f"{group} GB" for group in GROUPS), "TFLOP", title_justify="left")
    table.title = f"{run}, {samples} samples a GPU, bf16, ZeRO stage 1"
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, groups: dict[str, Count]) -> None:
        whole = total(groups.values())
        sizes = [f"{groups[group].nbytes / 1e9:,.2f}" for group in GROUPS]
        table.add_row(name, f"{whole.launches:,}", *sizes, f"{whole.flops / 1e12:,.2f}")

    for phase, groups in phases.items():
        row(phase, groups)
    table.add_section()
    row("step", {group: total(groups[group] for groups in phases.values()) for group in GROUPS})
    return table


def figures(run: str, samples: int, phases: Mapping[str, Mapping[str, Count]]) -> list[Figure]:
    """Return what is kept of a case: launches, bytes outside of products and attention, products."""
    by_group = {group: total(groups[group] for groups in phases.values()) for group in GROUPS}
    whole, name = total(by_group.values()), f"{run}_{samples}"
    other = by_group["copies"].nbytes + by_group["norms and pointwise"].nbytes
    setting = f"{samples} samples a GPU, bf16, stage 1"
    share = needed(run, samples) / whole.flops
    return [
        Figure(f"step_launches_{name}", whole.launches, "launches", setting),
        Figure(f"step_pointwise_{name}", other / 1e9, "GB", f"{setting}; copies, norms, pointwise, optimizer"),
        Figure(
            f"step_tflop_{name}", whole.flops / 1e12, "TFLOP", f"{setting}; needed, with attention: {share:.3f} of it"
        ),
    ]


def rank_figure(run: str, samples: int, phases: dict[str, dict[str, Count]]) -> Figure:
    """Return the launches of one of RANKS ranks, as a plan counts them; phases: those of a rank alone."""
    planned = count_run(case_config(run, samples), RANKS, samples).launches()
    alone = {phase: total(groups.values()).launches for phase, groups in phases.items()}
    alone["backward"] += alone.pop("gradients")
    more = ", ".join(f"{name} {planned[name] - alone[name]:+d}" for name in alone if planned[name] != alone[name])
    note = f"of one of {RANKS} ranks, as `cosmos-scale plan` counts them; beside a rank alone: {more}"
    return Figure(f"rank_launches_{run}_{samples}", sum(planned.values()), "launches", note)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("device_counts", (__doc__ or "").partition("\n")[0], ("", "--run vitb16 --samples 64"))
    parser.add_argument("--run", choices=RUNS, nargs="+", default=list(RUNS), help="default: all")
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), metavar="N", help="default: 32 64 256")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    found: list[Figure] = []
    for run in arguments.run:
        ((engine, elements),) = run_ranks(count_update, 1, case_config(run, 1, *NARROW), timeout=300.0)
        for samples in arguments.samples:
            phases = count(run, samples, engine, elements)
            console.print(table_of(run, samples, phases))
            found += figures(run, samples, phases)
            found += block_figures(run, samples)
        found.append(rank_figure(run, samples, phases))
    report("What a step asks of a GPU", found, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
