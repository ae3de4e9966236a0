"""Figures are drawn in matplotlib's defaults: what is set for a paper's figures neither breaks nor changes them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import pytest
import torch

from cosmos_scale.drawing import usual_figures
from cosmos_scale.evaluation.confusions import PICTURE, Confused, write_confusions
from cosmos_scale.report.figures import Bar, draw_bars
from tests.conftest import REPOSITORY

# As of a paper's matplotlibrc. LaTeX is not installed here; where it is, it reads _ and % as its own signs.
PAPER: dict[Any, Any] = {
    "text.usetex": True,
    "axes.facecolor": "black",
    "savefig.bbox": "tight",
    "text.parse_math": False,
}


@pytest.fixture
def paper() -> Iterator[dict[str, Any]]:
    """The settings of a paper hold in the test, and what held before it afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update(PAPER)
        yield settings()


def settings() -> dict[str, Any]:
    return {name: matplotlib.rcParams[name] for name in list(matplotlib.rcParams)}


def confusions(folder: Path) -> bytes:
    write_confusions(torch.tensor([[1, 2], [0, 1]]), ["50%_$", "tea_pot"], [Confused("a", "b", 2, 0.5)], folder)
    return (folder / PICTURE).read_bytes()


def test_what_is_set_for_a_paper_changes_no_figure(tmp_path: Path, paper: dict[str, Any]) -> None:
    drawn, bars = confusions(tmp_path / "paper"), draw_bars("a", "a", [Bar("50%_$", {"a_b": 1.0})], "x_1", "y%")
    assert settings() == paper
    with matplotlib.style.context("default"):
        assert confusions(tmp_path / "plain") == drawn
        assert draw_bars("a", "a", [Bar("50%_$", {"a_b": 1.0})], "x_1", "y%") == bars


def test_threads_that_draw_leave_what_was_set(paper: dict[str, Any]) -> None:
    def draw() -> None:
        for _ in range(20):
            with usual_figures():
                assert not matplotlib.rcParams["text.usetex"]

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settings() == paper


@pytest.mark.parametrize(
    "source",
    [path for path in sorted(REPOSITORY.glob("cosmos_scale/**/*.py")) if "Figure(" in path.read_text("utf-8")],
    ids=lambda path: path.name,
)
def test_every_module_that_makes_a_figure_draws_in_the_defaults(source: Path) -> None:
    assert "@usual_figures()" in source.read_text("utf-8")
