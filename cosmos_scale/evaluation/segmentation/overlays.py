"""A picture with its true and its predicted labels in colours, and what the colours mean, as a PNG."""

import colorsys
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.segmentation.masks import Labels
from cosmos_scale.evaluation.segmentation.overlap import IGNORED
from cosmos_scale.files import reason_of, replace_file

_PANEL = 420  # pixels of a panel's longer side
_GAP, _LINE, _SWATCH = 12, 20, 14
_PAPER, _INK, _FAINT = "#ffffff", "#1c1c22", "#6b6b76"
_OPACITY = 0.6
_GOLDEN = 0.61803398875  # hues this far apart never come close to one another for long
_LEGEND_WIDTH = 200
_MOST_LEGEND = 40  # classes


def overlay_file(place: int, name: str) -> str:
    """Return the file name of the overlay of a picture, by its place in the set and its name."""
    return f"{place:05d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-100:]}.png"


def class_colours(classes: int, *, background: bool) -> npt.NDArray[np.uint8]:
    """Return a colour for each class [C, 3], and dark grey for a background, which is class 0."""
    colours = []
    for place in range(classes):
        hue = place * _GOLDEN % 1.0
        colours.append(colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.8)[place % 3], (0.95, 0.9, 0.65)[place // 3 % 3]))
    if background:
        colours[0] = (0.2, 0.2, 0.2)
    levels: npt.NDArray[np.uint8] = (np.array(colours) * 255).round().astype(np.uint8)
    return levels


def draw_overlay(path: Path, pixels: Pixels, true: Labels, predicted: Labels, titles: Sequence[str]) -> None:
    """Write a PNG: the picture [H, W, 3], its true and its predicted labels [H, W] over it, and a legend.

    titles: of the classes. Ignored pixels keep the picture's colour, paler. Raises UserError where it cannot be
    written.
    """
    colours = class_colours(len(titles), background=titles[0] == "background")
    counted = true != IGNORED
    right = (true == predicted)[counted].mean() if counted.any() else 0.0
    scale = _PANEL / max(true.shape)
    size = max(1, round(true.shape[1] * scale)), max(1, round(true.shape[0] * scale))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    panels = [
        ("picture", picture),
        ("truth", _coloured(picture, true, colours)),
        (f"prediction, {100 * right:.0f} % of pixels right", _coloured(picture, predicted, colours)),
    ]
    sheet = _side_by_side(panels, _legend(true, predicted, titles, colours))
    encoded = io.BytesIO()
    sheet.save(encoded, format="PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {reason_of(error)}") from error
    replace_file(path, encoded.getvalue())


def _coloured(picture: Image.Image, labels: Labels, colours: npt.NDArray[np.uint8]) -> Image.Image:
    """Return a picture in grey under the colours of labels, which may be of another size."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    shown = np.array(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))  # no colours between two
    return Image.blend(picture.convert("L").convert("RGB"), Image.fromarray(table[shown]), _OPACITY)


def _legend(
    true: Labels, predicted: Labels, titles: Sequence[str], colours: npt.NDArray[np.uint8]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the classes of a picture with their colours, the largest first, with their shares of its pixels."""
    of_true, of_predicted = (np.bincount(labels.ravel(), minlength=256) / labels.size for labels in (true, predicted))
    present = [label for label in range(len(titles)) if of_true[label] or of_predicted[label]]
    present.sort(key=lambda label: -max(of_true[label], of_predicted[label]))
    lines = [
        (
            f"{titles[label]}: {100 * of_true[label]:.0f} % / {100 * of_predicted[label]:.0f} %",
            tuple(colours[label].tolist()),
        )
        for label in present[:_MOST_LEGEND]
    ]
    if of_true[IGNORED]:
        lines.append((f"ignored: {100 * of_true[IGNORED]:.0f} %", (235, 235, 235)))
    if len(present) > _MOST_LEGEND:
        lines.append((f"and {len(present) - _MOST_LEGEND} more", (255, 255, 255)))
    return lines


def _side_by_side(
    panels: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[str, tuple[int, ...]]]
) -> Image.Image:
    font = _font()
    width, height = panels[0][1].size
    cell = max(width, max(int(font.getlength(title)) for title, _ in panels))
    text_width = max(_LEGEND_WIDTH, *(int(font.getlength(text)) + _SWATCH + _GAP for text, _ in legend))
    whole = (
        _GAP + len(panels) * (cell + _GAP) + text_width + _GAP,
        2 * _GAP + _LINE + max(height, _LINE * (1 + len(legend))),
    )
    sheet = Image.new("RGB", whole, _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _GAP
    for title, panel in panels:
        draw.text((left, _GAP), title, font=font, fill=_INK)
        sheet.paste(panel, (left, _GAP + _LINE))
        left += cell + _GAP
    draw.text((left, _GAP), "class: truth / prediction", font=font, fill=_FAINT)
    for number, (text, colour) in enumerate(legend, start=1):
        top = _GAP + _LINE * number
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=colour, outline=_FAINT)
        draw.text((left + _SWATCH + _GAP, top - 1), text, font=font, fill=_INK)
    return sheet


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has more scripts than Pillow's built-in font."""
    import matplotlib  # here: training needs no library that draws

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)
