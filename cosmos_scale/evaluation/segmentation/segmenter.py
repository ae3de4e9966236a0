"""The labels of one picture: windows through the image tower, likeness to the classes' names, mean, labels."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.evaluator import Encoder, Gather
from cosmos_scale.evaluation.prompts.texts import Names
from cosmos_scale.evaluation.segmentation.labels import class_probabilities, label_map, large_classes, most_probable
from cosmos_scale.evaluation.segmentation.pixels import normalise_levels, resize_for_windows
from cosmos_scale.evaluation.segmentation.refine import refine
from cosmos_scale.evaluation.segmentation.windows import Rows, WindowLogits, cut_windows, sliding_windows
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.model.vision import VisionTower

OWN_SHORT_SIDE = 336
"""Pixels of the shorter side of pictures that belong to no public set, for models of image size 224."""

_PUBLISHED_SIZE = 224  # of the models that the sizes are for
# Values of logits that are formed at a time: 4 MiB, which stay in a CPU's caches. About six copies live at once.
_BAND = 2**20


class Queries(NamedTuple):
    """The text features of names [U, E], normalised, and which of them are names of which class: names_of, places.

    See `class_probabilities`. Names that several classes have, such as "bed" of COCO-Object's background, are there
    once: such classes are equally probable, and no rounding may choose between them.
    """

    features: Tensor
    names_of: tuple[int, ...]
    places: tuple[int, ...] = ()


class Recipe(NamedTuple):
    """How pictures are segmented.

    short_side: pixels of the resized picture's shorter side. crop, stride: of the windows, in pixels; crop 0: the whole
    picture. csa: correlative self-attention in the last block. logit_scale: of the softmax over names.
    prob_threshold: less probable pixels get label 0. area_threshold: see `large_classes`; 0: every class is kept.
    pamr_steps, pamr_dilations: see `refine`; 0 steps: not refined. batch: windows encoded at a time.
    """

    short_side: int
    crop: int
    stride: int
    csa: bool = False
    logit_scale: float = 40.0
    prob_threshold: float = 0.0
    area_threshold: float = 0.0
    pamr_steps: int = 0
    pamr_dilations: tuple[int, ...] = (8, 16)
    batch: int = 64


def usual_recipe(image_size: int, short_side: int = OWN_SHORT_SIDE) -> Recipe:
    """Return how pictures are segmented by a model of an image size where nothing else is asked for.

    short_side: for models of image size 224; it is changed in proportion. Windows of the image size overlap by half.
    """
    return Recipe(round(short_side * image_size / _PUBLISHED_SIZE), image_size, max(1, image_size // 2))


def encode_queries(encoder: Encoder, names: Names, templates: Sequence[str], gather: Gather) -> Queries:
    """Encode every name of every class by itself, in all templates; collective, under no_grad."""
    every = [name for of_class in names for name in of_class]
    unequal = list(dict.fromkeys(every))
    features_UE = text_weights(encoder, [(name,) for name in unequal], templates, gather)
    places = tuple(map(unequal.index, every)) if len(unequal) < len(every) else ()
    return Queries(features_UE, tuple(map(len, names)), places)


def unit_patches(tower: VisionTower, crops: Tensor, recipe: Recipe) -> Tensor:
    """Return the normalised features of the patches of crops [N, 3, H, W]: [N, patches, E] float32."""
    at_a_time = min(recipe.batch, tower.crops_a_pass(crops))
    parts = [tower.patch_features(part, correlative=recipe.csa)[1].float() for part in crops.split(at_a_time)]
    features = torch.cat(parts)
    unit: Tensor = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return unit


@torch.no_grad()
def window_logits(tower: VisionTower, picture_CHW: Tensor, queries_QE: Tensor, recipe: Recipe) -> WindowLogits:
    """Compare the patches of all windows of a normalised picture with the queries.

    Raises DamagedSample where a window has no whole patch.
    """
    height, width = picture_CHW.shape[1:]
    patch = tower.conv1.patch_size
    windows = sliding_windows(height, width, recipe.crop, recipe.stride)
    crops = cut_windows(picture_CHW, windows)
    rows, columns = crops.shape[2] // patch, crops.shape[3] // patch
    if not rows or not columns:
        raise DamagedSample(f"{width} x {height} pixels after resizing hold no patch of {patch} x {patch}")
    logits_NPQ = unit_patches(tower, crops, recipe) @ queries_QE.T
    grids = logits_NPQ.transpose(1, 2).unflatten(2, (rows, columns))
    return WindowLogits(grids, windows, height, width)


class PictureLogits:
    """The logits of one picture at its own size, a band of rows at a time."""

    def __init__(self, logits: WindowLogits, picture_CHW: Tensor, size: tuple[int, int], recipe: Recipe) -> None:
        """picture: normalised and resized. size: the height and width of the picture before it was resized."""
        self.size = size
        self._queries = logits.grids.shape[1]
        self._rows: Rows = logits.resized(size, whole=not recipe.crop)
        if recipe.pamr_steps:
            guide = functional.interpolate(picture_CHW[None], size, mode="bilinear", align_corners=False)[0]
            refined = refine(self._rows(0, size[0]), guide, recipe.pamr_dilations, recipe.pamr_steps)
            self._rows = lambda first, last: refined[:, first:last]

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their logits [Q, rows, width], from top to bottom."""
        height, width = self.size
        rows = max(1, _BAND // (self._queries * width))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            yield slice(first, last), self._rows(first, last)


@torch.no_grad()
def probability_bands(logits: PictureLogits, queries: Queries, recipe: Recipe) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and the probabilities of the classes there [C, rows, width]; classes that are too small have 0."""
    kept_C = _kept_classes(logits, queries, recipe)
    for rows, band in logits.bands():
        probabilities_CRW = class_probabilities(band, recipe.logit_scale, *queries[1:])
        if kept_C is not None:
            probabilities_CRW *= kept_C[:, None, None]
        yield rows, probabilities_CRW


def _kept_classes(logits: PictureLogits, queries: Queries, recipe: Recipe) -> Tensor | None:
    """Tell which classes the area rule keeps in a picture [C] bool; None where there is no such rule."""
    if not recipe.area_threshold:
        return None
    best = torch.cat([most_probable(band_URW, *queries[1:]).flatten() for _, band_URW in logits.bands()])
    return large_classes(torch.bincount(best, minlength=len(queries.names_of)), recipe.area_threshold)


@torch.no_grad()
def segment(tower: VisionTower, pixels: Pixels, queries: Queries, recipe: Recipe) -> Tensor:
    """Return the label of each pixel of a picture [H, W, 3] uint8: [H, W] int64, on the queries' device.

    Raises DamagedSample where the picture is too narrow for a patch.
    """
    height, width = pixels.shape[:2]
    device = queries.features.device
    picture_CHW = normalise_levels(resize_for_windows(pixels, recipe.short_side)).to(device)
    compared = window_logits(tower, picture_CHW, queries.features, recipe)
    logits = PictureLogits(compared, picture_CHW, (height, width), recipe)
    labels_HW = torch.empty(height, width, dtype=torch.int64, device=device)
    if recipe.prob_threshold:
        for rows, probabilities_CRW in probability_bands(logits, queries, recipe):
            labels_HW[rows] = label_map(probabilities_CRW, recipe.prob_threshold)
        return labels_HW
    kept_C = _kept_classes(logits, queries, recipe)
    for rows, band_URW in logits.bands():  # the class of the largest logit is the most probable one
        labels_HW[rows] = most_probable(band_URW, *queries[1:], kept_C)
    return labels_HW
