"""The evaluation's part of the report: numbers beside published ones, what models find, look at and label."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from cosmos_scale.config import EvaluatorConfig, RetrievalConfig
from cosmos_scale.evaluation.attention_maps import (
    attention_maps,
    encode_pairs,
    heat_of,
    levels_of,
    require_heads,
    word_weights,
)
from cosmos_scale.evaluation.attention_pictures import HEAT, HEAT_SHARE
from cosmos_scale.evaluation.comparison import JSON_FILE
from cosmos_scale.evaluation.datasets.captioned_sets import open_captioned
from cosmos_scale.evaluation.evaluator import Encoder, Report
from cosmos_scale.evaluation.published import PUBLISHED_ROWS
from cosmos_scale.files import load_json, read_regular, reason_of
from cosmos_scale.report.final_numbers import TextTable
from cosmos_scale.report.pictures import PagePicture, picture_of
from cosmos_scale.report.plots import MODELS, numbers_of_models
from cosmos_scale.report.records import RunRecords
from cosmos_scale.run.folder import EVALUATION
from cosmos_scale.run.logged import evaluator_of

MAPS = 4
MAP_SIDE, LEFT_SIDE = 224, 480  # pixels of pictures on the page
MOST_LEFT = 6  # pictures that an evaluator has left
SHARES = ("R@1", "R@5", "R@10", "top1", "top5", "mean_per_class", "mIoU", "aAcc", "mAcc")


class NumberRow(NamedTuple):
    """A number by model, as text; published: that of the same model as published, "" where there is none."""

    name: str
    values: list[str]
    published: str


class EvaluatorTable(NamedTuple):
    """The newest numbers of an evaluator. caveats: what must be known of the published ones."""

    name: str
    step: int
    models: list[str]
    rows: list[NumberRow]
    caveats: Sequence[str]

    @property
    def compared(self) -> bool:
        """Whether a number was published."""
        return any(row.published for row in self.rows)


class AttentionMap(NamedTuple):
    """A pair with its maps. words: tokens of the caption, each with its weight's place in 0..1."""

    caption: str
    crop: PagePicture
    heat: PagePicture
    words: list[tuple[str, float]]
    share_on_words: float


class LeftPictures(NamedTuple):
    """Pictures that an evaluator left in the run's folder at its newest step."""

    evaluator: str
    step: str
    pictures: list[PagePicture]


def evaluator_tables(run: RunRecords) -> list[EvaluatorTable]:
    """Return the newest numbers of each evaluator, beside published ones where they were measured on the same set."""
    newest = {evaluator_of(record): record for record in run.evaluations}
    sections = {section.name: section for section in (run.config.eval if run.config else ())}
    tables = []
    for name, record in newest.items():
        by_model = numbers_of_models(record)
        models = [model for model in MODELS if model in by_model]
        if not models:
            continue
        names = list(dict.fromkeys(number for numbers in by_model.values() for number in numbers))
        rows = [
            NumberRow(
                number,
                [_shown(number, by_model[model].get(number)) for model in models],
                _published(run, sections.get(name), number),
            )
            for number in names
        ]
        row = PUBLISHED_ROWS.get(run.label)
        tables.append(EvaluatorTable(name, int(record["step"]), models, rows, row.caveats if row else ()))
    return tables


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if any(name.endswith(share) for share in SHARES):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def _published(run: RunRecords, section: EvaluatorConfig | None, number: str) -> str:
    row = PUBLISHED_ROWS.get(run.label)
    dataset = getattr(section, "dataset", None)
    if row is None or dataset is None:
        return ""
    share = row.share(dataset, number, MODELS[1], getattr(section, "csa", None))
    return "" if share is None else f"{share:.1f} %"


@torch.no_grad()
def attention_of(section: RetrievalConfig, encoder: Encoder, report: Report) -> list[AttentionMap]:
    """Return the maps of the first pairs of a section's gallery.

    Raises UserError where the gallery is not there, or the model has no cross-modality heads.
    """
    from matplotlib import colormaps  # here: it takes half a second

    require_heads(encoder.model, "the checkpoint")
    setting = encoder.setting
    gallery = open_captioned(section.model_copy(update={"max_samples": MAPS}), setting)
    found = []
    for batch in islice(gallery.batches(0, 1, 1), MAPS):
        caption, image = batch.texts[0][0], batch.images[0]
        ids = setting.tokenizer([caption]).to(setting.device)
        (pair,) = encode_pairs(encoder.model, image[None].to(setting.device), ids)
        maps = attention_maps(encoder.model, pair, image.shape[1] // encoder.model.visual.conv1.patch_size)
        crop = Image.fromarray(levels_of(image).numpy()).resize((MAP_SIDE, MAP_SIDE), Image.Resampling.NEAREST)
        weights = colormaps[HEAT](heat_of(maps.image_map, MAP_SIDE, MAP_SIDE).numpy())[:, :, :3]
        heat = Image.blend(crop, Image.fromarray((255 * weights).round().astype("uint8")), HEAT_SHARE)
        words = [
            (token, value)
            for word in word_weights(caption, maps, setting.tokenizer)
            for token, value in zip(word.tokens, word.values, strict=True)
        ]
        found.append(
            AttentionMap(
                caption,
                picture_of(crop, f"crop that the model saw: {caption}", width=MAP_SIDE),
                picture_of(heat, f"patches that the caption looks at: {caption}", width=MAP_SIDE),
                words,
                100 * maps.share_on_words,
            )
        )
        report("attention maps", len(found), MAPS)
    return found


def of_all_sets(run: RunRecords, notes: list[str]) -> list[TextTable]:
    """Return what `cosmos-scale eval all` has left in the run's folder; notes say why it cannot be used."""
    path = run.folder / EVALUATION / JSON_FILE
    try:
        found = load_json(read_regular(path))
        published = {(row["title"], row["number"], row["weights"]): row for row in found["comparison"]}
        rows = []
        for one in found["results"]:
            for number in (name for name in one if any(name.endswith(share) for share in SHARES)):
                row = published.get((one["set"], number, one["weights"]))
                beside = ["", ""] if row is None else [f"{row['published']:.1f} %", f"{row['difference']:+.1f}"]
                shown = _shown(number, float(one[number]))
                rows.append([f"{one['set']}: {number.replace('_', ' ')}", str(one["weights"]), shown, *beside])
        columns = ["set and number", "model", "measured", "published", "points"]
        return [TextTable("All public sets", columns, rows, " ".join(found["notes"]))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = reason_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        notes.append(f"{run.label}: {EVALUATION}/{JSON_FILE} cannot be used: {said}.")
        return []


def pictures_left(run: RunRecords) -> list[LeftPictures]:
    """Return some pictures of each evaluator's newest step, such as segmentation overlays."""
    found = []
    for folder in sorted((run.folder / EVALUATION).glob("*")):
        steps = sorted(folder.glob("step-*"))
        files = sorted(steps[-1].glob("**/*.png")) if steps else []
        if pictures := list(islice(_readable(files, folder), MOST_LEFT)):
            found.append(LeftPictures(folder.name, steps[-1].name, pictures))
    return found


def _readable(files: Sequence[Path], folder: Path) -> Iterator[PagePicture]:
    for file in files:
        try:
            with Image.open(file) as image:
                yield picture_of(image.convert("RGB"), str(file.relative_to(folder)), width=LEFT_SIDE, quality=78)
        except OSError:  # torn, or being written
            continue
