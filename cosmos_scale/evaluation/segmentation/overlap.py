"""How well predicted labels agree with true ones: exact counts of pixels, and IoU and accuracy from the counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = 255
"""The label, in a true mask, of pixels that count nowhere."""


def count_overlap(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """Return counts of pixels by class [3, C] int64: predicted and true, predicted, true; ignored pixels left out.

    predicted, true: integers of one shape. Counts of several pictures, and of several ranks, are added up.
    """
    counted = true != IGNORED
    predicted, true = predicted[counted], true[counted]
    parts = (predicted[predicted == true], predicted, true)
    return torch.stack([torch.bincount(labels.long(), minlength=classes) for labels in parts])


@dataclass(frozen=True)
class Scores:
    """What the counts of a whole set say, as shares of 1; NaN for what no pixel has told.

    iou: [C] float64, intersection over union; NaN for a class neither true nor predicted anywhere. accuracy: [C]
    float64, share of a class's pixels that are found; NaN for a class that is true nowhere. Source: mmsegmentation's
    metrics of the same names.
    """

    iou: Tensor
    accuracy: Tensor
    mean_iou: float
    all_accuracy: float
    mean_accuracy: float

    @classmethod
    def of(cls, counts: Tensor) -> "Scores":
        """Compute from the counts of `count_overlap` [3, C], added up over the set."""
        both_C, predicted_C, true_C = counts.cpu().double()
        iou_C, accuracy_C = both_C / (predicted_C + true_C - both_C), both_C / true_C
        return cls(
            iou_C,
            accuracy_C,
            iou_C.nanmean().item(),
            (both_C.sum() / true_C.sum()).item(),
            accuracy_C.nanmean().item(),
        )


def constant_counts(counts: Tensor, label: int) -> Tensor:
    """Return the counts that one label for all pixels would have given, from the counts of any prediction: [3, C]."""
    true_C = counts[2]
    constant = torch.zeros_like(counts)
    constant[0, label], constant[1, label], constant[2] = true_C[label], true_C.sum(), true_C
    return constant
