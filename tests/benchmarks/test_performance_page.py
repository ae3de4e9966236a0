"""Each number that docs/performance.md calculates is what its command prints; a changed number is found.

The page's numbers are listed in their order, paragraph by paragraph: by the name of a figure, or as a text where a
number is no result (a setting, a width of a dtype, a number of samples). The figures are made anew here.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from benchmarks import kernel_bytes, loss_memory
from benchmarks.device_counts import block_counts
from benchmarks.device_counts import figures as count_figures
from benchmarks.paper_model import (
    CHIPS,
    HOST_MS,
    HOST_OPERATORS,
    NODE,
    StepWork,
    count_work,
    fp8_figures,
    host_figures,
    paper_step,
    parts_table,
    scaling_table,
    share_figures,
)
from benchmarks.report import LOG_WIDTH, Figure
from cosmos_scale.loss.cosmos_loss import COLUMNS_AT_ONCE
from cosmos_scale.profiling.rates import CAUTIOUS, HOPEFUL
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
CALCULATED = "On a GPU the update"  # with these words begins what is calculated; figures above are measured
PLANNED = "`cosmos-scale plan RUN"  # and so does the part of `cosmos-scale plan`, up to the next heading
NUMBER = re.compile(r"(?<![\w.,/-])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
NO_NUMBERS = re.compile(r"`[^`]*`|\]\([^)]*\)|ViT-B/\d+")
END = "vitb16_64"
PERCENT = 100.0


class Of(NamedTuple):
    """A figure, and what the page multiplies it by."""

    name: str
    factor: float = 1.0


def both(name: str, factor: float = 1.0) -> list[Of | str]:
    return [Of(f"{name}_hopeful", factor), Of(f"{name}_cautious", factor)]


Source = Of | str
PARAGRAPHS: list[tuple[str, list[Source]]] = [
    (
        "On a GPU the update of all weights",
        [
            *(Of("update_bytes_state"), "2", "4", "2", Of("update_bytes_float32_separate")),
            *(Of("update_bytes_float32"), Of("norm_passes_torch"), Of("norm_passes")),
        ],
    ),
    (
        "A rank multiplies its rows",
        [Of("columns at once"), Of("ranks"), Of("rank samples"), Of("views"), Of("views"), Of("width")],
    ),
    (
        "| samples of all ranks",
        [
            *("16,384", Of("gathered 16384"), Of("loss_memory_16384"), Of("loss_memory_16384_at_once")),
            *("65,536", Of("gathered 65536"), Of("loss_memory_65536"), Of("loss_memory_65536_at_once")),
            *("262,144", Of("gathered 262144"), Of("loss_memory_262144")),
            *("1,048,576", Of("gathered 1048576"), Of("loss_memory_1048576")),
            *(Of("loss_at_once_sample", 2**20 / 2**30), Of("loss_at_once_sample", 1e-3)),
        ],
    ),
    ("What still grows", [Of("loss_statistics_sample"), Of("columns at once")]),
    (
        "The gathered features themselves",
        [*[Of("loss_gathered_sample", 1e-3)] * 2, Of("loss_ring_samples", 1e-6), "8", "80"],
    ),
    (
        "A step of a rank alone launches",
        [
            *(Of(f"step_launches_{END}"), Of("blocks"), Of("blocks student"), Of("blocks teacher")),
            *(Of("blocks backward"), Of("launch us hopeful"), Of("launch us cautious"), *both("host ms")),
            *(Of("measured host ms"), Of("measured operators"), "1", Of(f"host_us_operator_{END}")),
            *(Of(f"step_launches_{END}"), Of(f"host_ms_{END}"), "64"),
        ],
    ),
    (
        "| samples a GPU | H100",
        [
            source
            for run, samples in (("vitb16", "64"), ("vitb16", "32"), ("vitb32", "64"), ("vitb32", "32"))
            for source in [samples, *both(f"device {run} {samples} H100"), *both(f"device {run} {samples} B200")]
        ],
    ),
    ("So ViT-B/16 waits for no host", ["32", "64", "32", "64", Of("blocks teacher")]),
    (
        "The student's blocks are no CUDA graph",
        [
            *(Of("traffic cautious"), Of(f"host_graph_replays_{END}"), Of(f"host_graph_launches_{END}")),
            *(Of(f"host_graph_ms_{END}"), Of(f"host_ms_{END}")),
        ],
    ),
    (
        "FP8 is not there",
        [
            *(Of("blocks teacher tflop"), Of(f"step_tflop_{END}"), "64"),
            *(
                Of(f"fp8_share_teacher_{END}", PERCENT),
                *both(f"fp8_saved_teacher_{END}"),
                *both("device vitb16 64 H100"),
            ),
            *(Of("fp8 rounding GB"), *both(f"fp8_rounding_teacher_{END}"), *both(f"fp8_left_teacher_{END}")),
            *(Of(f"fp8_left_share_teacher_{END}_hopeful", PERCENT), Of(f"fp8_share_student_{END}", PERCENT)),
            *both(f"fp8_saved_student_{END}"),
        ],
    ),
    (
        "Products take",
        [
            Of(f"paper_share_products_{END}_hopeful", PERCENT),
            Of(f"paper_share_pointwise_{END}_cautious", PERCENT),
            Of(f"paper_share_pointwise_{END}_hopeful", PERCENT),
        ],
    ),
]


def blocks_of(page: str) -> Iterator[str]:
    """Yield the paragraphs and tables that say what was calculated, the console's output and planned steps left out."""
    text = re.sub(r"```console\n.*?```\n", "", page[page.index(CALCULATED) :], flags=re.DOTALL)
    planned = text.index(PLANNED)
    text = text[:planned] + text[text.index("\n### ", planned) :]
    for block in text.split("\n\n"):
        if not block.strip().startswith(("#", "![")):
            yield block.strip()


