"""Photos and captions for benchmarks, always the same: cut from pictures that scikit-image and scikit-learn bring."""

import io
import random
from typing import Any

import open_clip.tokenizer
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

PIXELS = 240_000  # a photo's area: the average of CC3M's
JPEG_QUALITY = 90
LEAST_AREA = 0.5  # the least share of its picture that a photo is cut from
RATIOS = (3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2)  # width / height
NOT_ASCII = 0.02  # the share of sentences that hold letters, quotes or dashes outside ASCII
# DreamLIP's caption keys, each with its sentences and their shortest and longest number of words.
CAPTIONS = {
    "raw_caption": (1, 6, 16),
    "shortIB_captions": (1, 8, 14),
    "shortSV_captions": (1, 8, 16),
    "shortLLA_captions": (1, 10, 18),
    "longIB_captions": (4, 10, 24),
    "longSV_captions": (5, 10, 24),
    "longLLA_captions": (6, 10, 24),
}


def jpeg_photos(count: int) -> list[bytes]:
    """Cut photos out of nine pictures at random places, in several ratios, resized to about PIXELS."""
    pictures = [Image.fromarray(pixels).convert("RGB") for pixels in _pictures()]
    draw = random.Random(0)
    photos = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        ratio = draw.choice(RATIOS)
        # The largest box of this ratio that fits, shrunk.
        scale = draw.uniform(LEAST_AREA, 1.0) ** 0.5
        width = min(picture.width, picture.height * ratio) * scale
        height = width / ratio
        left, top = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - height)
        size = round((PIXELS * ratio) ** 0.5), round((PIXELS / ratio) ** 0.5)
        photo = picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if draw.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=JPEG_QUALITY)
        photos.append(buffer.getvalue())
    return photos


def caption_documents(count: int) -> list[dict[str, Any]]:
    """Return documents of DreamLIP's seven lists of sentences; words are as frequent as their rank in CLIP suggests."""
    pieces = open_clip.tokenizer.SimpleTokenizer().encoder
    ends = [piece.removesuffix("</w>") for piece in pieces if piece.endswith("</w>")]
    words = [word for word in ends if word.isascii() and word.isalpha()]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    draw = random.Random(0)

    def sentence(shortest: int, longest: int) -> str:
        chosen = draw.choices(words, weights, k=draw.randint(shortest, longest))
        if draw.random() < NOT_ASCII:
            chosen.append("caf\u00e9\u2019s")
        return " ".join(chosen).capitalize()

    return [
        {
            key: [sentence(shortest, longest) for _ in range(number)]
            for key, (number, shortest, longest) in CAPTIONS.items()
        }
        for _ in range(count)
    ]


def _pictures() -> list[Any]:
    left, right, _ = data.stereo_motorcycle()
    named = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        data.hubble_deep_field(),
        left,
        right,
        *named,
    ]
