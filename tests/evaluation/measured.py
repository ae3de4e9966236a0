"""Retrieval of a checkpoint's model, measured in this process."""

from pathlib import Path
from typing import Literal

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.evaluation.evaluator import Numbers, measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder


def retrieval_of(
    checkpoint: Path,
    shards: Path | str,
    which: Literal["student", "teacher"] = "student",
    *,
    captions: str = "raw_caption",
    batch: int = 64,
) -> Numbers:
    """The numbers of one model over indexed shards."""
    encoder = load_encoder(checkpoint, which, "cpu")
    section = RetrievalConfig(kind="retrieval", shards=str(shards), captions=captions, batch=batch)
    return measure(make_evaluator(section, encoder.setting), encoder)
