"""The published recipe for views and captions, written with torchvision, Pillow and open_clip's tokenizer.

A picture is decoded once. Then each view is made on its own: random-resized crop, flip, colour jitter, grey, blur and
solarisation on 8-bit pictures, then a normalised float32 tensor. Captions are random sentences of a sample's whole
pool; the tokenizer is called once for each sample.
"""

import io
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import open_clip.tokenizer
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from cosmos_scale.batch import MEAN, STD

GLOBAL_CROPS, LOCAL_CROPS = 2, 6
GLOBAL_SIDE, LOCAL_SIDE = 224, 96
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)
CAPTIONS, GLOBAL_CAPTIONS, MAX_SENTENCES = 8, 2, 5
CONTEXT_LENGTH = 77

Lap = Callable[[str], object]
Stage = tuple[str, Callable[[Any], Any]]


class RandomBlur:
    """Pillow's GaussianBlur of a random radius."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur, or not."""
        if random.random() > self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class RandomSolarise:
    """Invert levels from 128 on, at random."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        """Invert, or not."""
        return ImageOps.solarize(image) if random.random() < self.probability else image


@lru_cache(maxsize=1)
def _stages() -> list[list[Stage]]:
    """Return the stages of each view, each with the name of the part that its time counts for."""
    bicubic = transforms.InterpolationMode.BICUBIC

    def view(side: int, scale: tuple[float, float], blur: float, solarise: float) -> list[Stage]:
        solarisation: list[Stage] = [("blur", RandomSolarise(solarise))] if solarise else []
        return [
            ("crops", transforms.RandomResizedCrop(side, scale=scale, interpolation=bicubic)),
            ("crops", transforms.RandomHorizontalFlip(0.5)),
            ("colour", transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)),
            ("colour", transforms.RandomGrayscale(0.2)),
            ("blur", RandomBlur(blur)),
            *solarisation,
            ("normalise", transforms.ToTensor()),
            ("normalise", transforms.Normalize(MEAN, STD)),
        ]

    first, second = view(GLOBAL_SIDE, GLOBAL_SCALE, 1.0, 0.0), view(GLOBAL_SIDE, GLOBAL_SCALE, 0.1, 0.2)
    return [first, second, *[view(LOCAL_SIDE, LOCAL_SCALE, 0.5, 0.0)] * LOCAL_CROPS]


def published_views(image_bytes: bytes, lap: Lap) -> list[Tensor]:
    """Decode a picture and make its 8 views; call `lap` with a part's name after each part of the work."""
    image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
    lap("decode")
    views = []
    for stages in _stages():
        view: Any = image
        for part, stage in stages:
            view = stage(view)
            lap(part)
        views.append(view)
    return views


def published_texts(document: dict[str, list[str]], lap: Lap) -> Tensor:
    """Draw a sample's 8 captions from all its sentences and return their ids, [8, 77]; `lap` as in published_views."""
    pool = [sentence for sentences in document.values() for sentence in sentences]
    counts = [random.randint(1, MAX_SENTENCES) for _ in range(GLOBAL_CAPTIONS)]
    texts = [". ".join(_sample(pool, count)) for count in counts] + _sample(pool, CAPTIONS - GLOBAL_CAPTIONS)
    lap("captions")
    ids: Tensor = _tokenizer()(texts)
    lap("tokens")
    return ids


def seed_published(seed: int) -> None:
    """Seed both generators that the recipe draws from."""
    random.seed(seed)
    torch.manual_seed(seed)


def _sample(pool: list[str], count: int) -> list[str]:
    whole, rest = (0, count) if count <= len(pool) else divmod(count, len(pool))
    return pool * whole + random.sample(pool, rest)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return open_clip.tokenizer.SimpleTokenizer(context_length=CONTEXT_LENGTH)