def differences(page: str, values: Mapping[str, float]) -> list[str]:
    """Return a line for each number of the page that is not what a figure says, or that nobody has listed."""
    found, listed = [], dict(PARAGRAPHS)
    for block in blocks_of(page):
        numbers = NUMBER.findall(NO_NUMBERS.sub("", block))
        start = next((start for start in listed if block.startswith(start)), None)
        if start is None:
            found += [f"{block[:40]}: {number} is not listed" for number in numbers]
            continue
        sources = listed.pop(start)
        if len(sources) != len(numbers):
            found.append(f"{start}: {len(numbers)} numbers, {len(sources)} listed: {numbers}")
        for number, source in zip(numbers, sources, strict=False):
            digits = len(number.partition(".")[2])
            expected = source if isinstance(source, str) else f"{values[source.name] * source.factor:,.{digits}f}"
            if number != expected:
                found.append(f"{start}: {number} is {expected} by {source}")
    return found + [f"{start}: is not on the page" for start in listed]


def logged_losses() -> dict[str, float]:
    """Return the peaks of minutes' work, as LOG.md has them; a test below measures the smaller half of them again."""
    log = (REPOSITORY / "LOG.md").read_text(encoding="utf-8")
    found = re.search(
        r"279 MiB at 16,384 samples, (\d+) at 65,536 \((\d+) all at once\), (\d+) at 262,144, (\d+) at 1,048,576", log
    )
    assert found
    names = ("65536", "65536_at_once", "262144", "1048576")
    return {f"loss_memory_{name}": float(value) for name, value in zip(names, found.groups(), strict=True)}


