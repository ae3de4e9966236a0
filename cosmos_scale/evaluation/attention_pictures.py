"""Attention maps for people: a picture of one sample, and one page of HTML for many, which needs no other file."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cosmos_scale.drawing import usual_figures
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.attention_maps import AttentionMaps, WordWeight, heat_of
from cosmos_scale.files import replace_file, whole_file, writing
from cosmos_scale.words import figure_text

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

HEAT, WORDS = "inferno", "Oranges"  # matplotlib's colour maps
HEAT_SHARE = 0.6  # of the heat's colour over the crop
SMALLEST = 224  # pixels of a side of a picture on the page
FORMS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")  # of a drawn sample, by its file's name

Levels = npt.NDArray[np.uint8]


class SampleMaps(NamedTuple):
    """One sample to show. levels: the crop that the model saw, [H, W, 3] uint8. words: of the caption."""

    title: str
    caption: str
    levels: Levels
    maps: AttentionMaps
    words: Sequence[WordWeight]


@usual_figures()
def write_picture(sample: SampleMaps, path: Path) -> None:
    """Draw the crop, its heat map, and the caption with its tokens' weights, in the form that the path's suffix names.

    Without a suffix it is a PNG. Raises UserError where the suffix is another one, or the file cannot be written.
    """
    from matplotlib import colormaps  # here: it takes half a second
    from matplotlib.figure import Figure

    if not path.name:
        raise UserError(f"{path}: names no file; rule: the picture's file, such as maps{FORMS[0]}")
    form = path.suffix.lower() or FORMS[0]
    if form not in FORMS:
        raise UserError(f"{path}: {path.suffix} is no form that can be drawn; rule: {', '.join(FORMS)}")
    figure = Figure(figsize=(7.6, 4.9), dpi=100)
    figure.suptitle(figure_text(sample.title), fontsize=10, x=0.02, ha="left")
    crop, heat = figure.add_axes((0.02, 0.31, 0.43, 0.6)), figure.add_axes((0.48, 0.31, 0.43, 0.6))
    for axes, name in ((crop, "crop that the model saw"), (heat, "patches that the caption looks at")):
        axes.imshow(sample.levels, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    height, width = sample.levels.shape[:2]
    heat_map = heat_of(sample.maps.image_map, height, width).numpy()
    drawn = heat.imshow(heat_map, cmap=HEAT, vmin=0.0, vmax=1.0, alpha=HEAT_SHARE)
    figure.colorbar(drawn, cax=figure.add_axes((0.925, 0.31, 0.018, 0.6))).ax.tick_params(labelsize=7)
    said = f"tokens that the picture looks at ({100 * sample.maps.share_on_words:.1f} % of the weight on words)"
    figure.text(0.02, 0.25, said, fontsize=9)
    _draw_words(figure, sample.words, colormaps[WORDS])
    with writing(path), whole_file(path) as part:
        figure.savefig(part, format=form.removeprefix("."))


def _draw_words(figure: "Figure", words: Sequence[WordWeight], colours: "Colormap") -> None:
    """Draw the tokens below the pictures, each on the colour of its value, in as many lines as there is room for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    width, height = canvas.get_width_height()
    left, bottom, line, gap = 0.02 * width, 0.18 * height, 22.0, 7.0
    x, y = left, bottom
    for word in words:
        boxes = []
        for token, value in zip(word.tokens, word.values, strict=True):
            red, green, blue, _ = colours(0.9 * value)
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            box = {"facecolor": (red, green, blue), "edgecolor": "none", "boxstyle": "square,pad=0.25"}
            shown, colour = figure_text(token), "white" if dark else "black"
            text = figure.text(0.0, 0.0, shown, fontsize=10, color=colour, bbox=box)
            boxes.append((text, text.get_window_extent(renderer).width + 5.0))
        whole = sum(extent for _, extent in boxes)
        if x > left and x + whole > 0.98 * width:
            x, y = left, y - line
        for text, extent in boxes:
            if y < 0:
                text.remove()  # a long caption stands whole on the page
            text.set_position((x / width, y / height))
            x += extent
        x += gap


