"""The training program, which also writes down which samples each step is made of: for tests of their order."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale import train
from cosmos_scale.batch import Batch
from cosmos_scale.cli import main as cli
from cosmos_scale.step import StepOutput, train_step

RECORDS = "RECORDED_SAMPLES"  # environment variable: folder of the records


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale train`; every rank appends the sample ids of each of its steps to a file of its own."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    file = Path(os.environ[RECORDS]) / f"{world_size}-{rank}.jsonl"

    def recorded_step(student: Any, teacher: Any, loss: Any, batch: Batch, **options: float) -> StepOutput:
        with file.open("a") as lines:
            lines.write(json.dumps(batch.sample_ids.tolist()) + "\n")
        return train_step(student, teacher, loss, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", recorded_step)
        return cli.main(argv)


def recorded_samples(folder: Path, world_size: int) -> list[list[int]]:
    """The global batches of one launch: the ranks' samples, one after the other."""
    ranks = [
        [json.loads(line) for line in (folder / f"{world_size}-{rank}.jsonl").read_text().splitlines()]
        for rank in range(world_size)
    ]
    return [[sample for share in shares for sample in share] for shares in zip(*ranks, strict=True)]
