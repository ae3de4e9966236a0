"""A survey of shards for people and programs: tables and histograms for a terminal, a picture, JSON."""

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cosmos_scale.data.tools.inspect import Survey, Tally
from cosmos_scale.data.tools.own_pictures import MARK, MARK_FIELD
from cosmos_scale.drawing import usual_figures
from cosmos_scale.files import make_folder, replace_file
from cosmos_scale.words import counted, figure_text, first_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 40  # characters of the longest bar of a terminal's histogram
BINS = 12
LONG_TAIL = 16  # times the median: where the quantile TAIL reaches so far, round bins would put almost all into one
LONGEST_NAME = 32  # characters of a source's name beside its numbers on 80 columns
COLUMNS = 4  # of the picture
FEWEST_BINS = 7  # a panel of the picture has room for so many bins at least
BLUE, PALE, RED, INK = "#1e5a8a", "#8fb3cf", "#9a3412", "#1c1c22"
TAIL = 0.995  # values above this quantile share the last bin, or one sample could squeeze all others into one bar
SMALLEST = 0.25  # where the bar of 0 begins on a logarithmic axis
SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
SHARE_NAMES = ("least", "5%", "median", "95%", "most")


class Bin(NamedTuple):
    """A bar of a histogram: its first and last whole number (None: no end), and its height, the number of values."""

    first: int
    last: int | None
    height: int