def losses_of(samples: int) -> list[Figure]:
    """Return what the command measures; it makes its process one of many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "losses.json"
        command = [sys.executable, "benchmarks/loss_memory.py", "--samples", str(samples), "--json", str(found)]
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=250, check=True)
        return [Figure(**row) for row in json.loads(found.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def works() -> dict[tuple[str, int], StepWork]:
    return {(run, samples): count_work(run, samples) for run in ("vitb16", "vitb32") for samples in (64, 32)}


@pytest.fixture(scope="module")
def values(works: dict[tuple[str, int], StepWork]) -> dict[str, float]:
    """What the commands print, by the names of the figures; and what is in their tables, notes and settings."""
    work = works["vitb16", 64]
    measured = [
        *losses_of(16_384),
        *(Figure(name, value, "MiB", "") for name, value in logged_losses().items()),
    ]
    figures = [
        *kernel_bytes.figures(),
        *measured,
        *loss_memory.sample_figures(measured),
        *count_figures("vitb16", 64, work.phases_alone),
        *share_figures("vitb16", work),
        *host_figures("vitb16", work),
        *fp8_figures("vitb16", work),
    ]
    found = {figure.name: figure.value for figure in figures}
    rounding = next(figure.note for figure in figures if figure.name.startswith("fp8_rounding"))
    image = block_counts("vitb16", 64)["image"]
    found |= {
        "fp8 rounding GB": float(rounding.split("; ")[1].removesuffix(" GB")),
        "blocks": sum(count.launches for count in image.values()),
        "blocks teacher tflop": image["teacher"].flops / 1e12,
        "columns at once": COLUMNS_AT_ONCE,
        "ranks": loss_memory.SAMPLES[-1] // loss_memory.RANK_SAMPLES,
        "rank samples": loss_memory.RANK_SAMPLES,
        "views": loss_memory.VIEWS,
        "width": loss_memory.WIDTH,
        "measured host ms": HOST_MS,
        "measured operators": HOST_OPERATORS,
    }
    found |= {f"blocks {phase}": count.launches for phase, count in image.items()}
    found |= {f"gathered {samples}": loss_memory.GATHERED * samples / 2**30 for samples in loss_memory.SAMPLES}
    for name, assumed in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
        step = paper_step(work, CHIPS[1], NODE, assumed)
        found |= {f"launch us {name}": assumed.launch_us, f"host ms_{name}": step.host}
        found[f"traffic {name}"] = step.parts["traffic"]
        for (run, samples), each in works.items():
            for chip in CHIPS:
                parts = paper_step(each, chip, NODE, assumed).parts
                found[f"device {run} {samples} {chip.name}_{name}"] = sum(parts.values())
    return found


def test_each_number_is_what_its_command_prints(values: dict[str, float]) -> None:
    assert differences(PAGE, values) == []


def test_the_tables_are_those_that_the_command_prints(works: dict[tuple[str, int], StepWork]) -> None:
    console = Console(width=LOG_WIDTH, file=io.StringIO(), record=True)
    for table in (parts_table, scaling_table):
        console.print(table("vitb16", works["vitb16", 64]))
    printed = [line.rstrip() for line in console.export_text().splitlines()]
    shown = re.search(r"```console\n\$ python benchmarks/paper_model.py[^\n]*\n(.*?)```", PAGE, re.DOTALL)
    assert shown
    assert shown[1].splitlines() == printed


def test_a_changed_number_is_found(values: dict[str, float]) -> None:
    """Every calculated number of the page is changed in turn, in its last digit."""
    first = PAGE.index(CALCULATED)
    changed = 0
    for block in blocks_of(PAGE):
        for place in NUMBER.finditer(NO_NUMBERS.sub(lambda found: "`" * len(found[0]), block)):
            last = place.end() - 1
            other = f"{block[:last]}{(int(block[last]) + 1) % 10}{block[last + 1 :]}"
            assert differences(PAGE[:first] + PAGE[first:].replace(block, other), values), block[place.start() :][:20]
            changed += 1
    assert changed > 100
    assert differences(
        PAGE.replace("A ring is not", "A ring of 7 is not").replace("A\nring is", "A\nring of 7 is"), values
    )


def test_measured_figures_are_those_of_benchmarks() -> None:
    """What was measured on a CPU does not come out the same again. But a benchmark prints each of these figures."""
    table = PAGE[PAGE.index("| figure | value | what |") : PAGE.index("The restatement of the published step")]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) + re.findall(r"`(sgemm_share_\w+)`", table)
    assert len(names) == 11
    for name in names:
        stem = "step_speedup" if name.startswith(("sgemm", "step_speedup")) else name.partition("_")[0]
        source = (REPOSITORY / "benchmarks" / f"{stem}.py").read_text(encoding="utf-8")
        assert re.sub("_(vitb16|vitb32|demo)", "", name).split("_")[-1] in source, name


@pytest.mark.slow
def test_logged_memory_of_the_loss_is_measured_again() -> None:
    found = {figure.name: figure.value for figure in losses_of(65_536)}
    logged = logged_losses()
    for name in ("loss_memory_65536", "loss_memory_65536_at_once"):
        assert f"{found[name]:.0f}" == f"{logged[name]:.0f}"
