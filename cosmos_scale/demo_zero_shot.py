"""The demo's last part: what its models do without training for it, on the held-out scenes in layouts of users' data.

Each number is printed beside that of an answer that knows nothing: chance, or the background everywhere.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from cosmos_scale.config import ClassificationConfig, EvaluatorConfig, SegmentationConfig
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.data.scenes.layouts import LabelledScene, SceneLayouts, read_scenes
from cosmos_scale.evaluation.attention_maps import attention_maps, encode_pairs, levels_of, peak_of, word_weights
from cosmos_scale.evaluation.attention_pictures import SampleMaps, write_page, write_picture
from cosmos_scale.evaluation.bar import WorkBar
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Numbers, measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.files import make_folder
from cosmos_scale.words import counted

SCENES, SCENES_QUICK = 256, 32
"""Scenes that are segmented and asked about: more take longer, and change the numbers little."""

PAGE = "attention.html"
_CONFUSIONS, _DRAWN = 5, 6
_TITLES = {
    "classification": "Which colour and shape is the largest object?",
    "segmentation": "Which of 8 colours, or background, is each pixel?",
}


class ZeroShot(NamedTuple):
    """What was measured. numbers: of each kind, by model. pictures: files and folders to look at, by what they show."""

    numbers: Mapping[str, Mapping[str, Numbers]]
    pictures: Mapping[str, Path]


def show_zero_shot(
    checkpoint: Path,
    models: Sequence[Literal["student", "teacher"]],
    gallery: Path,
    layouts: SceneLayouts,
    out: Path,
    scenes: int,
    console: Console,
) -> ZeroShot:
    """Classify, segment and ask attention for objects with some models of a checkpoint, and print a table of each.

    gallery: shards of the scenes that the layouts have. scenes: how many are segmented and asked about. Leaves pictures
    of what the first model finds.
    """
    sections: list[EvaluatorConfig] = [
        ClassificationConfig(kind="classification", data=str(layouts.by_class), confusions=_CONFUSIONS),
        SegmentationConfig(
            kind="segmentation",
            images=str(layouts.segmentation / "JPEGImages"),
            masks=str(layouts.segmentation / "SegmentationClass"),
            classes=str(layouts.segmentation / "classes.txt"),
            background=True,
            csa=True,
            max_samples=scenes,
            overlays=_DRAWN,
        ),
    ]
    numbers: dict[str, dict[str, Numbers]] = {}
    for section in sections:
        evaluator, numbers[section.kind] = _measured(section, checkpoint, models, out)
        console.print()
        console.print(evaluator.table(numbers[section.kind], _TITLES[section.kind]))
    samples = list(islice(read_scenes(gallery), scenes))
    numbers["attention"] = {
        which: _attention(load_encoder(checkpoint, which), samples, out / "attention" if which == models[0] else None)
        for which in models
    }
    console.print()
    console.print(_attention_table(numbers["attention"]))
    pictures = {"confusions": out / "classification" / "confusions.png"}
    return ZeroShot(numbers, {**pictures, "segmentation": out / "segmentation", "attention": out / "attention" / PAGE})


def _measured(
    section: EvaluatorConfig, checkpoint: Path, models: Sequence[Literal["student", "teacher"]], out: Path
) -> tuple[Evaluator, dict[str, Numbers]]:
    """Measure some models; the first of them draws into a folder of the kind's name."""
    results: dict[str, Numbers] = {}
    evaluator: Evaluator | None = None
    with WorkBar(show=True) as bar:
        for which in models:
            encoder = load_encoder(checkpoint, which)
            folder = out / section.kind if evaluator is None else None
            evaluator = evaluator or make_evaluator(section, replace(encoder.setting, report=bar.report))
            results[which] = measure(evaluator, encoder, folder=folder)
    assert evaluator is not None, "there are models"
    return evaluator, results


