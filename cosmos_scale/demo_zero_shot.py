"""The demo's last part: what its models do without training for it, on the held-out scenes in layouts of users' data.

Each number is printed beside that of an answer that knows nothing: chance, or the background everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console

from cosmos_scale.config import ClassificationConfig, EvaluatorConfig, SegmentationConfig
from cosmos_scale.data.scenes.layouts import SceneLayouts
from cosmos_scale.evaluation.bar import WorkBar
from cosmos_scale.evaluation.evaluator import Evaluator, Numbers, measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder

SEGMENTED, SEGMENTED_QUICK = 256, 32
"""Scenes that are segmented: more take longer, and change the numbers little."""

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
    layouts: SceneLayouts,
    out: Path,
    segmented: int,
    console: Console,
) -> ZeroShot:
    """Classify and segment with the models of a checkpoint, print a table of each, and draw what the first one finds.

    segmented: how many scenes are segmented.
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
            max_samples=segmented,
            overlays=_DRAWN,
        ),
    ]
    numbers: dict[str, dict[str, Numbers]] = {}
    for section in sections:
        evaluator, numbers[section.kind] = _measured(section, checkpoint, models, out)
        console.print()
        console.print(evaluator.table(numbers[section.kind], _TITLES[section.kind]))
    return ZeroShot(
        numbers,
        {"confusions": out / "classification" / "confusions.png", "segmentation": out / "segmentation"},
    )


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
