"""Generated scenes: coloured, textured shapes with sizes, places and relations, as JPEG with captions and masks.

Everything is drawn from the caller's random generator, so that a scene is a function of its seed. The demo and the
tests train on these scenes: scenes need no network, and what a caption says can be seen in the picture.
"""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 128
"""Side of a picture in pixels."""

_SUPERSAMPLING = 2
_NOISE = 5.0  # standard deviation in grey levels: flat colours would make every patch of a background identical

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (135, 45, 165),
    "orange": (240, 140, 35),
    "white": (242, 242, 242),
    "black": (22, 22, 22),
}
# Few backgrounds on purpose: knowing the background alone must not be worth much in retrieval.
BACKGROUNDS = {"grey": (128, 130, 132), "pink": (246, 186, 200), "brown": (122, 88, 56), "cyan": (150, 225, 235)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.195}
"""Radius as a share of the side."""
PLACES = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
"""Centre (x, y) as a share of the side."""

CLASSES = tuple(f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES))
"""A scene's class is the colour and shape of its largest object."""

_COUNTS = (1, 2, 2, 3)
_NUMBERS = {1: "one shape", 2: "two shapes", 3: "three shapes"}


class SceneObject(NamedTuple):
    """One shape, in the words that captions use."""

    size: str
    texture: str
    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        """Colour and shape, which no two objects of a scene share."""
        return f"{self.colour} {self.shape}"

    @property
    def description(self) -> str:
        """Size, texture unless plain, colour and shape."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{self.size} {texture}{self.name}"


class Scene(NamedTuple):
    """A background and one to three objects, the largest first; colours, shapes and places differ between objects."""

    background: str
    objects: tuple[SceneObject, ...]

    @property
    def attributes(self) -> tuple[str, frozenset[SceneObject]]:
        """What the scene shows, in no order: equal for two scenes that differ only in the order of their objects."""
        return self.background, frozenset(self.objects)

    @property
    def class_name(self) -> str:
        """One of CLASSES."""
        return self.objects[0].name


class Picture(NamedTuple):
    """A rendered scene: the JPEG file, and one 1-bit PNG file per object that marks the object's visible pixels."""

    jpeg: bytes
    masks: tuple[bytes, ...]


def draw_scene(generator: np.random.Generator) -> Scene:
    """Draw the attributes of a scene; the first object is strictly larger than the others."""

    def pick(words: Sequence[str], count: int) -> list[str]:
        return [words[i] for i in generator.permutation(len(words))[:count]]

    count = _COUNTS[generator.integers(len(_COUNTS))]
    sizes = list(SIZES)
    main = int(generator.integers(1, len(sizes)))
    drawn_sizes = [sizes[main]] + [sizes[generator.integers(main)] for _ in range(count - 1)]
    textures = [TEXTURES[generator.integers(len(TEXTURES))] for _ in range(count)]
    parts = zip(
        drawn_sizes,
        textures,
        pick(list(COLOURS), count),
        pick(SHAPES, count),
        pick(list(PLACES), count),
        strict=True,
    )
    return Scene(pick(list(BACKGROUNDS), 1)[0], tuple(SceneObject(*part) for part in parts))


def relation(first: SceneObject, second: SceneObject) -> str:
    """Say where the first object lies as seen from the second: above, below, left of, right of."""
    (x, y), (other_x, other_y) = PLACES[first.place], PLACES[second.place]
    vertical = "" if y == other_y else "above" if y < other_y else "below"
    horizontal = "" if x == other_x else "left of" if x < other_x else "right of"
    return " and ".join(word for word in (vertical, horizontal) if word)


def captions(scene: Scene, generator: np.random.Generator) -> dict[str, list[str]]:
    """Describe a scene in the keys of DreamLIP: lists of sentences, each without its full stop.

    `raw_caption` is one sentence that names every attribute, so it differs between scenes whose attributes differ.
    The random generator shuffles the order in which objects are named.
    """
    objects = [scene.objects[i] for i in generator.permutation(len(scene.objects))]
    main, background = scene.objects[0], scene.background
    pairs = [(a, b) for a, b in itertools.combinations(objects, 2)]
    return {
        "raw_caption": [", ".join([f"a {o.description} {o.place}" for o in objects] + [f"on {background}"])],
        "shortIB_captions": [" and ".join(_an(o.name) for o in objects) + f" on a {background} background"],
        "shortSV_captions": [f"a {main.description} in the {main.place}"],
        "shortLLA_captions": [
            f"a {background} picture of {_NUMBERS[len(objects)]}",
            f"the {main.texture} {main.shape} is {main.colour}",
        ],
        "longIB_captions": [f"there is a {o.description} in the {o.place}" for o in objects],
        "longSV_captions": [f"a {o.size} {o.shape} is {o.place}" for o in objects]
        + [f"the {a.name} is {relation(a, b)} the {b.name}" for a, b in pairs],
        "longLLA_captions": [f"the {o.colour} {o.shape} is {o.size} and {o.texture}" for o in objects]
        + [f"the {main.name} is larger than the {o.name}" for o in objects if o is not main]
        + [f"the background is {background}"],
    }


