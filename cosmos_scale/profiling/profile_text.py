"""A profile for people: the tables that `cosmos-scale profile` prints, in lines of 80 columns."""

from collections.abc import Iterator, Sequence
from typing import Any

from cosmos_scale.profiling.memory_timeline import BEFORE
from cosmos_scale.profiling.profile_record import ProfileRecord
from cosmos_scale.words import COLUMNS, counted, table_row

MIB, GIB = 2**20, 2**30
NAME, WIDE, PAIR, COLLECTIVE = 30, 10, 20, 26  # columns
CELLS = (6, 9, 8, 9, 11, 11)  # columns of a collective's numbers
CHART_WIDE, CHART_HIGH = 60, 4
MOST_ROWS = 6  # of lists
LONGEST = COLUMNS - 2  # name of a kernel: templates have hundreds of signs
LEAST = 0.001  # of the peak: owners of less are left out
LATE = 0.10  # a change by this part is pointed at


def profile_lines(record: ProfileRecord) -> Iterator[str]:
    """Yield the lines of a profile."""
    yield from _head(record)
    yield from _phases(record)
    yield from _operators(record)
    yield from _collectives(record)
    yield from _loader(record)
    yield from _memory(record)
    yield from _waits(record)
    yield from _findings(record)
    compared = record.get("compared")
    if compared and compared["keys"]:
        shown = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in list(compared["keys"].items())[:MOST_ROWS])
        yield table_row("other keys     ", shown)


def _head(record: ProfileRecord) -> Iterator[str]:
    setting, step, compared = record["setting"], record["step_ms"], record.get("compared")
    world, cost, added = record["world_size"], record["cost"], record["sum"]
    slowest = record["slowest_rank"]
    slow = f", rank {slowest} on {record['hosts'][slowest]} slowest" if world > 1 else ""
    yield table_row(
        "run ",
        f"{record['run']}: {counted(setting['steps'], 'step')} after {setting['warm_up']} of warm-up, "
        f"{counted(world, 'rank')}, {record['device']['name']}, {setting['precision']}, ZeRO {setting['zero_stage']}, "
        f"{counted(setting['samples_per_rank'], 'sample')} a rank{slow}",
    )
    yield table_row(
        "profiling ",
        f"itself cost {_percent(cost['marks'], 2)} of a step, by its marks (steps with and without them "
        f"differ by {_percent(cost['low'])} .. {_percent(cost['high'])}); the phases add up to "
        f"{_percent(1.0 - added['difference'])} of a step with marks ({_ms(added['step_ms'])} ms)",
    )
    if compared:
        on = f"{counted(compared['world_size'], 'rank')}, {compared['device']}"
        marks = "(!: changed by a tenth or more; ~: no more than the noise)"
        yield table_row("before: ", f"{compared['file']}, {on} {marks}")
    yield f"{'':{NAME}}{'median':>{WIDE}}{'quartiles':>{PAIR}}{'p95':>{WIDE}}"
    yield f"{'step, ms':{NAME}}{_ms(step['median']):>{WIDE}}{_quartiles(step):>{PAIR}}{_ms(step['p95']):>{WIDE}}"
    if compared:
        yield f"{'  before, ms':{NAME}}{_change(compared['step_ms'])}"
    speed = record["throughput"]
    tera = f"{speed['needed_tflops_per_rank']:.3g} needed TFLOP/s a rank"
    mfu, hfu = ("n/a" if speed[key] is None else _percent(speed[key]) for key in ("mfu", "hfu"))
    each = f"{speed['samples_per_second_per_rank']:,.1f}"
    before = f", before {compared['samples_per_second']:,.1f}" if compared else ""
    rate = f"{speed['samples_per_second']:,.1f} samples/s ({each} a rank{before})"
    yield table_row("speed ", f"{rate}, {tera}, MFU {mfu}, HFU {hfu}")


def _phases(record: ProfileRecord) -> Iterator[str]:
    yield f"{'where the step goes':{NAME}}{'device ms':>{WIDE}}{'%':>7}{'quartiles':>{PAIR}}{'host ms':>{WIDE}}"
    for phase in record["phases"]:
        device, host = phase["device_ms"], phase["host_ms"]
        yield (
            f"  {phase['label']:{NAME - 2}}{_ms(device['median']):>{WIDE}}{100 * phase['share']:>7.1f}"
            f"{_quartiles(device):>{PAIR}}{'' if host is None else _ms(host['median']):>{WIDE}}"
        )
        for part in phase["parts"]:
            own = part["device_ms"]
            yield (
                f"    {part['label']:{NAME - 4}}{_ms(own['median']):>{WIDE}}{100 * part['share']:>7.1f}"
                f"{_quartiles(own):>{PAIR}}"
            )
    yield from _ranks_and_before(record)


