"""The page and the picture of a GPU report, made of its rows."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HIDDEN = ("stage", "seconds")
NO_BOXES = dict.fromkeys(range(0x2500, 0x2580))  # lines of tables, which a line of the page cannot show
LONGEST = 160  # characters of a value on the page; report.jsonl has all of it
REHEARSAL = "A rehearsal with tiny sizes: every stage takes 2 samples or few tokens, and its times say nothing."
MOST_LINES = 25  # of a list's rows on the page


def read_rows(path: Path) -> list[Row]:
    """Read report.jsonl; a line that is torn is left out. No file: no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def wrong_rows(rows: Iterable[Row]) -> list[str]:
    """Return a line for each row that found something wrong."""
    return [f"{row['stage']}: {_values(row)}" for row in rows if row.get("ok") is False]


def write_page(rows: list[Row], out: Path) -> list[Path]:
    """Write report.md, and report.png where matplotlib is installed; return what was written."""
    page = out / "report.md"
    page.write_text("\n".join(_lines(rows)) + "\n", encoding="utf-8")
    parts = [row for row in rows if row.get("what") == "parts"]
    if not parts or importlib.util.find_spec("matplotlib") is None:
        return [page]
    picture = out / "report.png"
    rehearsal = any(row.get("rehearsal") for row in rows)
    _draw(parts, [row for row in rows if "loop" in row], picture, rehearsal=rehearsal)
    return [page, picture]


def _lines(rows: list[Row]) -> list[str]:
    machine = next((row for row in rows if row["stage"] == "machine"), {})
    lines = ["# GPU report", "", f"{machine.get('device', 'unknown device')}, torch {machine.get('torch', 'unknown')}"]
    if machine.get("rehearsal"):
        lines += ["", REHEARSAL]
    wrong = wrong_rows(rows)
    lines += ["", "Nothing wrong was found." if not wrong else "Wrong:", *(f"- {line}" for line in wrong)]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines += ["", f"## {stage}", ""]
        for row in (row for row in rows if row["stage"] == stage):
            lines.append(f"- {row['seconds']:.1f} s: {_values(row)}")
            for value in row.values():
                if _is_table(value):
                    lines += [f"  - {', '.join(map(_text, each))}" for each in value[:MOST_LINES]]
    return lines


def _values(row: Row) -> str:
    shown = {name: value for name, value in row.items() if name not in HIDDEN}
    return ", ".join(f"{name}:" if _is_table(value) else f"{name} {_text(value)}" for name, value in shown.items())


def _is_table(value: object) -> bool:
    """Tell whether a value is a list of rows, such as kernels with their times."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(of)}" for name, of in value.items())
    text = " ".join(str(value).translate(NO_BOXES).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _draw(parts: list[Row], loops: list[Row], picture: Path, *, rehearsal: bool) -> None:
    """Draw for each stage the time of the step's parts, and the samples a second of its loops."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.5), layout="constrained")
    if rehearsal:
        figure.suptitle(REHEARSAL)
    stages = [row["stage"] for row in parts]
    below = [0.0] * len(parts)
    for part in parts[0]["parts_ms"]:
        times = [row["parts_ms"][part] for row in parts]
        left.bar(stages, times, bottom=below, label=part)
        below = [low + spent for low, spent in zip(below, times, strict=True)]
    left.set(title="Parts of the step, one after the other", ylabel="ms")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    kinds = list(dict.fromkeys(row["loop"] for row in loops))
    names = list(dict.fromkeys(row["stage"] for row in loops))
    for number, kind in enumerate(kinds):
        rates = {row["stage"]: row["samples_per_s"] for row in loops if row["loop"] == kind}
        places = [place + 0.8 / len(kinds) * (number - (len(kinds) - 1) / 2) for place in range(len(names))]
        right.bar(places, [rates.get(name, 0.0) for name in names], 0.8 / len(kinds), label=kind)
    right.set_xticks(range(len(names)), names)
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    right.set(title="Samples a second", ylabel="samples/s")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
