"""A plan in files: JSON for other programs, and a sweep over GPUs and ZeRO stages as CSV and as a picture."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosmos_scale.drawing import usual_figures
from cosmos_scale.files import replace_file, whole_file, writing
from cosmos_scale.profiling.plan_time import PlannedTime, StepTime
from cosmos_scale.profiling.plan_time_text import PlannedRun
from cosmos_scale.profiling.remedies import Outlook
from cosmos_scale.words import figure_text

FORM = 1  # of the JSON
SWEEP_GPUS = tuple(2**power for power in range(11))
TABLE, PICTURE = "sweep.csv", "sweep.png"


def plan_tree(run: PlannedRun) -> dict[str, Any]:
    """Return a plan as JSON holds it: sizes in bytes, times in ms, rates for a GPU; ends of ranges as [least, most]."""
    plan, time = run.plan, run.time
    counts, cluster, train = plan.counts, plan.cluster, plan.config.train
    peak = counts.peak
    return {
        "form": FORM,
        "config": plan.config.name,
        "cluster": {
            "nodes": cluster.nodes,
            "gpus": cluster.gpus,
            "machine": cluster.machine.name,
            "calibrated": cluster.machine.calibration is not None,
            "source": cluster.machine.source,
        },
        "batch": {"global": counts.samples * counts.world_size, "samples": counts.samples},
        "step": {
            "zero_stage": counts.stage,
            "precision": counts.precision,
            "recompute": train.recompute,
            "micro_batches": train.micro_batches,
        },
        "memory": {
            "peak_bytes": peak.peak,
            "phase": peak.phase,
            "parts": peak.parts,
            "outside_torch_bytes": cluster.outside_torch,
            "gpu_bytes": round(cluster.memory),
            "phases": {memory.phase: memory.peak for memory in counts.memory},
            "largest_batch_by_recompute": {str(every): most for every, most in plan.largest.items()},
        },
        "work": {**asdict(plan.work), "needed": plan.work.needed},
        "traffic": [asdict(row) for row in plan.traffic()],
        "time": {
            "expected": _step_tree(time.expected),
            "fastest": _step_tree(time.fastest),
            "slowest": _step_tree(time.slowest),
            **_rates_tree(time),
        },
        "run": {
            "steps": run.steps,
            "hours": run.hours,
            "gpu_hours": None if run.hours is None else run.hours * cluster.world_size,
        },
        "remedies": [
            {**_outlook_tree(remedy.outlook), "gain": remedy.gain, "verdict": remedy.verdict} for remedy in run.remedies
        ],
        "scaling": [_outlook_tree(outlook) for outlook in run.scaling],
    }


def write_plan(run: PlannedRun, path: Path) -> None:
    """Write a plan as JSON. Raises UserError where the file cannot be written."""
    with writing(path):
        replace_file(path, (json.dumps(plan_tree(run), indent=1) + "\n").encode())


def write_sweep(outlooks: Sequence[Outlook], title: str, folder: Path) -> None:
    """Write a sweep's table and picture into a folder that is there. Raises UserError where they cannot be written."""
    rows = [_outlook_tree(outlook) for outlook in outlooks]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row[column] for column in _COLUMNS] for row in (_flat(row) for row in rows))
    with writing(folder / TABLE):
        replace_file(folder / TABLE, text.getvalue().encode())
    _draw(outlooks, title, folder / PICTURE)


_COLUMNS = (
    "gpus",
    "zero_stage",
    "samples",
    "step_ms",
    "samples_per_second_per_rank",
    "samples_per_second_per_rank_least",
    "samples_per_second_per_rank_most",
    "mfu",
    "limit",
    "network_ms",
    "exposed_ms",
    "loss_ms",
    "host_ms",
    "memory_bytes",
    "fits",
)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    least, most = row["samples_per_second_per_rank_range"]
    ends = {"samples_per_second_per_rank_least": least, "samples_per_second_per_rank_most": most}
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in {**row, **ends}.items()}


def _outlook_tree(outlook: Outlook) -> dict[str, Any]:
    expected = outlook.time.expected
    return {
        "change": outlook.change,
        "gpus": outlook.cluster.world_size,
        "zero_stage": outlook.stage,
        "samples": outlook.time.samples,
        "step_ms": 1e3 * expected.seconds,
        "network_ms": 1e3 * expected.network,
        "exposed_ms": 1e3 * expected.exposed,
        "loss_ms": 1e3 * expected.device["loss"],
        "host_ms": 1e3 * expected.host,
        "memory_bytes": outlook.memory,
        "fits": outlook.fits,
        **_rates_tree(outlook.time),
    }


def _rates_tree(time: PlannedTime) -> dict[str, Any]:
    return {
        "limit": time.expected.limit,
        "samples_per_second_per_rank": time.rate,
        "samples_per_second_per_rank_range": list(time.rates),
        "mfu": time.mfu,
        "mfu_range": list(time.mfus),
    }


def _step_tree(step: StepTime) -> dict[str, Any]:
    return {
        "step_ms": 1e3 * step.seconds,
        "device_ms": {part: 1e3 * seconds for part, seconds in step.device.items()},
        "network_ms": 1e3 * step.network,
        "hidden_ms": 1e3 * step.hidden,
        "host_ms": 1e3 * step.host,
        "data_ms": 1e3 * step.data,
        "copy_ms": 1e3 * step.copy,
    }


@usual_figures()
def _draw(outlooks: Sequence[Outlook], title: str, path: Path) -> None:
    """Draw samples a second and rank by number of ranks, a line and its range for each stage."""
    from matplotlib.figure import Figure  # here: it takes half a second

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for stage in dict.fromkeys(outlook.stage for outlook in outlooks):
        points = [outlook for outlook in outlooks if outlook.stage == stage and outlook.fits]
        sizes = [point.cluster.world_size for point in points]
        if not points:
            continue
        least, most = zip(*(point.time.rates for point in points), strict=True)
        axes.fill_between(sizes, least, most, alpha=0.1)
        # Stages may be equally fast: the later line is the thinner one, so that both are seen.
        width, rates = 5.5 - 1.5 * stage, [point.time.rate for point in points]
        axes.plot(sizes, rates, marker="o", linewidth=width, markersize=2 * width + 1, label=f"ZeRO stage {stage}")
    gpus = sorted({outlook.cluster.world_size for outlook in outlooks})
    unit = outlooks[0].cluster.machine.unit
    axes.set(title=figure_text(title), xscale="log", xlabel=f"{unit}s", ylabel=f"samples a second and {unit}, planned")
    axes.set_xticks(gpus, [f"{size:,}" for size in gpus])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with writing(path), whole_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
