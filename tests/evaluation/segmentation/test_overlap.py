"""Counts, IoU and accuracy against plain sets of pixels."""

import numpy as np
import pytest
import torch

from cosmos_scale.evaluation.segmentation.overlap import Scores, constant_counts, count_overlap
from tests.evaluation.segmentation import oracle


def random_masks(classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True and predicted labels of three pictures; the last class is predicted only, the one before is nowhere."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes - 2, (3, 9, 11), generator=generator)
    true[torch.rand(true.shape, generator=generator) < 0.1] = 255
    predicted = torch.randint(0, classes - 2, (3, 9, 11), generator=generator)
    predicted[0, 0, :3] = classes - 1
    return true, predicted


@pytest.mark.parametrize("classes", [3, 7, 150])
def test_scores_are_those_of_plain_sets(classes: int) -> None:
    true, predicted = random_masks(classes, classes)
    pairs = list(zip(predicted, true, strict=True))
    counts = torch.stack([count_overlap(*pair, classes) for pair in pairs]).sum(0)
    assert counts.dtype == torch.int64
    scores = Scores.of(counts)
    expected = oracle.mean_iou(list(true.numpy()), list(predicted.numpy()), classes)
    # Both divide the same whole numbers in float64.
    np.testing.assert_allclose(scores.iou.numpy(), expected["iou"], rtol=1e-12, equal_nan=True)
    np.testing.assert_allclose(scores.accuracy.numpy(), expected["acc"], rtol=1e-12, equal_nan=True)
    found = [scores.mean_iou, scores.mean_accuracy, scores.all_accuracy]
    assert found == pytest.approx([expected["mIoU"], expected["mAcc"], expected["aAcc"]], rel=1e-12)
    assert scores.iou[classes - 1] == 0  # predicted, true nowhere: counts as 0
    assert scores.iou[classes - 2].isnan()


def test_counts_past_what_float32_holds_stay_exact() -> None:
    counts = torch.tensor([[2**24, 0], [2**24, 0], [2**24, 0]])
    one = count_overlap(torch.tensor([0]), torch.tensor([0]), 2)
    assert (counts + one)[0, 0] == 2**24 + 1


def test_the_trivial_answer_is_one_label_for_all_pixels() -> None:
    true, predicted = random_masks(6, 1)
    counts = torch.stack([count_overlap(*pair, 6) for pair in zip(predicted, true, strict=True)]).sum(0)
    for label in range(6):
        expected = count_overlap(torch.full_like(true, label), true, 6)
        assert torch.equal(constant_counts(counts, label), expected)