def histogram(values: Counter[int], most_bins: int = BINS) -> list[Bin]:
    """Sort whole numbers into bins; returns no bins for no values.

    The bins have one round width, or grow (1, 2-4, 5-9, 10-19, 20-49, ...) where the values have a long tail.
    """
    if not values:
        return []
    low, high = min(values), quantile(values, TAIL)
    if high >= LONG_TAIL * max(1, quantile(values, 0.5)):
        return _growing_bins(values, low, high)
    width = next(step for step in _round_steps() if (high - low) // step < most_bins)
    start = low // width * width
    bins = (high - start) // width + 1
    counts = [0] * bins
    for value, count in values.items():
        counts[min((value - start) // width, bins - 1)] += count
    beyond = max(values) >= start + bins * width
    edges = [(start + place * width, start + (place + 1) * width - 1) for place in range(bins)]
    return [
        Bin(first, None if beyond and place == bins - 1 else last, counts[place])
        for place, (first, last) in enumerate(edges)
    ]


def _growing_bins(values: Counter[int], low: int, high: int) -> list[Bin]:
    steps = takewhile(lambda step: step <= high, _round_steps())
    firsts = [0, *steps]
    firsts = [first for first, after in zip(firsts, [*firsts[1:], high + 1], strict=True) if after > low]
    heights = [0] * len(firsts)
    for value, times in values.items():
        heights[bisect_right(firsts, value) - 1] += times
    lasts = [first - 1 for first in firsts[1:]]
    end = next(step for step in _round_steps() if step > high) - 1
    return [
        Bin(first, last, height)
        for first, last, height in zip(firsts, [*lasts, None if max(values) > end else end], heights, strict=True)
    ]


def quantile(values: Counter[int], share: float) -> int:
    """Return the smallest value that at least this share of all values does not exceed."""
    needed = share * values.total()
    passed = 0
    for value in sorted(values):
        passed += values[value]
        if passed >= needed:
            return value
    raise ValueError("no values")


def mean(values: Counter[int]) -> float:
    """Return the mean of all values."""
    return sum(value * count for value, count in values.items()) / values.total()


def measures(tally: Tally) -> dict[str, Counter[int]]:
    """Return what is measured of each sample or caption, by name; aspect in percent, size in thousands of pixels."""
    widths, heights, pixels, aspects = (Counter[int]() for _ in range(4))
    for (width, height), count in tally.sizes.items():
        widths[width] += count
        heights[height] += count
        pixels[round(width * height / 1000)] += count
        aspects[round(100 * width / height)] += count
    return {
        "sentences to choose from": tally.sentences,
        "tokens, global caption": tally.global_tokens,
        "tokens, local caption": tally.local_tokens,
        "width, pixels": widths,
        "height, pixels": heights,
        "size, thousand pixels": pixels,
        "width / height, %": aspects,
    }


def cut_share(tokens: Counter[int], context_length: int) -> float:
    """Return the share of captions that are longer than the text tower's positions."""
    return sum(count for length, count in tokens.items() if length > context_length) / max(1, tokens.total())


def as_json(survey: Survey, context_length: int) -> dict[str, Any]:
    """Return a survey as plain values, histograms by value in full."""
    tally = survey.tally
    return {
        "sources": [source._asdict() for source in survey.sources],
        "samples": survey.total,
        "read": survey.read,
        "not_in_index": {kind: number for kind, number in survey.unindexed._asdict().items() if kind != "again"},
        "again": survey.unindexed.again,
        "damaged": dict(tally.damaged),
        "image_bytes": tally.image_bytes,
        "text_bytes": tally.text_bytes,
        "formats": dict(tally.formats),
        "transparent": tally.transparent,
        "turned": tally.turned,
        "animated": tally.animated,
        "measures": {name: _figures(values) for name, values in measures(tally).items() if values},
        "context_length": context_length,
        "cut_global": cut_share(tally.global_tokens, context_length),
        "cut_local": cut_share(tally.local_tokens, context_length),
    }


def _figures(values: Counter[int]) -> dict[str, Any]:
    shares = {name: quantile(values, share) for name, share in zip(SHARE_NAMES, SHARES, strict=True)}
    return {"mean": mean(values), **shares, "histogram": {str(value): values[value] for value in sorted(values)}}


def print_survey(survey: Survey, sampling: str, context_length: int, seed: int, epoch: int, console: Console) -> None:
    """Print a survey on a terminal."""
    tally = survey.tally
    _show_sources(survey, console)
    which = "all samples" if survey.read == survey.total else f"{counted(survey.read, 'sample')} drawn at random"
    console.print(
        f"\nread: {which}; captions as epoch {epoch} of seed {seed} draws them, sampling {sampling}", soft_wrap=True
    )
    if left := survey.unindexed.describe():
        console.print(left, soft_wrap=True)
    if tally.damaged:
        count = tally.damaged.total()
        console.print(
            f"damaged: {count:,} of {survey.read:,} ({count / survey.read:.2%}); `data verify` names them all"
        )
        for reason, times in tally.damaged.most_common(5):
            console.print(f"  {times:,} x {reason}", soft_wrap=True)
    if not tally.samples:
        return
    console.print(
        f"pictures: {_shares(tally.formats)}; {tally.image_bytes / tally.samples / 1000:.1f} kB on average"
        + (f"; {tally.transparent:,} transparent (data.background)" if tally.transparent else "")
        + (f"; {tally.turned:,} with an EXIF tag that turns them, which training ignores" if tally.turned else "")
        + _animated(tally.animated),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("mean", *SHARE_NAMES):
        table.add_column(name, justify="right")
    for name, values in measures(tally).items():
        if values:
            table.add_row(name, f"{mean(values):,.1f}", *(f"{quantile(values, share):,}" for share in SHARES))
    console.print()
    console.print(table)
    cut = {"global": tally.global_tokens, "local": tally.local_tokens}
    shares = ", ".join(f"{cut_share(tokens, context_length):.1%} of {kind} captions" for kind, tokens in cut.items())
    console.print(f"cut off at {context_length} tokens: {shares}")
    for title, values in list(measures(tally).items())[:3]:
        _show_histogram(title, values, console)


def _animated(pictures: int) -> str:
    return f"; {counted(pictures, 'animated picture')}, {first_frame(pictures)} read" if pictures else ""


def _show_sources(survey: Survey, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    for name in ("shards", "samples", "bytes"):
        table.add_column(name, justify="right")
    rows = [*survey.sources]
    for number, source in enumerate(rows, 1):
        name = source.name
        if len(name) > LONGEST_NAME:
            name = f"source {number}"
            console.print(f"{name}: {source.name}", highlight=False, soft_wrap=True)
        table.add_row(name, f"{source.shards:,}", f"{source.samples:,}", f"{source.size:,}")
    if len(rows) > 1:
        totals = (sum(column) for column in zip(*(row[1:] for row in rows), strict=True))
        table.add_row("together", *(f"{total:,}" for total in totals))
    console.print(table)


def _show_histogram(title: str, values: Counter[int], console: Console) -> None:
    bins = histogram(values)
    if not bins:
        return
    tallest = max(bar.height for bar in bins)
    names = [_bin_name(bar) for bar in bins]
    full, thin = ("█", "▏") if console.encoding.startswith("utf") else ("#", "|")
    console.print(f"\n{title}")
    for name, bar in zip(names, bins, strict=True):
        length = round(BAR * bar.height / tallest)
        line = full * length if length or not bar.height else thin
        console.print(f"  {name:>{max(map(len, names))}} {line:<{BAR}} {bar.height / values.total():6.1%}")


def _bin_name(bar: Bin) -> str:
    if bar.last is None:
        return f"{bar.first:,}+"
    return f"{bar.first:,}" if bar.first == bar.last else f"{bar.first:,}-{bar.last:,}"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    common = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {count / total:.1%}" for name, count in common)


@usual_figures()
def draw_survey(survey: Survey, context_length: int, path: Path) -> None:
    """Write a PNG with a histogram of every measure, and the shares of picture formats."""
    from matplotlib.figure import Figure  # here: it takes half a second

    shown = {name: values for name, values in measures(survey.tally).items() if values}
    rows = -(-(len(shown) + 1) // COLUMNS)
    figure = Figure(figsize=(4.0 * COLUMNS, 3.0 * rows + 0.5), dpi=100, layout="constrained")
    read = "all" if survey.read == survey.total else f"{survey.read:,} of"
    names = ", ".join(source.name for source in survey.sources)
    title = f"{names}: {read} {counted(survey.total, 'sample')}; dotted: median"
    figure.suptitle(figure_text(title), fontsize=11, wrap=True)
    panels = [figure.add_subplot(rows, COLUMNS, place + 1) for place in range(len(shown) + 1)]
    for axes, (name, values) in zip(panels, shown.items(), strict=False):
        _draw_histogram(axes, name, values)
        if values is survey.tally.global_tokens or values is survey.tally.local_tokens:
            _mark_cut(axes, context_length)
    _draw_formats(panels[-1], survey.tally.formats)
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    make_folder(path.parent)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", metadata={MARK_FIELD: MARK})
    replace_file(path, encoded.getvalue())


def _draw_histogram(axes: "Axes", name: str, values: Counter[int]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    widths: list[float]
    bins = histogram(values, most_bins=40)
    pale = bins[-1].last is None
    colours = [BLUE] * (len(bins) - 1) + [PALE if pale else BLUE]
    # Half a unit to the left, so that a whole number stands in the middle of its bar.
    lefts, heights = [bar.first - 0.5 for bar in bins], [bar.height / values.total() for bar in bins]
    widths = [bar.last - bar.first + 1 if bar.last is not None else 0 for bar in bins]
    width = widths[0] or 1
    growing = len({*widths} - {0}) > 1
    if growing:
        lefts[0] = max(lefts[0], SMALLEST)  # 0 has no place on a logarithmic axis
        widths[0] = int(bins[0].last or 0) + 0.5 - lefts[0]
        axes.set_xscale("log")
    if pale:
        widths[-1] = bins[-1].first if growing else width
    axes.bar(lefts, heights, width=widths, align="edge", color=colours, edgecolor="white", linewidth=0.4)
    axes.axvline(quantile(values, 0.5), color=INK, linewidth=0.9, linestyle=":")
    if len(bins) < FEWEST_BINS and not growing:  # otherwise one bar would fill the panel
        middle = lefts[0] + width * len(bins) / 2
        axes.set_xlim(middle - width * FEWEST_BINS / 2, middle + width * FEWEST_BINS / 2)
    axes.set_xlabel(f"{name} (pale: {bins[-1].first:,} and more)" if pale else name, fontsize=9)
    axes.set_ylabel("share", fontsize=9)
    if not growing:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _mark_cut(axes: "Axes", context_length: int) -> None:
    """Draw a line behind the last token that a caption keeps, if the axis reaches so far."""
    if axes.get_xlim()[1] <= context_length:
        return
    axes.axvline(context_length + 0.5, color=RED, linewidth=1)
    # Where all captions are cut, the axis may begin behind the line: a word out there would leave the panels no room.
    place = (max(context_length + 0.5, axes.get_xlim()[0]), 0.97)
    axes.annotate(
        f" cut at {context_length}", place, xycoords=axes.get_xaxis_transform(), color=RED, fontsize=8, va="top"
    )


def _draw_formats(axes: "Axes", formats: Counter[str]) -> None:
    from matplotlib.ticker import PercentFormatter

    common = formats.most_common(8)[::-1]
    axes.barh([name for name, _ in common], [count / formats.total() for _, count in common], color=BLUE, height=0.6)
    axes.set_xlabel("picture formats", fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(common) - max(len(common), 4) - 0.6, len(common) - 0.4)  # a single bar keeps its height


def _round_steps() -> Iterator[int]:
    step = 1
    while True:
        for factor in (1, 2, 5):
            yield factor * step
        step *= 10
