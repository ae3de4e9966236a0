"""The page and the picture of a GPU report, made of its rows."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HIDDEN = ("stage", "seconds")
LONGEST = 160  # characters of a value on the page; report.jsonl has all of it


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
    _draw(parts, [row for row in rows if "loop" in row], picture)
    return [page, picture]


def _lines(rows: list[Row]) -> list[str]:
    machine = next((row for row in rows if row["stage"] == "machine"), {})
    lines = ["# GPU report", "", f"{machine.get('device', 'unknown device')}, torch {machine.get('torch', 'unknown')}"]
    wrong = wrong_rows(rows)
    lines += ["", "Nothing wrong was found." if not wrong else "Wrong:", *(f"- {line}" for line in wrong)]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines += ["", f"## {stage}", ""]
        lines += [f"- {row['seconds']:.1f} s: {_values(row)}" for row in rows if row["stage"] == stage]
    return lines


def _values(row: Row) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in row.items() if name not in HIDDEN)


def _text(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _draw(parts: list[Row], loops: list[Row], picture: Path) -> None:
    """Draw for each stage the time of the step's parts, and the samples a second of its loops."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    stages = [row["stage"] for row in parts]
    below = [0.0] * len(parts)
    for part in parts[0]["parts_ms"]:
        times = [row["parts_ms"][part] for row in parts]
        left.bar(stages, times, bottom=below, label=part)
        below = [low + spent for low, spent in zip(below, times, strict=True)]
    left.set(title="Parts of the step, one after the other", ylabel="ms")
    left.legend(frameon=False)
    labels = [f"{row['stage']}\n{row['loop'].replace(' ', chr(10))}" for row in loops]
    right.bar(range(len(loops)), [row["samples_per_s"] for row in loops], color="tab:green")
    right.set_xticks(range(len(loops)), labels, fontsize=7)
    right.set(title="Samples a second", ylabel="samples/s")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
