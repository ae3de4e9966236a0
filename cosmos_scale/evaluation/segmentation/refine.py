"""Pixel-adaptive refinement (PAMR): a pixel's logits become the mean of its neighbours', the likest counting most.

Source: Araslanov and Roth, Single-Stage Semantic Segmentation from Image Labels (CVPR 2020), section 3.3.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.evaluation.segmentation.labels import pixels_side_by_side

_CHUNK = 4 * 2**20  # values of logits that are refined at a time
_OFFSETS = [place for place in itertools.product((-1, 0, 1), repeat=2) if place != (0, 0)]


def refine(logits_QHW: Tensor, picture_CHW: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    """Return refined logits [Q, H, W] at the picture's size [C, H, W].

    Logits of another size are resized first (bilinear, corners aligned). dilations: distances of the neighbours.
    """
    size = picture_CHW.shape[1:]
    if logits_QHW.shape[1:] != size:
        logits_QHW = functional.interpolate(logits_QHW[None], size, mode="bilinear", align_corners=True)[0]
    weights_PHW = neighbour_weights(picture_CHW, dilations)
    # Queries do not touch one another: a part of them at a time bounds the memory.
    refined_QHW = torch.empty_like(logits_QHW, memory_format=torch.contiguous_format)
    number = max(1, _CHUNK // max(1, size.numel()))
    for part, out in zip(logits_QHW.split(number), refined_QHW.split(number), strict=True):
        out.copy_(_average(pixels_side_by_side(part), weights_PHW, dilations, steps))
    return refined_QHW


def neighbour_weights(picture_CHW: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the weight of each neighbour of each pixel, for all dilations together: [8 x dilations, H, W], sum 1."""
    total = torch.zeros_like(picture_CHW)
    for neighbour in _neighbours(picture_CHW, dilations):
        total += neighbour
    count = 9 * len(dilations)  # the pixel itself counts once for each dilation
    mean = total.add_(picture_CHW, alpha=len(dilations)).div_(count)
    squares = len(dilations) * (picture_CHW - mean).square()
    for neighbour in _neighbours(picture_CHW, dilations):
        squares += (neighbour - mean).square_()
    deviation = squares.div_(count - 1).sqrt_()
    scale = deviation.mul_(0.1).add_(1e-8)
    likeness = [
        -((picture_CHW - neighbour).abs_() / scale).mean(0) for neighbour in _neighbours(picture_CHW, dilations)
    ]
    return torch.softmax(torch.stack(likeness), dim=0)


def _average(logits_QHW: Tensor, weights_PHW: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    for _ in range(steps):
        average = torch.zeros_like(logits_QHW)
        for weight_HW, neighbour in zip(weights_PHW, _neighbours(logits_QHW, dilations), strict=True):
            average.addcmul_(neighbour, weight_HW)
        logits_QHW = average
    return logits_QHW


def _neighbours(values_CHW: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yield the values at each neighbour of each pixel [C, H, W], views; beyond the edge the nearest pixel counts."""
    height, width = values_CHW.shape[1:]
    for distance in dilations:
        padded = functional.pad(values_CHW[None], (distance,) * 4, mode="replicate")[0]
        for down, right in _OFFSETS:
            top, left = distance * (1 + down), distance * (1 + right)
            yield padded[:, top : top + height, left : left + width]