def _attention(encoder: Encoder, scenes: Sequence[LabelledScene], folder: Path | None) -> Numbers:
    """Ask for "a COLOUR SHAPE", the largest object of each scene: does the strongest patch lie on it?

    Returns shares of 1: `peak` of the scenes whose strongest patch has its middle on the object, `chance_peak` of all
    patches' middles that lie on objects, `weight` of the attention that lies on these patches, `peak_other_name` as
    `peak`, but asked for the object of the next scene: more than chance where attention finds objects of any name.
    """
    names = [f"a {scene.attributes['class']}" for scene in scenes]
    other = _asked(encoder, scenes, [*names[1:], names[0]])
    drawn: list[SampleMaps] = []
    totals = np.zeros(4)
    for sample, asked_otherwise, scene in zip(_asked(encoder, scenes, names), other, scenes, strict=True):
        on_object_RC = _at_patch_middles(scene.masks[0], *sample.maps.image_map.shape)
        peak, peak_other = (_peak_on(one, on_object_RC) for one in (sample, asked_otherwise))
        weight = float(sample.maps.image_weights.mean(0)[torch.from_numpy(on_object_RC)].sum())
        totals += (peak, on_object_RC.mean(), weight, peak_other)
        if len(drawn) < _DRAWN:
            drawn.append(sample)
    if folder is not None:
        make_folder(folder)
        for sample in drawn:
            write_picture(sample, folder / f"{sample.title}.png")
        write_page(drawn, folder / PAGE, "Attention maps", "held-out scenes of the demo")
    peak, chance, weight, other_name = (totals / len(scenes)).tolist()
    return {"scenes": len(scenes), "peak": peak, "chance_peak": chance, "weight": weight, "peak_other_name": other_name}


def _peak_on(sample: SampleMaps, on_object_RC: npt.NDArray[np.bool_]) -> bool:
    """Return whether the middle of the strongest patch lies on an object."""
    top, left = peak_of(sample.maps.image_map)
    rows, columns = on_object_RC.shape
    return bool(on_object_RC[int(top * rows), int(left * columns)])


def _asked(encoder: Encoder, scenes: Sequence[LabelledScene], captions: Sequence[str]) -> Iterator[SampleMaps]:
    setting, model = encoder.setting, encoder.model
    for scene, caption in zip(scenes, captions, strict=True):
        image = evaluation_crop(decode_rgbx(scene.jpeg, setting.max_pixels, setting.background), setting.image_size)
        ids = setting.tokenizer([caption]).to(setting.device)
        (pair,) = encode_pairs(model, image[None].to(setting.device), ids)
        maps = attention_maps(model, pair, image.shape[1] // model.visual.conv1.patch_size)
        yield SampleMaps(
            scene.key, caption, levels_of(image).numpy(), maps, word_weights(caption, maps, setting.tokenizer)
        )


def _at_patch_middles(mask: bytes, rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Return whether a mask, a PNG file, is set at the middle of each patch: [rows, columns]."""
    marked_HW = np.asarray(Image.open(io.BytesIO(mask)))
    height, width = marked_HW.shape
    middles = [
        ((np.arange(count) + 0.5) * side / count).astype(int) for count, side in ((rows, height), (columns, width))
    ]
    return np.ascontiguousarray(marked_HW[np.ix_(*middles)])


def _attention_table(results: Mapping[str, Numbers]) -> Table:
    first = next(iter(results.values()))
    caption = f"{counted(int(first['scenes']), 'scene')}; chance: {100 * first['chance_peak']:.1f} % of all"
    title = "Asked for the largest object by name: does attention find it?"
    columns = {
        "strongest patch on it": "peak",
        "asked for another scene's": "peak_other_name",
        "weight on it": "weight",
    }
    table = Table("", *columns, title=title, caption=caption)
    for model, numbers in results.items():
        table.add_row(model, *(f"{100 * numbers[name]:.1f} %" for name in columns.values()))
    return table