def _ranks_and_before(record: ProfileRecord) -> Iterator[str]:
    """Yield the phases again, with the ranks that take least and most, and with those of an earlier profile."""
    many, compared = record["world_size"] > 1, record.get("compared")
    if many or compared:
        head = f"{'  rank min .. max':>{PAIR}}{'of rank':>8}" if many else ""
        yield f"{'device ms':{NAME}}{head}" + (f"{'before':>{WIDE}}{'change':>{WIDE - 2}}" if compared else "")
    for phase in record["phases"] if many or compared else ():
        line = f"  {phase['label']:{NAME - 2}}"
        if many:
            ends = f"{_ms(phase['rank_min_ms'])} .. {_ms(phase['rank_max_ms'])}"
            line += f"{ends:>{PAIR}}{phase['rank_max']:>8,}"
        yield line + (_change(compared["phases"][phase["name"]]) if compared else "")


def _operators(record: ProfileRecord) -> Iterator[str]:
    kinds = "  ".join(f"{kind} {ms:.1f}" for kind, ms in record["operators"]["kinds"].items())
    name = "kernels" if record["device"]["type"] == "cuda" else "operators"
    yield table_row(f"{name:15}", f"{kinds} ms a step, traced")
    for work in record["operators"]["top"][:MOST_ROWS]:
        shown = work["name"] if len(work["name"]) <= LONGEST else f"{work['name'][: LONGEST - 3]}..."
        times = f"{work['calls']:>6.0f} x {work['ms']:>8.2f} ms {100 * work['share']:>5.1f} %"
        yield from _named(shown, f"{work['phase']:9}{times}")


def _named(name: str, numbers: str) -> Iterator[str]:
    """Yield a name and its numbers, which get a line of their own beside a name that is too long."""
    room = COLUMNS - len(numbers) - 3
    if len(name) <= room:
        yield f"  {name:{room}} {numbers}"
        return
    yield f"  {name}"
    yield f"{numbers:>{COLUMNS}}"


def _collectives(record: ProfileRecord) -> Iterator[str]:
    if not record["collectives"]:
        return
    planned = record["planned"] and {(row["phase"], row["kind"]): row for row in record["planned"]["collectives"]}
    link = record["link_gbs"]
    heads = ["calls", "MB each", "ms each", "GB/s bus", *(["of link"] if link else []), "exposed ms"]
    yield f"{'collectives':{COLLECTIVE}}" + _cells(heads)
    for row in record["collectives"]:
        numbers = [
            f"{row['calls']:.0f}",
            _known(row["mbytes"], ".3g"),
            _known(row["ms"], ".2f"),
            _known(row["bus_gbs"], ".2f"),
            *([_known(row["link_share"], ".1%")] if link else []),
            _known(row["exposed_ms"], ".2f"),
        ]
        yield f"  {row['phase'] + ', ' + row['kind']:{COLLECTIVE - 2}}{_cells(numbers)}"
        if planned:
            plan = planned.get((row["phase"], row["kind"]))
            counts = ["-", "-"] if plan is None else [f"{plan['calls']}", f"{plan['mbytes']:.3g}"]
            yield f"{'    planned':{COLLECTIVE}}{_cells(counts)}"


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, CELLS, strict=False))


def _loader(record: ProfileRecord) -> Iterator[str]:
    loader = record["loader"]
    parts = "  ".join(f"{name} {ms:.2f}" for name, ms in loader["parts"].items())
    ranks = loader["ranks_on_host"]
    together = f", {loader['cores_needed_on_host']:.2f} for {ranks:,} ranks of this host" if ranks > 1 else ""
    text = (
        f"{loader['ms_per_sample']:.2f} ms a sample and core: a step needs {loader['cores_needed']:.2f} "
        f"cores a rank{together}; {counted(loader['workers'], 'worker')} a rank"
    )
    yield table_row(f"{'loader':15}", text)
    computing = loader["cores_computing"]
    beside = f", of which the ranks compute on {min(computing, loader['cores'])}" if computing else ""
    yield f"{'':15}{counted(loader['cores'], 'core')} of this host{beside}"
    yield table_row(" " * 15, parts)


