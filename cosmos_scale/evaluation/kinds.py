"""Every kind of evaluator: the section that holds its keys, and the class that measures."""

from collections.abc import Callable, Mapping
from typing import Any

from cosmos_scale.config import ClassificationConfig, EvaluatorConfig, RetrievalConfig, SegmentationConfig
from cosmos_scale.evaluation.classification import Classification
from cosmos_scale.evaluation.evaluator import Evaluator, Setting
from cosmos_scale.evaluation.retrieval import Retrieval
from cosmos_scale.evaluation.segmentation.evaluator import Segmentation

KINDS: Mapping[type[EvaluatorConfig], Callable[[Any, Setting], Evaluator]] = {
    RetrievalConfig: Retrieval,
    ClassificationConfig: Classification,
    SegmentationConfig: Segmentation,
}


def make_evaluator(config: EvaluatorConfig, setting: Setting) -> Evaluator:
    """Make the evaluator that a section of the config asks for; raises UserError where its data is missing or wrong."""
    return KINDS[type(config)](config, setting)
