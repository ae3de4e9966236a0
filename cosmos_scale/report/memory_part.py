"""The memory's part of the report: whose it is at the peak, measured and planned, and how it goes over a step."""

from collections.abc import Iterator, Mapping
from typing import Any

from cosmos_scale.report.figures import Bar, Drawn, draw_lines_over, draw_stacks
from cosmos_scale.report.final_numbers import TextTable

MIB, GIB = 2.0**20, 2.0**30
MOST_PARTS = 7  # of a bar: the page has eight colours
SMALLEST = 0.01  # of the whole: a smaller part is one of the others
LEAST = 0.05 * MIB  # a smaller part has no row
OTHERS = "others"
OUTSIDE = "outside torch"


def measured_memory(profile: Mapping[str, Any], of: str, number: int) -> Iterator[tuple[Drawn, TextTable]]:
    """Yield what holds a profiled step's memory at its peak, as bars and as numbers; beside it the plan's, if any.

    of: what stands before the titles. number: of the run, in the names of pictures.
    """
    memory = profile.get("memory")
    if not memory:
        return
    stacks = {"measured": _whole(memory["owners"])}
    plan, phase = profile.get("planned"), memory["peak_phase"]
    note = f"Peak {memory['peak_bytes'] / MIB:,.1f} MiB in the phase {phase}"
    if plan:
        note += f"; planned {plan['peak_bytes'] / MIB:,.1f} MiB, measured {_against(memory, plan):+.1f} %"
    note += ". A part is what a phase has taken; what a step finds is there before it."
    planned = (plan or {}).get("phase_peaks") or {}  # profiles of older versions have the peak alone
    if planned.get(phase):
        stacks["planned"] = _whole(planned[phase])
        highest = max(planned, key=lambda one: sum(planned[one].values()))
        note += f" Planned is the most of the phase {phase} too"
        note += "." if highest == phase else f"; the plan's own peak is in the phase {highest}."
    if memory.get("states_by_formula"):
        note += " torch does not count a CPU's memory outside a trace: what the step finds is measured by formula."
    title = f"{of}Whose memory it is at the peak"
    yield _bars(f"memory-parts-{number}", title, stacks, MIB, "MiB"), _table(title, stacks, note)


def planned_memory(plan: Mapping[str, Any], of: str, number: int) -> tuple[Drawn, TextTable]:
    """Return what will hold a planned rank's memory at its peak, as bars and as numbers."""
    memory = plan["memory"]
    stacks = {"planned": {**_whole(memory["parts"]), OUTSIDE: float(memory["outside_torch_bytes"])}}
    whole, room = sum(stacks["planned"].values()), memory["gpu_bytes"]
    note = (
        f"Planned peak in the phase {memory['phase']}: {whole / GIB:,.2f} GiB of {room / GIB:,.1f} GiB. Outside torch: "
        "CUDA's context, NCCL and cuBLAS, assumed."
    )
    title = f"{of}Planned memory by what it holds"
    return _bars(f"memory-plan-{number}", title, stacks, GIB, "GiB"), _table(title, stacks, note)


def memory_timeline_of(profile: Mapping[str, Any], of: str, number: int) -> Iterator[Drawn]:
    """Yield the memory of a profiled step over its time."""
    timeline = (profile.get("memory") or {}).get("timeline")
    if timeline:
        step = -(-len(timeline) // 600)
        points = timeline[::step]
        lines = {"held": ([float(at) for at, _ in points], [size / MIB for _, size in points])}
        yield draw_lines_over(f"memory-{number}", f"{of}Memory over a step", lines, "ms of the step", "MiB")


def _whole(parts: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(size) for name, size in parts.items()}


def _against(memory: Mapping[str, Any], plan: Mapping[str, Any]) -> float:
    return float(100.0 * (memory["peak_bytes"] / plan["peak_bytes"] - 1))


def _bars(name: str, title: str, stacks: Mapping[str, Mapping[str, float]], unit: float, sign: str) -> Drawn:
    """Draw a bar for each of the stacks; parts that are small in all of them are drawn as one."""
    largest: dict[str, float] = {}
    for parts in stacks.values():
        for part, size in parts.items():
            largest[part] = max(largest.get(part, 0.0), size)
    whole = max(sum(parts.values()) for parts in stacks.values())
    shown = [part for part in sorted(largest, key=lambda part: -largest[part]) if largest[part] >= SMALLEST * whole]
    shown = shown[:MOST_PARTS]
    bars = []
    for label, parts in stacks.items():
        heights = {part: parts.get(part, 0.0) / unit for part in shown}
        if rest := sum(size for part, size in parts.items() if part not in shown):
            heights[OTHERS] = rest / unit
        bars.append(Bar(label, heights))
    return draw_stacks(name, title, bars, sign)


def _table(title: str, stacks: Mapping[str, Mapping[str, float]], note: str) -> TextTable:
    parts = list(dict.fromkeys(part for one in stacks.values() for part in one if one[part] >= LEAST))
    rows = [[part, *(_mib(one.get(part)) for one in stacks.values())] for part in parts]
    if len(stacks) > 1 or len(parts) > 1:
        rows.append(["all", *(_mib(sum(one.values())) for one in stacks.values())])
    return TextTable(title, ["part", *(f"{label}, MiB" for label in stacks)], rows, note)


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f}"
