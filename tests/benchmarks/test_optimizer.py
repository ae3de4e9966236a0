"""The optimizer's benchmark: its three forms do the same, and its figures are named."""

import pytest
import torch
from torch import Size

from benchmarks.optimizer import FORMS, figures, random_groups

SHAPES = [([Size([3, 5]), Size([7])], 0.5), ([Size([11])], 0.0)]


def test_all_forms_do_the_same_update() -> None:
    results = {}
    for name, form in FORMS.items():
        torch.manual_seed(0)
        groups = random_groups(SHAPES)
        update = form(groups)
        for _ in range(3):
            update()
        results[name] = groups
    for name in ("published", "fused"):
        for mine, theirs in zip(results["ours"], results[name], strict=True):
            for kind in ("weights", "first", "second", "averages"):
                # Some roundings of float32 of numbers around 1.
                torch.testing.assert_close(mine.flat[kind], theirs.flat[kind], rtol=1e-6, atol=1e-6)


def test_figures_are_ratios_of_medians() -> None:
    found = figures(random_groups(SHAPES), rounds=2)
    assert [figure.name for figure in found] == ["optimizer_time_ratio", "optimizer_time_ratio_fused"]
    assert all(figure.value > 0.0 for figure in found)
    assert found[0].value != pytest.approx(found[1].value, rel=1e-9)
