"""Pictures as SVG inside of the page: drawn by matplotlib, coloured by the page, with data for its cursor."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_scale.drawing import usual_figures
from cosmos_scale.report.plots import Plot, RunCurves
from cosmos_scale.report.series import Curve, Point
from cosmos_scale.words import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"steps": "step", "samples": "samples", "hours": "hours since the start"}
WIDTH, HEIGHT, POINTS_PER_INCH = 4.0, 2.4, 72.0  # inches: on a phone the letters are as large as the page's
LETTERS = 8.5  # points

# Colours that stand for the page's own: matplotlib writes them, `_svg` replaces them by variables of the style sheet.
INK, GRID = "#0a0b01", "#0a0b02"
_RUN = "#0a0c{:02x}"
_VARIABLES = re.compile(r"#0a0(?:b01|b02|c[0-9a-f]{2})")


class Drawn(NamedTuple):
    """A picture for the page. svgs: by axis. data: what the cursor of the page reads, None where there is no cursor."""

    name: str
    title: str
    svgs: dict[str, str]
    said: str
    note: str = ""
    data: dict[str, Any] | None = None


class Bar(NamedTuple):
    """A bar of a histogram; parts: its height by the names of what is stacked."""

    label: str
    parts: dict[str, float]


def draw_plot(plot: Plot, batches: Sequence[int | None]) -> Drawn:
    """Draw a picture over steps, samples and hours. batches: the samples of a step of each run, None: not known."""
    svgs, axes_data = {}, {}
    for axis in AXES:
        if axis == "samples" and not any(batches):
            continue
        if axis == "hours" and not _has_hours(plot):
            continue
        svgs[axis], axes_data[axis] = _draw_over(plot, axis, batches)
    data = {
        "axes": axes_data,
        "unit": plot.unit,
        "curves": [
            {
                "run": run,
                "label": curve.label,
                "steps": [point.step for point in curve.points],
                "hours": [None if math.isnan(point.hours) else _short(point.hours) for point in curve.points],
                "values": [_short(point.value) for point in curve.points],
            }
            for run, curves in enumerate(plot.runs)
            for curve in curves.curves
        ],
    }
    return Drawn(plot.name, plot.title, svgs, _said(plot), plot.note, data)


@usual_figures()
def draw_bars(name: str, title: str, bars: Sequence[Bar], x_label: str, y_label: str, note: str = "") -> Drawn:
    """Draw a histogram; parts of equal names have equal colours, and a legend where there are several."""
    figure, axes = _new_figure()
    places = range(len(bars))
    names = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    below = [0.0] * len(bars)
    for number, part in enumerate(names):
        heights = [bar.parts.get(part, 0.0) for bar in bars]
        axes.bar(places, heights, 0.85, below, color=_RUN.format(number), label=part)
        below = [under + height for under, height in zip(below, heights, strict=True)]
    shown = list(places)[:: max(1, -(-len(bars) // 8))]
    axes.set_xticks(shown, [figure_text(bars[place].label) for place in shown])
    axes.set_xlabel(figure_text(x_label))
    axes.set_ylabel(figure_text(y_label))
    axes.grid(visible=False, axis="x")
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=LETTERS, labelcolor=INK)
    said = f"{title}: " + ", ".join(f"{bar.label}: {sum(bar.parts.values()):g}" for bar in bars)
    return Drawn(name, title, {"steps": _svg(figure, f"{name}-bars")}, said, note)


@usual_figures()
def draw_stacks(name: str, title: str, bars: Sequence[Bar], unit: str) -> Drawn:
    """Draw a lying bar for each of some stacks, the first one at the top; parts of equal names have equal colours."""
    figure, axes = _new_figure((0.2, 0.18, 0.76, 0.42))
    places = range(len(bars))
    names = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    left = [0.0] * len(bars)
    for number, part in enumerate(names):
        widths = [bar.parts.get(part, 0.0) for bar in bars]
        axes.barh(places, widths, 0.7, left, color=_RUN.format(number), label=figure_text(part))
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [figure_text(bar.label) for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel(figure_text(unit))
    axes.grid(visible=False, axis="y")
    axes.legend(
        frameon=False, fontsize=LETTERS, labelcolor=INK, loc="lower left", bbox_to_anchor=(-0.25, 1.0), ncols=2,
        handlelength=1.0, columnspacing=1.2, labelspacing=0.25, borderpad=0.0,
    )  # fmt: skip
    said = "; ".join(
        f"{bar.label}: " + ", ".join(f"{part} {size:,.1f} {unit}" for part, size in bar.parts.items()) for bar in bars
    )
    return Drawn(name, title, {"steps": _svg(figure, f"{name}-stacks")}, f"{title}: {said}")


@usual_figures()
def draw_lines_over(
    name: str, title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> Drawn:
    """Draw some lines, each of its x and y by its label, over something that is neither steps nor hours."""
    figure, axes = _new_figure()
    for number, (label, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, color=_RUN.format(number), label=figure_text(label), linewidth=1.3)
    axes.set_xlabel(figure_text(x_label))
    axes.set_ylabel(figure_text(y_label))
    axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=LETTERS, labelcolor=INK)
    greatest = ", ".join(f"{label} at most {max(y):.4g}" for label, (_, y) in lines.items() if len(y))
    return Drawn(name, title, {"steps": _svg(figure, f"{name}-lines")}, f"{title}: {greatest}")


def _has_hours(plot: Plot) -> bool:
    return any(not math.isnan(point.hours) for point in _points(plot))


def _points(plot: Plot) -> Iterator[Point]:
    for run in plot.runs:
        for curve in run.curves:
            yield from curve.points


@usual_figures()
def _draw_over(plot: Plot, axis: str, batches: Sequence[int | None]) -> tuple[str, dict[str, Any]]:
    """Return the picture over one axis, and where its data lie in it: see `_extent`."""
    figure, axes = _new_figure()
    for number, (run, batch) in enumerate(zip(plot.runs, batches, strict=True)):
        _draw_run(axes, number, run, axis, batch, several=len(plot.runs) > 1)
    axes.set_xlabel(AXES[axis])
    if plot.unit:
        axes.set_ylabel(figure_text(plot.unit))
    if plot.logarithmic and any(point.value > 0 for point in _points(plot)):
        axes.set_yscale("log")
        _few_log_ticks(axes)
    elif plot.from_zero:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low), high if high > 0 else 1.0)
    kinds = _kinds(plot)
    if len(kinds) > 1:
        _key(axes, kinds)
    svg = _svg(figure, f"{plot.name}-{axis}")
    return svg, _extent(figure, axes)


def _draw_run(axes: "Axes", number: int, run: RunCurves, axis: str, batch: int | None, *, several: bool) -> None:
    colour = _RUN.format(number)
    if run.band is not None and len(run.band[0].points) > 1:
        low, high = run.band
        x, bottom = _xy(low, axis, batch)
        _, top = _xy(high, axis, batch)
        span = axes.fill_between(x, bottom, top, color=colour, alpha=0.25, linewidth=0)
        span.set_gid(f"run{number}-band")
    for curve in run.curves:
        x, y = _xy(curve, axis, batch)
        if len(x) < 40:
            marker, size = "o", 2.6
        else:
            marker, size = "", 0.0
        style = "--" if curve.dashed else "-"
        (line,) = axes.plot(x, y, style, color=colour, linewidth=1.3, marker=marker, markersize=size)
        line.set_gid(f"run{number}-{curve.key}")
        if several and x and not curve.dashed:  # so that colour is not the only sign
            end = axes.annotate(
                str(number + 1),
                (x[-1], y[-1]),
                (3, 0),
                textcoords="offset points",
                color=colour,
                fontsize=LETTERS,
                va="center",
            )
            end.set_gid(f"run{number}-number")
    _draw_marks(axes, number, run, axis, batch)


def _draw_marks(axes: "Axes", number: int, run: RunCurves, axis: str, batch: int | None) -> None:
    """Draw a dotted line at each resume, and a cross at each skipped step."""
    from matplotlib.collections import LineCollection

    by_step = {point.step: point for curve in run.curves for point in curve.points}
    across, colour = axes.get_xaxis_transform(), _RUN.format(number)  # in heights of the picture
    resumed, skipped = (
        [x for step in steps if (x := _place(step, by_step, axis, batch)) is not None]
        for steps in (run.resumed, run.skipped)
    )
    if resumed:
        lines = [((x, 0.0), (x, 1.0)) for x in resumed]
        marks = LineCollection(lines, colors=colour, linewidths=0.9, linestyles=":", transform=across)
        marks.set_gid(f"run{number}-resume")
        axes.add_collection(marks, autolim=False)
    if skipped:
        (crosses,) = axes.plot(skipped, [0.04] * len(skipped), "x", color=colour, markersize=4.5, transform=across)
        crosses.set_gid(f"run{number}-skip")


def _xy(curve: Curve, axis: str, batch: int | None) -> tuple[list[float], list[float]]:
    points = [(_x_of(point.step, point.hours, axis, batch), point.value) for point in curve.points]
    known = [(x, value) for x, value in points if x is not None]
    return [x for x, _ in known], [value for _, value in known]


def _x_of(step: int, hours: float, axis: str, batch: int | None) -> float | None:
    if axis == "hours":
        return None if math.isnan(hours) else hours
    if axis == "samples":
        return None if batch is None else float(step * batch)
    return float(step)


def _place(step: int, by_step: dict[int, Any], axis: str, batch: int | None) -> float | None:
    """Return where a step lies on an axis; on that of hours where the first point from this step on lies."""
    at = min((other for other in by_step if other >= step), default=None)
    hours = math.nan if at is None else by_step[at].hours
    return _x_of(step, hours, axis, batch)


def _new_figure(place: tuple[float, float, float, float] = (0.15, 0.18, 0.81, 0.79)) -> "tuple[Figure, Axes]":
    """Return a figure and its axes. place: of the axes, left, bottom, width and height in shares of the figure."""
    from matplotlib.figure import Figure  # here: it takes half a second

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=POINTS_PER_INCH, facecolor="none")
    # Fixed: matplotlib would take half of the time to find how much room the letters need.
    axes = figure.add_axes(place, facecolor="none")
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(which="both", colors=INK, labelsize=LETTERS, length=0)
    axes.xaxis.label.set(color=INK, fontsize=LETTERS)
    axes.yaxis.label.set(color=INK, fontsize=LETTERS)
    axes.locator_params(axis="x", nbins=5)
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_formatter(lambda value, _: in_few_signs(value))
    axes.margins(x=0.03)
    return figure, axes


def _few_log_ticks(axes: "Axes") -> None:
    """Label a logarithmic axis in plain numbers, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    narrow = high / low < 300 if low > 0 else False
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.yaxis.set_major_formatter(lambda value, _: in_few_signs(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _kinds(plot: Plot) -> dict[str, bool]:
    """The curves of a run by their labels, and whether they are dashed."""
    return {curve.label: curve.dashed for run in plot.runs for curve in run.curves}


def _key(axes: "Axes", kinds: dict[str, bool]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=INK, linewidth=1.3, linestyle="--" if dashed else "-") for dashed in kinds.values()]
    axes.legend(
        lines,
        [figure_text(label) for label in kinds],
        frameon=False,
        fontsize=LETTERS,
        labelcolor=INK,
        handlelength=2.4,
    )


def _extent(figure: "Figure", axes: "Axes") -> dict[str, Any]:
    """Where the axes lie in the picture, in its own units from its top left, and the numbers at their edges."""
    box = axes.get_window_extent()
    height = figure.get_figheight() * POINTS_PER_INCH
    low, high = axes.get_ylim()
    return {
        "left": _short(box.x0),
        "right": _short(box.x1),
        "top": _short(height - box.y1),
        "bottom": _short(height - box.y0),
        "x": list(axes.get_xlim()),
        "y": [low, high],
        "log": axes.get_yscale() == "log",
    }


def _svg(figure: "Figure", name: str) -> str:
    """Return a picture as SVG in the page's colours, whose ids begin with its name."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", dpi=POINTS_PER_INCH, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[^"]*pt"', "", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = _VARIABLES.sub(lambda match: _variable(match[0]), text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _variable(colour: str) -> str:
    if colour == INK:
        return "var(--ink-soft)"
    return "var(--rule)" if colour == GRID else f"var(--run-{int(colour[-2:], 16) % 8})"


def _said(plot: Plot) -> str:
    """A picture in words, for those who do not see it."""
    return "; ".join(_said_of_runs(plot))


def _said_of_runs(plot: Plot) -> Iterator[str]:
    yield plot.title
    for number, run in enumerate(plot.runs):
        for curve in run.curves:
            first, last = curve.points[0], curve.points[-1]
            which = f"run {number + 1}, " if len(plot.runs) > 1 else ""
            unit = f" {plot.unit}" if plot.unit else ""
            yield (
                f"{which}{curve.label}: {first.value:.4g}{unit} at step {first.step:,}, "
                f"{last.value:.4g}{unit} at step {last.step:,}"
            )


def in_few_signs(value: float) -> str:
    """Return a number for an axis: 0.98, 5k, 20M."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:,.4g}{sign}"
    return f"{value:.4g}"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
