"""What a plan without calibration says of GPUs, beside what others published of theirs.

Nobody published this trainer's step on GPUs. So the shares of the peak (MFU) are those of other trainers with models of
like sizes on the same chips: a plan that were far from all of them would be wrong. Counted for eight GPUs, then scaled.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/plan_published.py`

from rich.console import Console
from rich.table import Table

from benchmarks.report import LOG_WIDTH, Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.profiling.fake_run import count_runs
from cosmos_scale.profiling.machine import MACHINES
from cosmos_scale.profiling.plan import Cluster
from cosmos_scale.profiling.plan_time import planned_time
from cosmos_scale.profiling.scaled_counts import scaled_counts

COUNTED_RANKS = 8


class Model(NamedTuple):
    """A model by its overrides of the run merged30m_vitb16, and so many samples a GPU."""

    overrides: tuple[str, ...]
    samples: int


class Published(NamedTuple):
    """A share of the peak that others report: least and most, of which trainer, on which chip, how many GPUs."""

    trainer: str
    least: float
    most: float
    chip: str
    gpus: int
    model: str


# Widths of OpenCLIP's models of these names. Local crops are a multiple of the patch.
MODELS = {
    "B/32": Model(("model.vision.patch_size=32",), 64),
    "B/16": Model((), 64),
    "L/14": Model(
        (
            *("model.embed_dim=768", "model.vision.width=1024", "model.vision.layers=24", "model.vision.patch_size=14"),
            *("model.text.width=768", "model.text.heads=12", "data.views.local_size=98"),
        ),
        32,
    ),
    "H/14": Model(
        (
            *(
                "model.embed_dim=1024",
                "model.vision.width=1280",
                "model.vision.layers=32",
                "model.vision.patch_size=14",
            ),
            *("model.vision.head_width=80", "model.text.width=1024", "model.text.heads=16", "model.text.layers=24"),
            "data.views.local_size=98",
        ),
        16,
    ),
}
PUBLISHED = (
    Published("OpenCLIP, ViT-B/32 to L/14", 0.12, 0.16, "a100-80", 128, "B/32"),
    Published("NeMo, CLIP ViT-g/14", 0.39, 0.39, "a100-80", 8, "H/14"),
    Published("NeMo, CLIP ViT-g/14", 0.21, 0.21, "h100", 8, "H/14"),
    Published("DINOv3, ViT-L with local crops", 0.18, 0.24, "h100", 128, "L/14"),
    Published("torchtitan, Llama 8B", 0.337, 0.39, "h100", 128, "H/14"),
)


def config_of(model: Model) -> RunConfig:
    """Return the run of a model, at ZeRO stage 1 in bf16."""
    batch = f"train.global_batch={model.samples * COUNTED_RANKS}"
    return load_config(shipped_file("merged30m_vitb16"), [*model.overrides, batch])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("plan_published", (__doc__ or "").partition("\n")[0], ("",))
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(row.model for row in PUBLISHED))
    runs = [(config_of(MODELS[name]), MODELS[name].samples) for name in names]
    counted = dict(zip(names, count_runs(runs, COUNTED_RANKS), strict=True))
    table = Table("published", "MFU %", "planned: this trainer", "MFU %", "limit", title_justify="left")
    figures = []
    for row in PUBLISHED:
        machine, counts = MACHINES[row.chip], scaled_counts(counted[row.model], row.gpus)
        time = planned_time(config_of(MODELS[row.model]), counts, Cluster(row.gpus // 8, 8, machine))
        low, high = time.mfus
        published = f"{100 * row.least:.0f}" + (f" .. {100 * row.most:.0f}" if row.most > row.least else "")
        planned = f"{row.model}, {row.gpus} x {machine.name}, {counts.samples} a GPU"
        ends = f"{100 * time.mfu:.0f} ({100 * low:.0f} .. {100 * high:.0f})"
        table.add_row(row.trainer, published, planned, ends, time.expected.limit)
        name = f"plan_mfu_{row.model.replace('/', '')}_{row.chip}_{row.gpus}"
        figures.append(Figure(name, time.mfu, "of the peak", f"planned, not measured; {row.trainer}: {published} %"))
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    report("Planned without calibration, not measured", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
