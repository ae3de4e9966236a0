"""Segmentation of the golden file's pictures against the oracle in float64, and mistakes that the oracle shows.

The tolerances are the golden file's own: see tests/golden/README.md.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cosmos_scale.evaluation.segmentation import segmenter
from cosmos_scale.evaluation.segmentation.pixels import normalise_levels, resize_for_windows
from cosmos_scale.evaluation.segmentation.segmenter import (
    PictureLogits,
    Queries,
    probability_bands,
    segment,
    window_logits,
)
from tests.evaluation.segmentation import oracle
from tests.evaluation.segmentation.golden import golden_encoder, golden_file, golden_image, tower_in_float64
from tools.golden_segmentation import PROBABILITIES, check_segmentation, recipe_in

PICTURES = ("many_windows", "threshold", "two_windows", "background", "plain_attention", "pamr")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bands_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "_BAND", 700)  # values: a row or two of a picture
    for case in golden_file().cases("seg"):
        assert [one for one in check_segmentation(golden_file(), case) if not one.good] == []


def ours_and_theirs(
    case: str, mistake: oracle.Mistake = "", crop: int | None = None
) -> tuple[oracle.Array, oracle.Array, float]:
    """Our probabilities, the oracle's, and the share of pixels with other labels (near ties apart)."""
    file = golden_file()
    how = file.parameters(f"seg.{case}")
    how["crop"] = how["crop"] if crop is None else crop
    recipe, names_of = recipe_in(how), tuple(len(line.split(", ")) for line in how["class_lines"])
    queries = Queries(file.tensor(f"seg.{case}.query_features"), names_of)
    pixels = golden_image(f"seg.{case}")
    tower = golden_encoder().model.visual
    picture = normalise_levels(resize_for_windows(pixels, recipe.short_side))
    logits = PictureLogits(
        window_logits(tower, picture, queries.features, recipe), picture, (len(pixels), len(pixels[0])), recipe
    )
    ours = torch.cat([band for _, band in probability_bands(logits, queries, recipe)], dim=1).double().numpy()
    weights, sizes = tower_in_float64()
    task = oracle.Task(*recipe[:9], names_of)
    theirs, labels = oracle.segment_in_float64(pixels, queries.features.double().numpy(), weights, sizes, task, mistake)
    first, second = np.sort(theirs, axis=0)[[-1, -2]]
    others = (segment(tower, pixels, queries, recipe).numpy() != labels) & (first - second > 1e-4)
    return ours, theirs, others.mean()


@pytest.mark.parametrize("case", PICTURES)
def test_oracle_in_float64_agrees(case: str) -> None:
    ours, theirs, others = ours_and_theirs(case)
    assert np.abs(ours - theirs).max() < PROBABILITIES
    assert others == 0


def test_oracle_agrees_on_whole_pictures() -> None:
    ours, theirs, others = ours_and_theirs("background", crop=0)
    assert np.abs(ours - theirs).max() < PROBABILITIES
    assert others == 0


@pytest.mark.parametrize(
    ("mistake", "case"),
    [
        ("csa halved", "two_windows"),
        ("csa everywhere", "two_windows"),
        ("csa from queries alone", "two_windows"),
        ("no 0.1 offset", "whole picture"),
        ("corners aligned", "two_windows"),
        ("last window not shifted back", "many_windows"),
        ("names summed", "two_windows"),
        ("area of the whole picture", "background"),
        ("biased deviation", "pamr"),
        ("centre once", "pamr"),
        ("features not normalised", "threshold"),
    ],
)
def test_mistakes_are_past_the_tolerance(mistake: oracle.Mistake, case: str) -> None:
    ours, theirs, _ = ours_and_theirs(*(("background", mistake, 0) if case == "whole picture" else (case, mistake)))
    assert np.abs(ours - theirs).max() > PROBABILITIES


def test_a_threshold_that_is_not_used_changes_labels() -> None:
    _, _, others = ours_and_theirs("threshold", "probability threshold ignored")
    assert others > 0.01