def write_page(samples: Sequence[SampleMaps], path: Path, title: str, subtitle: str) -> None:
    """Write a page of all samples, with its pictures inside; raises UserError where it cannot be written."""
    from matplotlib import colormaps

    cards = "".join(_card(sample, colormaps[HEAT], colormaps[WORDS]) for sample in samples)
    page = _PAGE.substitute(title=html.escape(title), subtitle=html.escape(subtitle), cards=cards, heat=HEAT_SHARE)
    replace_file(path, page.encode(errors="backslashreplace"))  # of a name that is no UTF-8


def _card(sample: SampleMaps, heat_colours: "Colormap", word_colours: "Colormap") -> str:
    height, width = sample.levels.shape[:2]
    times = max(1, -(-SMALLEST // min(height, width)))
    heat = heat_of(sample.maps.image_map, times * height, times * width).numpy()
    crop = Image.fromarray(sample.levels).resize((times * width, times * height), Image.Resampling.NEAREST)
    coloured = Image.fromarray((heat_colours(heat)[:, :, :3] * 255).round().astype(np.uint8))
    words = " ".join(f'<span class="word">{_tokens(word, word_colours)}</span>' for word in sample.words)
    return _CARD.substitute(
        title=html.escape(sample.title),
        caption=html.escape(sample.caption, quote=True),
        crop=_data_uri(crop),
        heat=_data_uri(coloured),
        words=words,
        share=f"{100 * sample.maps.share_on_words:.1f}",
    )


def _tokens(word: WordWeight, colours: "Colormap") -> str:
    found = []
    for token, weight, value in zip(word.tokens, word.weights, word.values, strict=True):
        red, green, blue, _ = colours(0.9 * value)
        ink = "#fff" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "#111"
        colour = "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
        said = f"{100 * weight:.2f} % of the weight"
        found.append(f'<span title="{said}" style="background:#{colour};color:{ink}">{html.escape(token)}</span>')
    return "".join(found)


def _data_uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


_CARD = Template("""\
<article>
<h2>$title</h2>
<div class="pictures">
<figure><img src="$crop" alt="crop of $title"><figcaption>crop that the model saw</figcaption></figure>
<figure><div class="stack"><img src="$crop" alt="">
<img class="heat" src="$heat" alt="weights over the crop: $caption"></div>
<figcaption>patches that the caption looks at</figcaption></figure>
</div>
<p class="words">$words</p>
<p class="share">$share % of the picture's weight lies on words</p>
</article>
""")

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --heat: $heat; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 16px; font: 16px/1.5 system-ui, sans-serif; }
body { color: #1c1c22; background: #fff; }
h1 { font-size: 22px; margin: 0; } header p { margin: 4px 0 12px; color: #55555f; overflow-wrap: anywhere; }
label { display: inline-flex; gap: 8px; align-items: center; }
main { display: grid; gap: 16px; margin-top: 16px; }
main { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
article { border: 1px solid #d9d9de; border-radius: 8px; padding: 12px; min-width: 0; }
h2 { font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
figure { margin: 0; } img { display: block; width: 100%; border-radius: 4px; }
.stack { position: relative; } .heat { position: absolute; inset: 0; opacity: var(--heat); }
figcaption, .share { font-size: 13px; color: #55555f; margin: 4px 0 0; }
.words { margin: 10px 0 0; line-height: 2; overflow-wrap: anywhere; }
.word { display: inline-block; max-width: 100%; } .word span { padding: 2px 4px; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$subtitle</p>
<label>heat <input type="range" min="0" max="1" step="0.05" value="$heat"
 oninput="document.documentElement.style.setProperty('--heat', this.value)"></label>
</header>
<main>
$cards</main>
</body>
</html>
""")
