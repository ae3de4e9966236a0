"""`cosmos-scale report`: the page of a real run, and pages of made-up runs, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.checkpoint import read_run_config
from cosmos_scale.cli import main as cli
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.evaluation.evaluator import no_report
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.report import page
from cosmos_scale.report.page import write_report
from cosmos_scale.report.retrieval_part import FOUND, QUERIES, WORST, retrieve
from tests.profiling.invented import GIB, rank_profile, record_of
from tests.report.browser import SCROLLS, Page, browser_page
from tests.report.run_folders import evaluation_record, start_record, train_record, write_run

PHONE, DESKTOP, HEIGHT = 390, 1280, 900
HOSTILE = "<script>alert(1)</script>&\"'$x$"
# Each figure, picture and table that may be seen: what it is, and its size in pixels.
SIZES = """[...document.querySelectorAll('figure svg, figure svg g[id*="-run"], img, table')]
  .filter((one) => !one.closest('[hidden]') && !one.closest('details:not([open])'))
  .map((one) => [one.id || one.alt || one.tagName, one.getBoundingClientRect()])
  .map(([name, box]) => [name, box.width, box.height])"""
CUT = """[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth)
  .map((one) => one.ariaLabel)"""
ROWS = """((part) => [...document.querySelectorAll('#memory tr')].map((row) => [...row.cells].map((cell) =>
  cell.textContent).join(' ')).find((row) => row.startsWith(part + ' ')))"""
BOTH = [(PHONE, False), (DESKTOP, True)]


@pytest.fixture(scope="module")
def real(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run of two steps."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert cli.main(["report", str(checkpoints.parent), "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="module")
def two_real(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run in two folders."""
    copy = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(checkpoints.parent, copy)
    return [checkpoints.parent, copy]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs of other lengths, one of them resumed, with skipped steps and a name full of signs."""
    folder = tmp_path_factory.mktemp("compared")
    records = [start_record(0, 2), *(train_record(step) for step in range(10, 101, 10)), start_record(100, 4)]
    records += [train_record(step, skipped_steps=int(step > 150)) for step in range(110, 201, 10)]
    records += [evaluation_record(step, step / 400, HOSTILE) for step in (100, 200)]
    first = write_run(folder / "first", records, name="first")
    other = write_run(folder / "other", [train_record(step, loss=3.0) for step in range(5, 61, 5)], name="second")
    (other / "profile").mkdir()
    (other / "profile" / "profile.json").write_text(json.dumps(profile()))
    write_report([first, other], folder / "report.html", pictures=False)
    return folder / "report.html"


def profile() -> dict[str, Any]:
    """A profile as `cosmos-scale profile --planned` writes it, with an operator of a long name."""
    record = record_of([rank_profile()])
    record["operators"]["top"][0]["name"] = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    record["memory"]["owners"][HOSTILE] = GIB
    row = {"phase": "backward", "kind": "reduce_scatter", "calls": 8, "mbytes": 76.1}
    peaks = {"student": {"student": 32 * GIB}, "teacher": {"student": 21 * GIB, "teacher": 5 * GIB}}
    return record | {"planned": {"peak_bytes": 32 * GIB, "phase_peaks": peaks, "collectives": [row]}}


def look(browser: Page, file: Path, width: int, *, dark: bool) -> list[tuple[str, float, float]]:
    """Open a page, and return what is drawn with its size; fail on errors and where the page scrolls sideways."""
    browser.errors.clear()
    browser.open(file, width, HEIGHT, dark=dark)
    assert browser.value(SCROLLS) <= 0, "the page scrolls sideways"
    assert browser.errors == []
    return [(name, wide, high) for name, wide, high in browser.value(SIZES)]


@pytest.mark.parametrize(("width", "dark"), BOTH)
def test_every_picture_of_a_real_run_is_drawn(browser: Page, real: Path, width: int, dark: bool) -> None:
    drawn = look(browser, real, width, dark=dark)
    assert [one for one in drawn if min(one[1:]) <= 0 and "-run" not in one[0]] == []
    # A flat line is a pixel high, or none.
    assert [one for one in drawn if "-run" in one[0] and max(one[1:]) <= 0] == []
    assert sum(name == "svg" for name, _, _ in drawn) >= 10
    assert sum("crop" in name for name, _, _ in drawn) >= 4 * 4  # three crops of four samples, and attention's
    headings = browser.value("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
    wanted = {"Curves", "Speed", "Data", "Evaluation", "What captions find", "Where it is worst", "Where it looks"}
    assert wanted | {"Config", "Events"} <= set(headings)


def test_each_of_some_runs_has_its_gallery_and_is_hidden_with_it(
    browser: Page, two_real: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.html"
    assert write_report(two_real, out, device="cpu") == []
    look(browser, out, DESKTOP, dark=False)
    seen = "[...document.querySelectorAll('h2, h3')].filter((one) => one.offsetHeight).map((one) => one.textContent)"
    first, second = (f"{place}. {folder}" for place, folder in enumerate(two_real, start=1))
    finds = [f"What captions find: {first}", f"What captions find: {second}"]
    assert [text for text in browser.value(seen) if "What captions find" in text] == finds
    # Both see the same data, which is shown once.
    assert [text for text in browser.value(seen) if "towers see" in text] == [
        f"What the towers see of the first samples: {first}, {second}"
    ]
    browser.value("document.querySelector('input[data-run=\"0\"]').click()")
    assert [text for text in browser.value(seen) if "captions find" in text] == finds[1:]
    assert sum("towers see" in text for text in browser.value(seen)) == 1
    browser.value("document.querySelector('input[data-run=\"1\"]').click()")
    assert sum("captions find" in text or "towers see" in text for text in browser.value(seen)) == 0
    whole = out.stat().st_size
    monkeypatch.setattr(page, "MOST_BYTES", whole - 10_000)
    (note,) = write_report(two_real, out, device="cpu")
    assert note.startswith("Fewer pictures of each run are shown")
    assert note in out.read_text()
    assert out.stat().st_size <= whole - 10_000
    look(browser, out, PHONE, dark=True)


def test_found_pictures_are_framed_where_the_rank_says_so(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000002"
    (section,) = read_run_config(newest).eval
    assert isinstance(section, RetrievalConfig)
    found = retrieve(section, load_encoder(newest, "student", "cpu"), no_report)
    assert found is not None
    assert (found.pairs, len(found.captions), len(found.worst)) == (40, QUERIES, WORST)
    for query in found.captions:
        place = next((place for place, one in enumerate(query.found, start=1) if one.right), None)
        assert place == (query.rank if query.rank <= FOUND else None)
    for asked in found.pictures:
        place = next((place for place, (_, right) in enumerate(asked.found, start=1) if right), None)
        assert place == (asked.rank if asked.rank <= FOUND else None)
    ranks = [query.rank for query in found.worst]
    assert ranks == sorted(ranks, reverse=True)
    assert max(query.rank for query in found.captions) <= ranks[0] <= 40


def test_a_page_is_one_small_file_that_asks_for_nothing(real: Path) -> None:
    page = real.read_text()
    assert len(page) < 3e6
    links = re.findall(r"""(?:src|href|action)="([^"#][^"]*)""", page)
    assert {link.partition(":")[0] for link in links} == {"data"}
    assert "default-src 'none'" in page
    assert "Finished: all 2 steps" in page
    assert "1 rank, cpu" in page  # of the launch