def _an(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def render(scene: Scene, generator: np.random.Generator) -> Picture:
    """Paint a scene with slightly random centres, radii, stripes and noise, and encode it.

    The objects never touch: the largest two radii and both shifts stay below the distance of two places.
    """
    pixels_HWC = _background(scene.background, generator)
    masks = []
    for item in scene.objects:
        centre_x, centre_y = (SIDE * (share + generator.uniform(-0.03, 0.03)) for share in PLACES[item.place])
        radius = SIDE * SIZES[item.size] * generator.uniform(0.93, 1.07)
        coverage_HW = _coverage(item.shape, centre_x, centre_y, radius)
        paint_HWC = _paint(item, generator)
        pixels_HWC += coverage_HW[..., None] * (paint_HWC - pixels_HWC)
        masks.append(_png(coverage_HW >= 0.5))
    pixels_HWC += _NOISE * generator.standard_normal(pixels_HWC.shape, dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return Picture(file.getvalue(), tuple(masks))


def _background(name: str, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """A colour that grows lighter in a random direction: [SIDE, SIDE, 3]."""
    angle = generator.uniform(0, 2 * math.pi)
    across = np.linspace(-1.0, 1.0, SIDE)
    slope_HW = math.cos(angle) * across[None, :] + math.sin(angle) * across[:, None]
    return (np.asarray(BACKGROUNDS[name]) + 8.0 * slope_HW[..., None]).astype(np.float32)


def _paint(item: SceneObject, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """The object's colour and texture over the whole picture: [SIDE, SIDE, 3]."""
    colour = np.asarray(COLOURS[item.colour], dtype=np.float32)
    # A texture's second tone is lighter on black and darker elsewhere, so that it shows on every colour.
    second = colour + 110.0 if colour.max() < 60 else colour * 0.5
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    phase = generator.uniform(0, 10, size=2)
    if item.texture == "striped":
        marked_HW = (rows + phase[0]) % 10 < 5
    elif item.texture == "dotted":
        marked_HW = ((rows + phase[0]) % 10 - 5) ** 2 + ((columns + phase[1]) % 10 - 5) ** 2 < 9.0
    else:
        marked_HW = np.zeros((SIDE, SIDE), dtype=bool)
    return np.where(marked_HW[..., None], second, colour)


def _coverage(shape: str, x: float, y: float, radius: float) -> npt.NDArray[np.float32]:
    """How much of each pixel the shape covers, 0..1: [SIDE, SIDE]."""
    image = Image.new("L", (SIDE * _SUPERSAMPLING, SIDE * _SUPERSAMPLING))
    _DRAWERS[shape](ImageDraw.Draw(image), x * _SUPERSAMPLING, y * _SUPERSAMPLING, radius * _SUPERSAMPLING)
    coverage: npt.NDArray[np.float32] = np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    return coverage


def _png(mask_HW: npt.NDArray[np.bool_]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask_HW).save(file, "PNG")
    return file.getvalue()


def _draw_circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=255)


def _draw_ring(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), outline=255, width=round(0.42 * r))


def _draw_square(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    half = 0.9 * r
    draw.rectangle((x - half, y - half, x + half, y + half), fill=255)


def _draw_triangle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)


def _draw_cross(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    arm = 0.34 * r
    draw.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
    draw.rectangle((x - arm, y - r, x + arm, y + r), fill=255)


def _draw_star(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    radii = itertools.cycle((1.1 * r, 0.48 * r))
    angles = (k * math.pi / 5 for k in range(10))
    draw.polygon([(x + s * math.sin(a), y - s * math.cos(a)) for s, a in zip(radii, angles, strict=False)], fill=255)


_DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float], None]] = {
    "circle": _draw_circle,
    "square": _draw_square,
    "triangle": _draw_triangle,
    "star": _draw_star,
    "cross": _draw_cross,
    "ring": _draw_ring,
}