def _memory(record: ProfileRecord) -> Iterator[str]:
    memory = record["memory"]
    if memory is None:
        return
    large = {owner: size for owner, size in memory["owners"].items() if size >= LEAST * memory["peak_bytes"]}
    owners = "  ".join(f"{owner} {_size(nbytes)}" for owner, nbytes in large.items())
    planned, found = memory["planned_states_bytes"], memory["owners"].get(BEFORE, 0)
    formula = f" (what the step finds: {_size(found)}; planned for the states: {_size(planned)})"
    if memory["states_by_formula"]:
        formula = " (what the step finds: by formula)"
    reserved = ""
    if memory["reserved_bytes"] is not None:
        reserved = f"; reserved {_size(memory['reserved_bytes'])}, retries {memory['retries']}"
    yield table_row(
        f"{'memory':15}",
        f"peak {_size(memory['peak_bytes'])}{_planned_peak(record)} at {memory['peak_ms']:.1f} ms, in "
        f"{memory['peak_phase']}{formula}{reserved}; largest block {_size(memory['largest_block_bytes'])}",
    )
    yield table_row(" " * 15, f"held there, by who took it: {owners}")
    yield from _chart(memory["timeline"], memory["step_ms"])


def _planned_peak(record: ProfileRecord) -> str:
    if not record["planned"]:
        return ""
    measured, planned = record["memory"]["peak_bytes"], record["planned"]["peak_bytes"]
    return f" (planned {_size(planned)}; measured {100 * (measured / planned - 1):+.1f} %)"


def _chart(points: Sequence[Sequence[float]], step_ms: float) -> Iterator[str]:
    """Draw the memory over a step in lines of signs."""
    columns = [0.0] * CHART_WIDE
    for time, nbytes in points:
        place = min(CHART_WIDE - 1, max(0, int(CHART_WIDE * time / step_ms)))
        columns[place] = max(columns[place], nbytes)
    held = points[0][1]
    for place in range(CHART_WIDE):  # where nothing was taken, all is as before
        held = columns[place] = columns[place] or held
    low, high = min(columns), max(columns)
    rows = [round((CHART_HIGH - 1) * (value - low) / ((high - low) or 1.0)) for value in columns]
    for level in range(CHART_HIGH - 1, -1, -1):
        edge = {CHART_HIGH - 1: _size(high), 0: _size(low)}.get(level, "")
        signs = "".join("#" if row >= level else " " for row in rows)
        yield f"{edge:>14} |{signs.rstrip()}"
    yield f"{'':15}0 ms {'.' * (CHART_WIDE - 16)} {step_ms:.0f} ms"


def _waits(record: ProfileRecord) -> Iterator[str]:
    waits = record["waits"][:MOST_ROWS]
    if waits:
        yield "host waits     (of a step traced with Python's stack: slower than others)"
    for wait in waits:
        place = f"{wait['place']}, {wait['what']} ({wait['phase']})"
        yield from _named(place, f"{wait['calls']:>5.0f} x {wait['ms']:>8.2f} ms")


def _findings(record: ProfileRecord) -> Iterator[str]:
    if not record["findings"]:
        yield "findings       none that would gain 2 % of a step"
    for number, finding in enumerate(record["findings"], start=1):
        key = f": {finding['key']}" if finding["key"] else ""
        gain = ""
        if finding["gain_ms"] is not None:
            gain = f" (up to {finding['gain_ms']:.1f} ms, {_percent(finding['gain_share'])})"
        label = f"{'findings' if number == 1 else '':15}{number}. "
        yield table_row(label, f"{finding['text']}{key}{gain}")


def _change(change: dict[str, Any]) -> str:
    """Return two columns: the value before, and the change, with ! where it is large and no noise."""
    share = change["change"]
    if share is None:
        return f"{'-':>{WIDE}}"
    mark = " !" if change["clear"] and abs(share) >= LATE else "  " if change["clear"] else " ~"
    return f"{_ms(change['before']['median']):>{WIDE}}{100 * share:>+{WIDE - 4}.0f} %{mark}".rstrip()


def _quartiles(spread: dict[str, float]) -> str:
    return f"{_ms(spread['low'])} .. {_ms(spread['high'])}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _known(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"