@pytest.mark.parametrize(("width", "dark"), BOTH)
def test_runs_over_each_other_are_drawn_and_signs_stay_signs(
    browser: Page, compared: Path, width: int, dark: bool
) -> None:
    drawn = look(browser, compared, width, dark=dark)
    if width == DESKTOP:
        assert browser.value(CUT) == [], "tables are cut at the right"
    names = [name for name, _, _ in drawn]
    for run, mark in (("run0", "resume"), ("run0", "skip"), ("run0", "loss"), ("run1", "loss")):
        assert f"loss-steps-{run}-{mark}" in names
    assert browser.value("document.querySelectorAll('main script, header script').length") == 0
    assert browser.value("document.body.innerText.includes('<script>alert(1)</script>&')")
    bars = "document.querySelectorAll('figure svg [id^=\"memory-parts-1-stacks-patch\"]').length"
    assert browser.value(bars) > 3
    assert browser.value(f"{ROWS}('student')").endswith("20,480.0 21,504.0")  # in the phase teacher, as measured
    texts = ("student forward", "reduce-scatter", "launches too slowly (model.compile=true)", "Where they ended")
    for text in (*texts, "planned 32,768.0 MiB, measured -6.2 %", "planned calls", "76.1", "15.6 %"):
        assert browser.value(f"document.body.textContent.includes({json.dumps(text)})"), text


