"""Check dense features, segmentation, refinement (PAMR) and IoU of a golden file of evaluation, case by case."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cosmos_scale.evaluation.evaluator import one_process
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
from tools.golden_numbers import EQUAL, Compared, EvaluationGolden, compare, compare_number, compare_softmax

DENSE, INPUT, FEATURES, PROBABILITIES, REFINED, SHARE = 5e-5, 1e-6, 1e-5, 2e-5, 2e-5, 1e-6
NEAR = 1e-4  # pixels whose two best classes are nearer may have either label


def check_dense(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare the image tower's features at a size, plain and with correlative self-attention."""
    encoder = golden.encoder()
    images = golden.shaped(f"{case}.images", None, 3, None, None).to(golden.device)
    for prefix, correlative in (("", False), ("csa_", True)):
        with torch.no_grad():
            pooled, tokens = encoder.model.visual.patch_features(images, correlative=correlative)
        yield compare(golden, f"{case}.{prefix}pooled", pooled, DENSE)
        yield compare(golden, f"{case}.{prefix}tokens", tokens, DENSE)


def check_segmentation(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare each step from a picture to its labels; the steps after the texts begin with the file's features."""
    how, encoder = golden.parameters(case), golden.encoder()
    recipe, tower = recipe_in(how), encoder.model.visual
    pixels = golden.shaped(f"{case}.image", None, None, 3).numpy()
    resized = resize_for_windows(pixels, recipe.short_side, how["long_side"])
    yield compare(golden, f"{case}.resized", torch.from_numpy(resized), EQUAL)
    picture_CHW = normalise_levels(resized)
    if f"{case}.input" in golden.names():
        yield compare(golden, f"{case}.input", picture_CHW, INPUT)
    names = [line.split(", ") for line in how["class_lines"]]
    names_of = tuple(map(len, names))
    one_each = [(name,) for of_class in names for name in of_class]
    with torch.no_grad():
        yield compare(
            golden,
            f"{case}.query_features",
            text_weights(encoder, one_each, imagenet_templates(), one_process),
            FEATURES,
        )
    classes = torch.arange(len(names)).repeat_interleave(torch.tensor(names_of))
    yield compare(golden, f"{case}.query_class", classes, EQUAL)
    features = golden.shaped(f"{case}.query_features", len(one_each), None).float().to(golden.device)
    queries = Queries(features, names_of)

    picture_CHW = picture_CHW.to(golden.device, golden.dtype)
    windows = window_logits(tower, picture_CHW, queries.features, recipe)
    with torch.no_grad():
        patches = unit_patches(tower, cut_windows(picture_CHW, windows.windows), recipe)
    yield compare(golden, f"{case}.patch_features", patches, FEATURES)
    if recipe.crop:
        yield compare(golden, f"{case}.window_logits", windows.mean()(0, windows.height), FEATURES)
        theirs_NPQ = golden.tensor(f"{case}.patch_features").to(golden.device) @ features.to(golden.dtype).T
        grids = theirs_NPQ.transpose(1, 2).reshape(windows.grids.shape).contiguous()
        by_theirs = windows._replace(grids=grids).mean()(0, windows.height)
        yield compare(golden, f"{case}.window_logits", by_theirs, FEATURES)
    logits = PictureLogits(windows, picture_CHW, (len(pixels), len(pixels[0])), recipe)
    if f"{case}.logits" in golden.names():
        yield compare(golden, f"{case}.logits", torch.cat([band for _, band in logits.bands()], dim=1), FEATURES)
    bands = [band for _, band in probability_bands(logits, queries, recipe)]
    yield compare_softmax(golden, f"{case}.probabilities", torch.cat(bands, dim=1), PROBABILITIES)

    if golden.dtype == torch.float64:
        return  # labels are whole numbers
    first, second = golden.shaped(f"{case}.probabilities", len(names), *pixels.shape[:2]).topk(2, dim=0).values
    published = golden.shaped(f"{case}.label_map", *pixels.shape[:2]).long()
    labels = segment(tower, pixels, queries, recipe).cpu()
    wrong = (labels != published) & (first - second > NEAR)
    yield Compared(f"{case}.label_map", float(wrong.sum()), EQUAL)


def check_refinement(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare the refinement alone."""
    how = golden.parameters(case)
    logits, picture = (golden.shaped(f"{case}.{name}", None, None, None) for name in ("mask", "image"))
    refined = refine(logits.to(golden.device), picture.to(golden.device), how["dilations"], how["steps"])
    yield compare(golden, f"{case}.output", refined, REFINED)


def check_overlap(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare IoU and accuracy of each class, and their means in the header."""
    how = golden.parameters(case)
    true = golden.tensor(f"{case}.mask").long()
    if how["reduce_zero_label"]:
        true = torch.where((true == 0) | (true == IGNORED), IGNORED, true - 1)
    scores = Scores.of(count_overlap(golden.tensor(f"{case}.prediction").long(), true, how["classes"]))
    yield compare(golden, f"{case}.iou", scores.iou, SHARE)
    yield compare(golden, f"{case}.acc", scores.accuracy, SHARE)
    means = {"mIoU": scores.mean_iou, "mAcc": scores.mean_accuracy, "aAcc": scores.all_accuracy}
    for name, mean in means.items():
        yield compare_number(f"{case}: {name}", mean, how.get(name), SHARE)


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
