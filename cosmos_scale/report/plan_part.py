"""What was planned for a run beside what its steps took: `cosmos-scale plan --json RUN/plan.json` leaves the plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, reason_of
from cosmos_scale.report.final_numbers import TextTable
from cosmos_scale.report.memory_part import planned_memory
from cosmos_scale.report.profile_part import Profiled
from cosmos_scale.report.records import RunRecords, number_of

PLAN_FILE = Path("plan.json")
GIB = 2.0**30
Measure = tuple[str, str, float]
"""A row's name, its key in the records of training, and what its numbers are multiplied by in the table."""
MEASURES: Sequence[Measure] = (
    ("step, ms", "step_seconds_max", 1000.0),
    ("samples a second and rank", "samples_per_second_per_rank", 1.0),
    ("MFU, %", "mfu", 100.0),
    ("peak memory of a rank, GiB", "peak_memory_gib", 1.0),
)


def add_plans(found: Profiled, runs: Sequence[RunRecords], notes: list[str]) -> None:
    """Put what was planned for the runs before what their profiles say; notes say which plan cannot be used."""
    speed, memory = [], []
    for number, run in enumerate(runs):
        path = run.folder / PLAN_FILE
        if not path.exists():
            continue
        try:
            plan = load_json(read_regular(path))
            of = f"{run.label}: " if len(runs) > 1 else ""
            table, planned = _table(plan, run, of), planned_memory(plan, of, number)
            speed.append(table)
            memory.append(planned)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = reason_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            notes.append(f"{run.label}: {PLAN_FILE} cannot be used: {said}.")
    found.speed = [*speed, *found.speed]
    found.memory = [*(table for _, table in memory), *found.memory]
    found.memory_figures = [*(figure for figure, _ in memory), *found.memory_figures]


def _table(plan: Mapping[str, Any], run: RunRecords, of: str) -> TextTable:
    times = plan["time"]
    planned = {
        "step_seconds_max": [times[case]["step_ms"] / 1000 for case in ("expected", "fastest", "slowest")],
        "samples_per_second_per_rank": _with_range(times, "samples_per_second_per_rank"),
        "mfu": _with_range(times, "mfu"),
        "peak_memory_gib": [plan["memory"]["peak_bytes"] / GIB],
    }
    rows = [_row(name, planned[key], _measured(run, key), factor) for name, key, factor in MEASURES]
    cluster = plan["cluster"]
    gpus = cluster["nodes"] * cluster["gpus"]
    rates = "measured rates" if cluster["calibrated"] else "rates of data sheets"
    note = f"Planned for {gpus:,} x {cluster['machine']} by {rates}; measured: medians of the run's records."
    return TextTable(f"{of}Planned and measured", ["", "planned", "range", "measured", "difference"], rows, note)


def _with_range(times: Mapping[str, Any], name: str) -> list[float]:
    """Return the expected value and its range; nothing where the plan has none."""
    value = times[name]
    return [] if value is None else [value, *times[f"{name}_range"]]


def _measured(run: RunRecords, key: str) -> float | None:
    values = [value for record in run.train if (value := number_of(record, key)) is not None]
    return median(values) if values else None


def _row(name: str, planned: Sequence[float], measured: float | None, factor: float) -> list[str]:
    expected = f"{factor * planned[0]:,.4g}" if planned else ""
    least_and_most = f"{factor * min(planned[1:]):,.4g} .. {factor * max(planned[1:]):,.4g}" if planned[1:] else ""
    if measured is None:
        return [name, expected, least_and_most, "", ""]
    difference = f"{measured / planned[0] - 1:+.1%}" if planned and planned[0] else ""
    return [name, expected, least_and_most, f"{factor * measured:,.4g}", difference]
