"""What a loaded model returns: small tuples of tensors on the CPU, which print as a person reads them."""

import os
from operator import index
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.attention_maps import AttentionMaps, WordWeight, heat_of, peak_of
from cosmos_scale.inference.inputs import expanded
from cosmos_scale.words import counted

# What is printed: of pictures or classes, of a picture's classes, of a caption's words, of a title's letters.
_SHOWN, _TOP, _WORDS, _LETTERS = 10, 3, 5, 36


class ClassifiedPictures(NamedTuple):
    """The classes of N pictures.

    titles: of the pictures, their paths or numbers. classes: the first name of each of C classes. cosines: of the
    pictures' features with the classes' features, [N, C] float32. probabilities: [N, C] float32, softmax over classes
    of the cosines times exp of the model's logit_scale.
    """

    titles: tuple[str, ...]
    classes: tuple[str, ...]
    cosines: Tensor
    probabilities: Tensor

    @property
    def labels(self) -> Tensor:
        """The number of each picture's most likely class, the first of equal ones: [N] int64."""
        return self.cosines.max(1).indices

    @property
    def names(self) -> list[str]:
        """The name of each picture's most likely class."""
        return [self.classes[label] for label in self.labels.tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return of each picture the k most likely classes, or all of fewer, with their probabilities.

        Raises UserError where k is no whole number of at least 1.
        """
        try:
            wrong = index(k) < 1
        except TypeError:
            wrong = True
        if wrong:
            raise UserError(f"k: {k!r}; rule: a whole number, at least 1")
        order_NC = self.cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
        return [
            [(self.classes[label], float(row[label])) for label in labels]
            for labels, row in zip(order_NC.tolist(), self.probabilities, strict=True)
        ]

    def __repr__(self) -> str:
        """A line a picture with its most likely classes."""
        lines = [f"{counted(len(self.titles), 'picture')}, {counted(len(self.classes), 'class', 'classes')}"]
        for title, best in zip(self.titles[:_SHOWN], self.top(_TOP), strict=False):
            lines.append(f"  {_end_of(title)}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in best))
        if len(self.titles) > _SHOWN:
            lines.append(f"  ... and {len(self.titles) - _SHOWN:,} more")
        return "\n".join(lines)


class SegmentedPicture(NamedTuple):
    """The class of each pixel of a picture.

    title: of the picture, its path or kind. classes: the first name of each class. labels: [H, W] int64, places in
    classes, at the picture's own size.
    """

    title: str
    classes: tuple[str, ...]
    labels: Tensor

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels that each class has, by name, the largest first."""
        counts = self.labels.flatten().bincount(minlength=len(self.classes)).tolist()
        shares = {name: count / self.labels.numel() for name, count in zip(self.classes, counts, strict=True)}
        return dict(sorted(shares.items(), key=lambda entry: -entry[1]))

    def mask(self, name: str) -> Tensor:
        """Return where a class is: [H, W] bool; raises UserError for a name that is none of the classes."""
        if name not in self.classes:
            raise UserError(f"name: {name!r}; rule: one of {', '.join(self.classes)}")
        return self.labels == self.classes.index(name)

    def __repr__(self) -> str:
        """The size, and the shares of the classes that are there."""
        height, width = self.labels.shape
        present = [f"{name} {100 * share:.1f} %" for name, share in self.shares.items() if share]
        more = f", and {len(present) - _SHOWN} more" if len(present) > _SHOWN else ""
        return f"{_end_of(self.title)}, {width} x {height} pixels\n  {', '.join(present[:_SHOWN])}{more}"


class CaptionAttention(NamedTuple):
    """What a caption looks at in a picture, and the picture in the caption.

    title: of the picture, its path or kind. image: the crop that the model saw, [S, S, 3] uint8. maps: the weights of
    each head. words: of the caption as the model reads it.
    """

    title: str
    caption: str
    image: Tensor
    maps: AttentionMaps
    words: tuple[WordWeight, ...]

    @property
    def image_map(self) -> Tensor:
        """The weights of the patches, the mean over heads, spread over 0..1: [rows, columns] float32."""
        return self.maps.image_map

    @property
    def heat(self) -> Tensor:
        """The image map enlarged to the crop: [S, S] float32."""
        return heat_of(self.image_map, *self.image.shape[:2])

    @property
    def peak(self) -> tuple[float, float]:
        """Where the caption looks most: the middle of that patch, as shares of the crop's height and width."""
        return peak_of(self.image_map)

    def save(self, path: str | Path) -> None:
        """Draw crop, heat and words into a PNG, JPEG, WebP, TIFF, PDF or SVG, by the suffix; without one a PNG.

        Raises UserError for another suffix, and where the file cannot be written.
        """
        from cosmos_scale.evaluation.attention_pictures import SampleMaps, write_picture

        write_picture(
            SampleMaps(self.title, self.caption, self.image.numpy(), self.maps, self.words), expanded(path, "path")
        )

    def __repr__(self) -> str:
        """Where the caption looks, and the words that the picture looks at most, with their places in 0..1."""
        top, left = self.peak
        strongest = sorted(self.words, key=lambda word: -word.value)[:_WORDS]
        return (
            f"{_end_of(self.title)}: {self.caption}\n"
            f"  the caption looks most at {100 * top:.0f} % from the top, {100 * left:.0f} % from the left\n"
            f"  the picture looks most at: {', '.join(f'{word.word} {word.value:.2f}' for word in strongest)}"
        )


def _end_of(title: str) -> str:
    """Return a title, or the end of a long one: of a path whole names, where there is room."""
    if len(title) <= _LETTERS:
        return title
    end = title[-_LETTERS:]
    return f"...{end[max(0, end.find(os.sep)) :]}"
