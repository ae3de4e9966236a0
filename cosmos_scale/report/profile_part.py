"""What a run's profile says, as tables and pictures: where a step goes, what travels, what memory holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, reason_of
from cosmos_scale.report.figures import Drawn
from cosmos_scale.report.final_numbers import TextTable
from cosmos_scale.report.memory_part import measured_memory, memory_timeline_of
from cosmos_scale.report.records import RunRecords
from cosmos_scale.words import counted

PROFILE_FILE = Path("profile") / "profile.json"
CENT = 100.0
MOST_ROWS = 15
LEAST = 0.001  # a smaller number is told as smaller than that


@dataclass
class Profiled:
    """What profiles add to the parts of the page. findings: sentences, the most useful first."""

    speed: list[TextTable] = field(default_factory=list)
    memory: list[TextTable] = field(default_factory=list)
    traffic: list[TextTable] = field(default_factory=list)
    memory_figures: list[Drawn] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def profiles_of(runs: Sequence[RunRecords], notes: list[str]) -> Profiled:
    """Return what the runs' profiles say, as far as they are there; notes say which cannot be used."""
    found = Profiled()
    for number, run in enumerate(runs):
        path = run.folder / PROFILE_FILE
        if not path.exists():
            continue
        try:
            profile = load_json(read_regular(path))
            _add(found, profile, f"{run.label}: " if len(runs) > 1 else "", number)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = reason_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            notes.append(f"{run.label}: {PROFILE_FILE} cannot be used: {said}.")
    return found


def _add(found: Profiled, profile: Mapping[str, Any], of: str, number: int) -> None:
    """Add one profile; nothing is added where a part of it cannot be read."""
    speed = [_phases(profile, of), *_loader(profile, of), *_operators(profile, of), *_waits(profile, of)]
    traffic = list(_collectives(profile, of))
    memory = list(measured_memory(profile, of, number))
    timelines = list(memory_timeline_of(profile, of, number))
    findings = [f"{of}{_finding(one)}" for one in profile.get("findings") or ()]
    found.speed += speed
    found.traffic += traffic
    found.memory += [table for _, table in memory]
    found.memory_figures += [*(figure for figure, _ in memory), *timelines]
    found.findings += findings


def _phases(profile: Mapping[str, Any], of: str) -> TextTable:
    rows = []
    for phase in profile["phases"]:
        ranks = f"{_number(phase['rank_min_ms'])} .. {_number(phase['rank_max_ms'])} (rank {phase['rank_max']})"
        row = [phase["label"], _median(phase["device_ms"]), _percent(phase["share"]), _median(phase["host_ms"]), ranks]
        rows.append(row)
        for part in phase.get("parts") or ():
            indented = f"\N{EM SPACE}{part['label']}"
            rows.append([indented, _median(part["device_ms"]), _percent(part["share"]), "", ""])
    step, throughput = profile["step_ms"], profile["throughput"]
    said = [f"A step takes {_number(step['median'])} ms (95 % of them at most {_number(step['p95'])} ms)"]
    if throughput.get("samples_per_second_per_rank"):
        said.append(f"{_number(throughput['samples_per_second_per_rank'])} samples a second and rank")
    if throughput.get("mfu"):
        said.append(f"MFU {_percent(throughput['mfu'])}")
    said.append(f"the phases add up to it within {_percent(abs(profile['sum']['difference']))}")
    cost = profile["cost"].get("marks", profile["cost"].get("median"))
    said.append(f"profiling itself costs {_percent(cost)}")
    columns = ["phase", "device ms", "share", "host ms", "ranks, ms"]
    return TextTable(f"{of}Where a step goes", columns, rows, f"{'; '.join(said)}.")


def _loader(profile: Mapping[str, Any], of: str) -> Iterator[TextTable]:
    loader = profile.get("loader")
    if loader:
        rows = [[part, _number(time)] for part, time in loader["parts"].items() if time is not None]
        ranks = loader["ranks_on_host"]
        note = (
            f"{_number(loader['ms_per_sample'])} ms a sample and core: a rank's steps need "
            f"{_number(loader['cores_needed'])} cores; {counted(ranks, 'rank')} of a host share "
            f"{loader['cores']}."
        )
        yield TextTable(f"{of}The loader", ["part", "ms a sample"], rows, note)


def _operators(profile: Mapping[str, Any], of: str) -> Iterator[TextTable]:
    top = (profile.get("operators") or {}).get("top")
    if top:
        rows = [
            [one["name"], str(one["phase"]), _number(one["calls"]), _number(one["ms"]), _percent(one["share"])]
            for one in top[:MOST_ROWS]
        ]
        yield TextTable(f"{of}Operators that take most", ["operator", "phase", "calls", "ms a step", "share"], rows)


def _waits(profile: Mapping[str, Any], of: str) -> Iterator[TextTable]:
    waits = profile.get("waits")
    if waits:
        rows = [
            [one["place"], str(one["what"]), str(one["phase"]), _number(one["calls"]), _number(one["ms"])]
            for one in waits[:MOST_ROWS]
        ]
        yield TextTable(f"{of}Where the host waits", ["place", "for", "phase", "calls", "ms a step"], rows)


def _collectives(profile: Mapping[str, Any], of: str) -> Iterator[TextTable]:
    collectives = profile.get("collectives")
    if collectives:
        plan = profile.get("planned")
        planned = {(row["phase"], row["kind"]): row for row in plan["collectives"]} if plan else {}
        link = profile.get("link_gbs")
        columns = ["phase", "kind", "calls", "MB each", "ms each", "GB/s (bus)", "exposed ms"]
        columns += ["of the link"] if link else []
        rows = []
        for one in collectives:
            row = [str(one["phase"]), str(one["kind"]).replace("_", "-")]
            row += [_number(one.get(key)) for key in ("calls", "mbytes", "ms", "bus_gbs", "exposed_ms")]
            row += [_percent(one.get("link_share"))] if link else []
            if plan:
                counted = planned.get((one["phase"], one["kind"]), {})
                row += [_number(counted.get(key)) for key in ("calls", "mbytes")]
            rows.append(row)
        columns += ["planned calls", "planned MB"] if plan else []
        yield TextTable(f"{of}Collectives of a step and rank", columns, rows)


def _finding(one: Mapping[str, Any]) -> str:
    said = str(one["text"])
    if one.get("key"):
        said += f" ({one['key']})"
    if one.get("gain_share") is not None:
        said += f": up to {_percent(one['gain_share'])} of a step"
    return said


def _median(spread: Mapping[str, Any] | None) -> str:
    return "" if spread is None else _number(spread["median"])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if 0.0 < value < LEAST:
        return f"< {LEAST:g}"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{CENT * share:.1f} %"
