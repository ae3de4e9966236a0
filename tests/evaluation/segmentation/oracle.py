"""Zero-shot segmentation in NumPy and float64, written from the behaviour's description alone, as an oracle.

`mistake` names one deviation from the description, which a comparison with the oracle must notice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mistake = Literal[
    "",
    "csa halved",
    "csa everywhere",
    "csa from queries alone",
    "no 0.1 offset",
    "corners aligned",
    "last window not shifted back",
    "names summed",
    "area of the whole picture",
    "biased deviation",
    "centre once",
    "features not normalised",
    "probability threshold ignored",
]

_ERF = np.vectorize(math.erf, otypes=[np.float64])


class Sizes(NamedTuple):
    """Of the image tower."""

    patch: int
    heads: int
    layers: int


class Task(NamedTuple):
    """How one picture is segmented; names_of: names of each class."""

    short_side: int
    crop: int
    stride: int
    csa: bool
    logit_scale: float
    prob_threshold: float
    area_threshold: float
    pamr_steps: int
    pamr_dilations: Sequence[int]
    names_of: Sequence[int]


def resize_8_bit(image: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """OpenCV's bilinear resize of 8-bit levels: weights of 11 bits, sums in whole numbers."""

    def taps(source: int, target: int, *, rows: bool) -> tuple[npt.NDArray[np.int64], ...]:
        place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
        first = np.floor(place).astype(np.int64)
        share = place - first.astype(np.float32)
        if (
            not rows
        ):  # beyond the first and the last column one tap counts whole; of rows both taps count, one row twice
            share[(first < 0) | (first >= source - 1)] = 0
        weights = (np.rint(one * 2048).astype(np.int64) for one in (1 - share, share))
        return first.clip(0, source - 1), (first + 1).clip(0, source - 1), *weights

    left, right, by_left, by_right = taps(image.shape[1], width, rows=False)
    levels = image.astype(np.int64)
    rows = levels[:, left] * by_left[:, None] + levels[:, right] * by_right[:, None]
    top, bottom, by_top, by_bottom = taps(image.shape[0], height, rows=True)
    upper, lower = (
        weight[:, None, None] * (rows[place] >> 4) >> 16 for place, weight in ((top, by_top), (bottom, by_bottom))
    )
    return ((upper + lower + 2) >> 2).clip(0, 255).astype(np.uint8)


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    factor = min(2048 / max(height, width), short_side / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def normalised(image: npt.NDArray[np.uint8]) -> Array:
    mean, deviation = (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)
    planes: Array = ((image.astype(np.float64) - mean) / deviation).transpose(2, 0, 1)
    return planes


def bilinear(values: Array, height: int, width: int, *, aligned: bool = False) -> Array:
    """Resize [C, h, w]."""

    def matrix(source: int, target: int) -> Array:
        if aligned:
            places = np.arange(target) * ((source - 1) / (target - 1) if target > 1 else 0.0)
        else:
            places = ((np.arange(target) + 0.5) * (source / target) - 0.5).clip(0)
        weights = np.zeros((target, source))
        for row, place in enumerate(places):
            first = min(int(place), source - 1)
            weights[row, first] += 1 - (place - first)
            weights[row, min(first + 1, source - 1)] += place - first
        return weights

    resized: Array = matrix(values.shape[1], height) @ values @ matrix(values.shape[2], width).T
    return resized


def position_table(table: Array, rows: int, columns: int, offset: float) -> Array:
    """DINO's bicubic interpolation of the patches' rows [n, D]: [rows x columns, D]."""
    side = math.isqrt(len(table))

    def matrix(target: int) -> Array:
        scale = (target + offset) / side
        weights = np.zeros((target, side))
        for row in range(target):
            place = (row + 0.5) / scale - 0.5
            first = math.floor(place)
            for tap in range(first - 1, first + 3):
                weights[row, min(max(tap, 0), side - 1)] += _cubic(abs(place - tap))
        return weights

    grid = table.reshape(side, side, -1)
    resized: Array = np.einsum("rs,ct,std->rcd", matrix(rows), matrix(columns), grid).reshape(rows * columns, -1)
    return resized


def _cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return a * (((distance - 5) * distance + 8) * distance - 4)
    return 0.0


def _norm(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    shares: Array = powers / powers.sum(axis, keepdims=True)
    return shares


def dense_features(
    image: Array, weights: Mapping[str, Array], sizes: Sizes, csa: bool, mistake: Mistake = ""
) -> tuple[Array, Array]:
    """The pooled feature [E] and the patches' features [patches, E] of one image [3, H, W], not normalised."""
    patch = sizes.patch
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    kept = image[:, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    tokens = (
        kept.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        @ weights["conv1.weight"].reshape(len(weights["class_embedding"]), -1).T
    )
    table = weights["positional_embedding"]
    positions = table[1:]
    if image.shape[1] != image.shape[2] or rows * columns != len(positions):
        positions = position_table(positions, rows, columns, 0.0 if mistake == "no 0.1 offset" else 0.1)
    x = np.concatenate([weights["class_embedding"][None] + table[:1], tokens + positions])
    x = _norm(x, weights, "ln_pre")
    for layer in range(sizes.layers):
        name = f"transformer.resblocks.{layer}"
        here = csa and (layer == sizes.layers - 1 or mistake == "csa everywhere")
        x = _block(x, weights, name, sizes.heads, here, mistake)
    features: Array = _norm(x, weights, "ln_post") @ weights["proj"]
    return features[0], features[1:]


def _block(x: Array, weights: Mapping[str, Array], name: str, heads: int, csa: bool, mistake: Mistake) -> Array:
    stacked = (
        _norm(x, weights, f"{name}.ln_1") @ weights[f"{name}.attn.in_proj_weight"].T
        + weights[f"{name}.attn.in_proj_bias"]
    )
    q, k, v = (part.reshape(len(x), heads, -1).transpose(1, 0, 2) for part in np.split(stacked, 3, axis=1))
    scale = 1 / math.sqrt(q.shape[2])

    def likeness(a: Array, b: Array) -> Array:
        return softmax(a @ b.transpose(0, 2, 1) * scale, -1)

    if not csa:
        attention = likeness(q, k)
    elif mistake == "csa from queries alone":
        attention = 2 * likeness(q, q)
    else:
        attention = (likeness(q, q) + likeness(k, k)) * (0.5 if mistake == "csa halved" else 1.0)
    mixed = (attention @ v).transpose(1, 0, 2).reshape(len(x), -1)
    x = x + mixed @ weights[f"{name}.attn.out_proj.weight"].T + weights[f"{name}.attn.out_proj.bias"]
    hidden = _norm(x, weights, f"{name}.ln_2") @ weights[f"{name}.mlp.c_fc.weight"].T + weights[f"{name}.mlp.c_fc.bias"]
    hidden = hidden * 0.5 * (1 + _ERF(hidden / math.sqrt(2)))
    left: Array = x + hidden @ weights[f"{name}.mlp.c_proj.weight"].T + weights[f"{name}.mlp.c_proj.bias"]
    return left


def windows(height: int, width: int, crop: int, stride: int, mistake: Mistake = "") -> list[tuple[int, int, int, int]]:
    """(y1, y2, x1, x2) of each window."""
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    boxes = []
    for row in range(rows):
        for column in range(columns):
            y1, x1 = row * stride, column * stride
            y2, x2 = min(y1 + crop, height), min(x1 + crop, width)
            if mistake != "last window not shifted back":
                y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            boxes.append((y1, y2, x1, x2))
    return boxes


def patch_logits(
    image: Array, queries: Array, weights: Mapping[str, Array], sizes: Sizes, csa: bool, mistake: Mistake
) -> Array:
    """Cosines [queries, rows, columns] of one window."""
    _, features = dense_features(image, weights, sizes, csa, mistake)
    if mistake != "features not normalised":
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    logits: Array = (features @ queries.T).T.reshape(len(queries), image.shape[1] // sizes.patch, -1)
    return logits


def mean_logits(
    image: Array, queries: Array, weights: Mapping[str, Array], sizes: Sizes, task: Task, mistake: Mistake = ""
) -> Array:
    """Window logits [queries, h, w], averaged; without windows the patches' own grid."""
    if not task.crop:
        return patch_logits(image, queries, weights, sizes, task.csa, mistake)
    total, count = np.zeros((len(queries), *image.shape[1:])), np.zeros(image.shape[1:])
    for y1, y2, x1, x2 in windows(image.shape[1], image.shape[2], task.crop, task.stride, mistake):
        logits = patch_logits(image[:, y1:y2, x1:x2], queries, weights, sizes, task.csa, mistake)
        total[:, y1:y2, x1:x2] += bilinear(logits, y2 - y1, x2 - x1, aligned=mistake == "corners aligned")
        count[y1:y2, x1:x2] += 1
    return total / count


def pamr(image: Array, mask: Array, dilations: Sequence[int], steps: int, mistake: Mistake = "") -> Array:
    """Pixel-adaptive refinement."""
    if mask.shape[1:] != image.shape[1:]:
        mask = bilinear(mask, *image.shape[1:], aligned=True)

    def at(values: Array, down: int, right: int) -> Array:
        rows = (np.arange(values.shape[1]) + down).clip(0, values.shape[1] - 1)
        columns = (np.arange(values.shape[2]) + right).clip(0, values.shape[2] - 1)
        return values[:, rows][:, :, columns]

    steps_around = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    places = [(d * down, d * right) for d in dilations for down, right in steps_around if (down, right) != (0, 0)]
    centres = 1 if mistake == "centre once" else len(dilations)
    values = np.stack([at(image, *place) for place in places] + [image] * centres)
    deviation = values.std(0, ddof=0 if mistake == "biased deviation" else 1)
    likeness = np.stack([(-np.abs(image - at(image, *place)) / (1e-8 + 0.1 * deviation)).mean(0) for place in places])
    shares = softmax(likeness, 0)
    for _ in range(steps):
        mask = sum((share * at(mask, *place) for share, place in zip(shares, places, strict=True)), np.zeros_like(mask))
    return mask


def probabilities(logits: Array, task: Task, mistake: Mistake = "") -> Array:
    """[C, H, W], of logits [queries, H, W] at the picture's size."""
    p = softmax(task.logit_scale * logits, 0)
    starts = np.cumsum([0, *task.names_of[:-1]])
    by_class = (np.add if mistake == "names summed" else np.maximum).reduceat(p, starts, axis=0)
    if task.area_threshold:
        pixels = np.bincount(by_class.argmax(0).ravel(), minlength=len(by_class))
        whole = pixels.sum() if mistake == "area of the whole picture" else pixels[1:].sum()
        for label in range(1, len(by_class)):
            by_class[label] *= pixels[label] > task.area_threshold * whole
    result: Array = by_class
    return result


def labels_of(p: Array, task: Task, mistake: Mistake = "") -> npt.NDArray[np.int64]:
    labels: npt.NDArray[np.int64] = p.argmax(0)
    if mistake != "probability threshold ignored":
        labels[p.max(0) < task.prob_threshold] = 0
    return labels


def segment_in_float64(
    image: npt.NDArray[np.uint8],
    queries: Any,
    weights: Mapping[str, Array],
    sizes: Sizes,
    task: Task,
    mistake: Mistake = "",
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Probabilities [C, H, W] and labels [H, W] of a picture [H, W, 3]."""
    height, width = image.shape[:2]
    new_height, new_width = target_size(height, width, task.short_side)
    x = normalised(resize_8_bit(image, new_width, new_height))
    logits = bilinear(mean_logits(x, queries, weights, sizes, task, mistake), height, width)
    if task.pamr_steps:
        logits = pamr(bilinear(x, height, width), logits, task.pamr_dilations, task.pamr_steps, mistake)
    p = probabilities(logits, task, mistake)
    return p, labels_of(p, task, mistake)


def mean_iou(
    masks: Sequence[npt.NDArray[Any]], predictions: Sequence[npt.NDArray[Any]], classes: int
) -> dict[str, Any]:
    """mmsegmentation's formulas with plain sets of pixels: iou, acc (NaN where nothing is), mIoU, aAcc, mAcc."""
    iou, acc, right, pixels = [], [], 0, 0
    for label in range(classes):
        both = predicted = true = 0
        for mask, prediction in zip(masks, predictions, strict=True):
            counts = mask != 255
            both += int((counts & (mask == label) & (prediction == label)).sum())
            predicted += int((counts & (prediction == label)).sum())
            true += int((counts & (mask == label)).sum())
        union = predicted + true - both
        iou.append(both / union if union else math.nan)
        acc.append(both / true if true else math.nan)
        right, pixels = right + both, pixels + true
    found, reached = ([value for value in values if not math.isnan(value)] for values in (iou, acc))
    return {
        "iou": iou,
        "acc": acc,
        "mIoU": sum(found) / len(found),
        "mAcc": sum(reached) / len(reached),
        "aAcc": right / pixels,
    }
