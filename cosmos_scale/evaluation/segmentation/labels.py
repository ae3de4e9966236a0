"""From logits to labels: probabilities of classes, the rule of areas, and the threshold."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_probabilities(
    logits_UHW: Tensor, logit_scale: float, names_of: Sequence[int], places: Sequence[int] = ()
) -> Tensor:
    """Return the probability of each class at each pixel [C, H, W]: of its most probable name among all names.

    names_of: how many names each class has. places: for each name of class 0, then of class 1, and so on, which of the
    logits is its; empty: each name has its own logit, in this order.
    """
    logits_QHW = pixels_side_by_side(logits_UHW) * logit_scale
    if places:
        logits_QHW = logits_QHW[list(places)]
    probabilities_QHW = torch.softmax(logits_QHW, dim=0)
    if len(names_of) == len(probabilities_QHW):
        return probabilities_QHW
    return torch.stack([names.amax(0) for names in probabilities_QHW.split(list(names_of))])


def large_classes(pixels_C: Tensor, area_threshold: float) -> Tensor:
    """Tell which classes are large enough to be kept: [C] bool; class 0 always is.

    pixels: [C] int64, of how many pixels each class is the most probable one. area_threshold: of all pixels that are
    not of class 0, the share that a class must exceed.
    """
    kept_C = pixels_C > area_threshold * pixels_C[1:].sum()
    kept_C[0] = True
    return kept_C


def label_map(probabilities_CHW: Tensor, threshold: float) -> Tensor:
    """Return the most probable class of each pixel, the first of equal ones, or 0 below the threshold: [H, W] int64."""
    best_HW, labels_HW = probabilities_CHW.max(0)
    labels_HW[best_HW < threshold] = 0
    return labels_HW


def most_probable(
    logits_UHW: Tensor, names_of: Sequence[int], places: Sequence[int] = (), kept_C: Tensor | None = None
) -> Tensor:
    """Return the most probable class of each pixel, the first of equal ones: [H, W] int64.

    names_of, places: as in `class_probabilities`. kept: [C] bool, the classes that count; None: all.
    """
    device = logits_UHW.device
    logits_QHW = pixels_side_by_side(logits_UHW)[list(places)] if places else logits_UHW
    class_Q = torch.arange(len(names_of), device=device).repeat_interleave(torch.tensor(names_of, device=device))
    if kept_C is not None:
        left_out_Q = torch.zeros_like(class_Q, dtype=logits_QHW.dtype).masked_fill_(~kept_C[class_Q], -torch.inf)
        logits_QHW = logits_QHW + left_out_Q[:, None, None]
    best_HW = _largest(logits_QHW)
    return best_HW if len(class_Q) == len(names_of) else class_Q[best_HW]


def _largest(values_QHW: Tensor) -> Tensor:
    """Return the place of each pixel's largest value, the first of equal ones: [H, W] int64.

    Where a pixel's values lie side by side, numpy compares many at a time, torch one.
    """
    values_HWQ = values_QHW.permute(1, 2, 0)
    if values_HWQ.device.type == "cpu" and values_HWQ.is_contiguous():
        return torch.from_numpy(values_HWQ.numpy().argmax(-1))
    return values_QHW.max(0).indices


def pixels_side_by_side(values_QHW: Tensor) -> Tensor:
    """Return the same values [Q, H, W], contiguous: work on each query alone goes faster so."""
    # Of two dimensions, which torch transposes faster than three.
    return values_QHW.flatten(1).contiguous().view(values_QHW.shape)
