"""The training program, whose last rank fails to evaluate: at step 4 a shard is away, at step 8 a text breaks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cosmos_scale.cli import main as program
from cosmos_scale.evaluation.evaluator import Encoder
from cosmos_scale.run.evaluations import Evaluations

SHARD = "SHARD_TO_LOSE"  # environment variable: a shard's path


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`; the shard is back at step 5."""
    last_rank = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    shard = Path(os.environ[SHARD])
    step_now = 0

    def run_due(self: Evaluations, step: int, *others: Any, **options: Any) -> None:
        nonlocal step_now
        step_now = step
        away = shard.with_suffix(".away")
        if last_rank and step == 4:
            shard.rename(away)
        elif last_rank and away.exists():
            away.rename(shard)
        original(self, step, *others, **options)

    def texts(self: Encoder, texts: Sequence[str]) -> Tensor:
        if last_rank and step_now == 8:
            raise ZeroDivisionError("a text broke")
        return encode(self, texts)

    original, encode = Evaluations.run_due, Encoder.texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluations, "run_due", run_due)
        patch.setattr(Encoder, "texts", texts)
        return program.main(argv)