def test_axes_and_runs_are_chosen_and_the_cursor_tells_values(browser: Page, compared: Path) -> None:
    look(browser, compared, DESKTOP, dark=False)
    plot = "document.querySelector('.plot[data-name=loss]')"
    tip = f"{plot}.querySelector('.tip').innerText"
    browser.value(f"{plot}.focus()")
    browser.press("End")
    assert browser.value(tip).splitlines() == ["step 200", "first, loss: 1.6767", "second, loss: 3"]
    # The cursor stands at the line's end: a point of the curve lies where its value is drawn.
    ends = f"[...{plot}.querySelectorAll('.cursor, #loss-steps-run0-loss')].map((one) => one.getBoundingClientRect())"
    line_end, cursor = browser.value(f"{ends}.map((box) => box.right)")
    assert cursor == pytest.approx(line_end, abs=3.0)  # pixels: a point's marker is two wide
    browser.press("ArrowLeft")
    assert browser.value(tip).startswith("step 190")

    # A pointer at the middle of the axis.
    middle = """(() => { const plot = document.querySelector('.plot[data-name=loss]');
      const box = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 0.54 * box.width}));
    })()"""
    browser.value(middle)
    assert 80 <= int(browser.value(tip).split()[1]) <= 120

    for axis, last in (("samples", "sample 12,800"), ("hours", "hour 0.11111")):
        browser.value(f"document.querySelector('input[value={axis}]').click()")
        shown = f"[...{plot}.querySelectorAll('[data-axis]:not([hidden])')].map((one) => one.dataset.axis)"
        assert browser.value(shown) == [axis]
        browser.value(f"{plot}.focus()")
        browser.press("End")
        assert browser.value(tip).startswith(last)
    browser.value("document.querySelector('input[data-run=\"0\"]').click()")
    line = "document.querySelector('[id=\"loss-hours-run{}-loss\"]').getBoundingClientRect().width"
    assert browser.value(line.format(0)) == 0 < browser.value(line.format(1))
    browser.press("End")
    assert browser.value(tip).splitlines()[1:] == ["second, loss: 3"]
    assert browser.errors == []


def test_many_long_runs_stay_a_small_page(tmp_path: Path) -> None:
    records = [train_record(step, loss=1 + step % 7, grad_norm=2 + step % 5) for step in range(1, 4001)]
    folders = [write_run(tmp_path / f"run{number}", records, name=f"run{number}") for number in range(4)]
    write_report(folders, tmp_path / "report.html", pictures=False)
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_a_run_whose_data_is_gone_has_a_page_that_says_so(
    browser: Page, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    source = {"name": "gone", "shards": str(tmp_path / ("gone" * 40))}
    folder = write_run(tmp_path / "run", records, data={"sources": [source]})
    (folder / "profile").mkdir()
    (folder / "profile" / "profile.json").write_text('{"phases": [{}]}')
    out = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "samples left out" in printed
    assert "profile/profile.json cannot be used: KeyError" in printed
    assert "samples left out" in out.read_text()
    look(browser, out, PHONE, dark=False)  # also where a path is longer than a line


@pytest.mark.parametrize(("name", "said"), [("none", "no such folder"), ("empty", "no run")])
def test_what_is_no_run_is_refused_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / name), "--out", str(tmp_path / "report.html")]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"cosmos-scale report: {tmp_path / name}: {said}")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "file" / "report.html")]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report.pdf", "report.PNG", "report.html.gz"])
def test_a_page_is_not_called_as_what_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    report = ["report", str(tmp_path), "--no-pictures", "--out"]
    assert cli.main([*report, str(tmp_path / name)]) == 2
    assert f"--out: {tmp_path / name}: the page is HTML; rule: a name that ends in .html" in capsys.readouterr().err
    assert not (tmp_path / name).exists()
    for other in ("report", "report.htm", "report.1", "report.2024-01-05"):
        assert cli.main([*report, str(tmp_path / other)]) == 0


def test_a_report_replaces_reports_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "metrics.jsonl"
    records.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    report = ["report", str(tmp_path), "--no-pictures", "--out"]
    for _ in range(2):
        assert cli.main([*report, str(tmp_path / "report.html")]) == 0
    assert cli.main([*report, str(records)]) == 2
    assert "metrics.jsonl: is there, and is no report of this program" in capsys.readouterr().err
    assert records.read_text().startswith('{"kind"')
