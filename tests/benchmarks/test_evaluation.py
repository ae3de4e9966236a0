"""The benchmark of evaluation: both forms give the same, and its figures are named."""

from pathlib import Path

import torch

from benchmarks.evaluation import check_same, figures, loop_features, loop_top5, make_bench, our_top5


def test_both_forms_give_the_same_and_figures_are_named(tmp_path: Path) -> None:
    bench = make_bench("demo", 3, tmp_path)
    features = loop_features(bench)
    check_same(bench, features)
    assert torch.equal(our_top5(bench), loop_top5(bench, features))
    found = {figure.name: figure for figure in figures(bench, rounds=1, segmented=1)}
    kinds = ("features", "classification", "segmentation")
    speeds = [f"evaluation_{kind}{end}" for kind in kinds for end in ("", "_loop", "_speedup")]
    assert list(found) == [*speeds, "evaluation_segmentation_peak", "evaluation_segmentation_peak_loop"]
    assert all(figure.value > 0.0 for figure in found.values())
    assert found["evaluation_segmentation_peak"].value < found["evaluation_segmentation_peak_loop"].value
