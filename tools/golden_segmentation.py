"""Dense features, segmentation, refinement and IoU of a golden file of evaluation, compared with this code's.

The keys, and the tolerances with their reasons: see tests/golden/README.md.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.evaluation.evaluator import Encoder, one_process
from cosmos_scale.evaluation.prompts.texts import imagenet_templates
from cosmos_scale.evaluation.segmentation.overlap import IGNORED, Scores, count_overlap
from cosmos_scale.evaluation.segmentation.pixels import normalise_levels, resize_for_windows
from cosmos_scale.evaluation.segmentation.refine import refine
from cosmos_scale.evaluation.segmentation.segmenter import (
    PictureLogits,
    Queries,
    Recipe,
    probability_bands,
    segment,
    unit_patches,
    window_logits,
)
from cosmos_scale.evaluation.segmentation.windows import cut_windows
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.model.vision import VisionTower

DENSE, INPUT, FEATURES, PROBABILITIES, REFINED, SHARE = 5e-5, 1e-6, 1e-5, 2e-5, 2e-5, 1e-6
NEAR = 1e-4  # pixels whose two best classes are nearer may have either label


class Compared(NamedTuple):
    """How far one of a file's tensors or header values is from this code's, at worst, and how far it may be."""

    name: str
    difference: float
    tolerance: float


def compare_dense(tensors: Mapping[str, Tensor], encoder: Encoder) -> Iterator[Compared]:
    """Compare the image tower's features at several sizes, plain and with correlative self-attention."""
    for case in _cases(tensors, "dense"):
        images = tensors[f"{case}.images"]
        for prefix, correlative in (("", False), ("csa_", True)):
            with torch.no_grad():
                pooled, tokens = encoder.model.visual.patch_features(images, correlative=correlative)
            for name, ours in ((f"{prefix}pooled", pooled), (f"{prefix}tokens", tokens)):
                yield _compared(f"{case}.{name}", ours, tensors, DENSE)


def compare_segmentation(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], encoder: Encoder
) -> Iterator[Compared]:
    """Compare each step from a picture to its labels, each from the file's own texts' features."""
    for case in _cases(tensors, "seg"):
        yield from _compare_picture(case, tensors, json.loads(header[case]), encoder)


def compare_refinement(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Iterator[Compared]:
    """Compare the refinement (PAMR) alone."""
    for case in _cases(tensors, "pamr"):
        how = json.loads(header[case])
        refined = refine(tensors[f"{case}.mask"], tensors[f"{case}.image"], how["dilations"], how["steps"])
        yield _compared(f"{case}.output", refined, tensors, REFINED)


def compare_overlap(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Iterator[Compared]:
    """Compare IoU and accuracy of each class, and their means in the header."""
    for case in _cases(tensors, "iou"):
        how = json.loads(header[case])
        true = tensors[f"{case}.mask"].long()
        if how["reduce_zero_label"]:
            true = torch.where((true == 0) | (true == IGNORED), IGNORED, true - 1)
        scores = Scores.of(count_overlap(tensors[f"{case}.prediction"].long(), true, how["classes"]))
        yield _compared(f"{case}.iou", scores.iou, tensors, SHARE)
        yield _compared(f"{case}.acc", scores.accuracy, tensors, SHARE)
        means = {"mIoU": scores.mean_iou, "mAcc": scores.mean_accuracy, "aAcc": scores.all_accuracy}
        for name, mean in means.items():
            yield Compared(f"{case}.{name}", abs(mean - how[name]), SHARE)


def recipe_in(how: Mapping[str, Any]) -> Recipe:
    """Return the recipe that the header of a picture tells."""
    return Recipe(
        short_side=how["short_side"],
        crop=how["crop"],
        stride=how["stride"],
        csa=how["csa"],
        logit_scale=how["logit_scale"],
        prob_threshold=how["prob_thd"],
        area_threshold=how["area_thd"] or 0.0,
        pamr_steps=how["pamr_steps"],
        pamr_dilations=tuple(how["pamr_dilations"]),
    )


def _cases(tensors: Mapping[str, Tensor], group: str) -> list[str]:
    """Return the dotted names of a group's cases, such as dense.0."""
    return sorted({".".join(name.split(".")[:2]) for name in tensors if name.startswith(f"{group}.")})


def _compared(name: str, ours: Tensor, tensors: Mapping[str, Tensor], tolerance: float) -> Compared:
    """Compare a tensor; another shape, or NaN in one of both alone, is infinitely far."""
    theirs = tensors[name]
    if ours.shape != theirs.shape:
        return Compared(name, float("inf"), tolerance)
    difference = (ours.double() - theirs.double()).abs()
    difference[ours.isnan() & theirs.isnan()] = 0
    return Compared(name, difference.nan_to_num(float("inf")).max().item(), tolerance)


def _compare_picture(
    case: str, tensors: Mapping[str, Tensor], how: Mapping[str, Any], encoder: Encoder
) -> Iterator[Compared]:
    recipe, tower = recipe_in(how), encoder.model.visual
    pixels = tensors[f"{case}.image"].numpy()
    resized = resize_for_windows(pixels, recipe.short_side, how["long_side"])
    yield _compared(f"{case}.resized", torch.from_numpy(resized), tensors, 0)
    picture_CHW = normalise_levels(resized)
    if f"{case}.input" in tensors:
        yield _compared(f"{case}.input", picture_CHW, tensors, INPUT)
    names = [line.split(", ") for line in how["class_lines"]]
    names_of = tuple(map(len, names))
    own_queries = text_weights(encoder, [(name,) for of in names for name in of], imagenet_templates(), one_process)
    yield _compared(f"{case}.query_features", own_queries, tensors, FEATURES)
    own_classes = torch.arange(len(names)).repeat_interleave(torch.tensor(names_of))
    yield _compared(f"{case}.query_class", own_classes, tensors, 0)
    queries = Queries(tensors[f"{case}.query_features"], names_of)
    yield from _compare_logits(case, tensors, (pixels.shape[0], pixels.shape[1]), picture_CHW, queries, recipe, tower)
    labels = segment(tower, pixels, queries, recipe)
    first, second = tensors[f"{case}.probabilities"].topk(2, dim=0).values
    wrong = (labels != tensors[f"{case}.label_map"].long()) & (first - second > NEAR)
    yield Compared(f"{case}.label_map", float(wrong.sum()), 0)


def _compare_logits(
    case: str,
    tensors: Mapping[str, Tensor],
    size: tuple[int, int],
    picture_CHW: Tensor,
    queries: Queries,
    recipe: Recipe,
    tower: VisionTower,
) -> Iterator[Compared]:
    windows = window_logits(tower, picture_CHW, queries.features, recipe)
    with torch.no_grad():
        patches = unit_patches(tower, cut_windows(picture_CHW, windows.windows), recipe)
    yield _compared(f"{case}.patch_features", patches, tensors, FEATURES)
    if recipe.crop:
        yield _compared(f"{case}.window_logits", windows.mean_rows(0, windows.height), tensors, FEATURES)
    logits = PictureLogits(windows, picture_CHW, size, recipe)
    if f"{case}.logits" in tensors:
        yield _compared(f"{case}.logits", torch.cat([band for _, band in logits.bands()], dim=1), tensors, FEATURES)
    probabilities = torch.cat([band for _, band in probability_bands(logits, queries.names_of, recipe)], dim=1)
    yield _compared(f"{case}.probabilities", probabilities, tensors, PROBABILITIES)
