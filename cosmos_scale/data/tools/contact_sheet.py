"""A picture of what the towers see in training: one row a sample, views at their own size, captions beside them."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cosmos_scale.data.decode import Views
from cosmos_scale.data.tools.own_pictures import MARK, MARK_FIELD
from cosmos_scale.files import make_folder, replace_file

MARGIN, GAP, LINE, LABEL = 20, 8, 18, 18
CAPTION_WIDTH = 620
ORIGINAL_WIDTH = 340
PAPER, RULE, INK, GLOBAL, LOCAL = "#ffffff", "#d9d9de", "#1c1c22", "#9a3412", "#1e5a8a"

Font = ImageFont.FreeTypeFont
Cell = tuple[str, str, Image.Image]


class Original(NamedTuple):
    """What a row's views are made of.

    title: the row's name. picture: decoded, [H, W, 3 or more] uint8. boxes: [V, 4], each view's top, left, height and
    width in the picture's pixels, global crops first.
    """

    title: str
    picture: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.int64]


def contact_sheet(
    samples: Sequence[tuple[Views, list[str]]],
    path: Path,
    global_captions: int = 2,
    zoom: int = 1,
    originals: Sequence[Original] | None = None,
) -> None:
    """Write a PNG of all views and captions of some samples; views are shown pixel by pixel.

    samples: one (views, captions) a row, as `execute` and `draw_captions` return them. global_captions: how many of the
    captions are marked as global. zoom: side of the square, in pixels of the PNG, that shows one pixel of a view.
    originals: one a row, shown before the row's views, with a frame around the box of each view.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu: more scripts than Pillow's built-in font
    font = ImageFont.truetype(fonts / "DejaVuSans.ttf", 13)
    bold = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", 13)
    rows = [_row(views, captions, global_captions, zoom, font, bold) for views, captions in samples]
    if originals is not None:
        rows = [
            _beside(row, original, len(views.global_crops), font, bold)
            for row, original, (views, _) in zip(rows, originals, samples, strict=True)
        ]

    width = max(row.width for row in rows) + 2 * MARGIN
    height = sum(row.height + 2 * MARGIN for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row in rows:
        sheet.paste(row, (MARGIN, top + MARGIN))
        top += row.height + 2 * MARGIN
        draw.line((MARGIN, top, width - MARGIN, top), fill=RULE)
    make_folder(path.parent)
    encoded = io.BytesIO()
    mark = PngInfo()
    mark.add_text(MARK_FIELD, MARK)
    sheet.save(encoded, format="PNG", pnginfo=mark)
    replace_file(path, encoded.getvalue())


def to_image(view: Tensor) -> Image.Image:
    """Return one view [3, H, W] uint8 as a picture."""
    return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


def _row(views: Views, captions: list[str], global_captions: int, zoom: int, font: Font, bold: Font) -> Image.Image:
    def cells(kind: str, colour: str, crops: Tensor) -> list[Cell]:
        return [(f"{kind} {i}", colour, _enlarge(to_image(view), zoom)) for i, view in enumerate(crops, start=1)]

    global_cells, local_cells = cells("global", GLOBAL, views.global_crops), cells("local", LOCAL, views.local_crops)
    blocks = [_grid(global_cells, len(global_cells), zoom, font)]
    if local_cells:
        # As many rows of local crops as fit beside one global crop.
        local_rows = max(1, round(blocks[0].height / (LABEL + local_cells[0][2].height + GAP)))
        blocks.append(_grid(local_cells, -(-len(local_cells) // local_rows), zoom, font))
    blocks.append(_captions(captions, global_captions, font, bold))

    width = sum(block.width for block in blocks) + 2 * MARGIN * (len(blocks) - 1)
    row = Image.new("RGB", (width, max(block.height for block in blocks)), PAPER)
    left = 0
    for block in blocks:
        row.paste(block, (left, 0))
        left += block.width + 2 * MARGIN
    return row


def _beside(row: Image.Image, original: Original, global_crops: int, font: Font, bold: Font) -> Image.Image:
    """Put a row's original before it, and its title above both."""
    highest = max(row.height - LABEL, ORIGINAL_WIDTH // 2)  # a row of small views has room for a larger original
    framed = framed_original(original, global_crops, ORIGINAL_WIDTH, highest)
    height, width = original.picture.shape[:2]

    title_lines = list(_wrap(original.title, bold, row.width + ORIGINAL_WIDTH))
    top = LINE * len(title_lines) + GAP
    whole_height = top + max(row.height, LABEL + framed.height)
    whole = Image.new("RGB", (ORIGINAL_WIDTH + 2 * MARGIN + row.width, whole_height), PAPER)
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(title_lines):
        pen.text((0, LINE * number), line, font=bold, fill=INK)
    pen.text((0, top), f"original, {width} x {height} px", font=font, fill=INK)
    whole.paste(framed, (0, top + LABEL))
    whole.paste(row, (ORIGINAL_WIDTH + 2 * MARGIN, top))
    return whole


def framed_original(original: Original, global_crops: int, widest: int, highest: int) -> Image.Image:
    """Return what a sample's views are made of, at most `widest` x `highest` pixels, with a frame for each view."""
    picture = Image.fromarray(np.ascontiguousarray(original.picture[..., :3]))
    scale = min(widest / picture.width, highest / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    framed = picture.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(framed)
    for view, (top, left, height, width) in reversed(list(enumerate(original.boxes.tolist()))):
        corners = [round(scale * edge) for edge in (left, top, left + width, top + height)]
        right, bottom = min(corners[2], size[0]) - 1, min(corners[3], size[1]) - 1
        frame = (corners[0], corners[1], max(right, corners[0]), max(bottom, corners[1]))
        pen.rectangle(frame, outline=PAPER, width=3)  # a white edge, so that the frame shows on dark ground too
        pen.rectangle(frame, outline=GLOBAL if view < global_crops else LOCAL, width=2)
    return framed


def _enlarge(view: Image.Image, zoom: int) -> Image.Image:
    return view.resize((view.width * zoom, view.height * zoom), Image.Resampling.NEAREST)


def _grid(cells: list[Cell], columns: int, zoom: int, font: Font) -> Image.Image:
    """Views in rows of `columns`, each under its label."""
    view_width, view_height = cells[0][2].size
    labels = [f"{label} ({view_width // zoom} px)" if view_width > 150 else label for label, _, _ in cells]
    cell_width = max(view_width, *(int(font.getlength(label)) for label in labels)) + GAP
    cell_height = LABEL + view_height + GAP
    rows = -(-len(cells) // columns)
    grid = Image.new("RGB", (columns * cell_width - GAP, rows * cell_height - GAP), PAPER)
    draw = ImageDraw.Draw(grid)
    for position, (label, (_, colour, view)) in enumerate(zip(labels, cells, strict=True)):
        left, top = position % columns * cell_width, position // columns * cell_height
        draw.text((left, top), label, font=font, fill=colour)
        grid.paste(view, (left, top + LABEL))
    return grid


def _captions(captions: list[str], global_captions: int, font: Font, bold: Font) -> Image.Image:
    indent = int(bold.getlength("global 00")) + GAP
    wrapped = [list(_wrap(caption, font, CAPTION_WIDTH - indent)) or [""] for caption in captions]
    height = sum(LINE * len(lines) + GAP // 2 for lines in wrapped)
    block = Image.new("RGB", (CAPTION_WIDTH, max(1, height)), PAPER)
    draw = ImageDraw.Draw(block)
    top = 0
    for position, lines in enumerate(wrapped):
        if position < global_captions:
            draw.text((0, top), f"global {position + 1}", font=bold, fill=GLOBAL)
        else:
            draw.text((0, top), f"local {position + 1 - global_captions}", font=bold, fill=LOCAL)
        for line in lines:
            draw.text((indent, top), line, font=font, fill=INK)
            top += LINE
        top += GAP // 2
    return block


def _wrap(text: str, font: Font, width: int) -> Iterator[str]:
    """Break text into lines of at most `width` pixels, between words where that is possible."""
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width or n == 1)
            yield word[:cut]
            word = word[cut:]
        line = word
    if line:
        yield line
