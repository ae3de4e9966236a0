"""A tiny run: its config, its batches, and student and teacher built from a seed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.step import StepOutput, train_step
from cosmos_scale.testing.batches import random_batch

GLOBAL_BATCH = 8
TINY_LENGTHS = (4, 16)  # tokens of a caption, at least and at most


def tiny_config(**changes: Any) -> RunConfig:
    """Return a run of a model with 83 tensors; `changes` replace top-level sections."""
    sections: dict[str, Any] = {
        "precision": "fp32",
        "model": {
            "embed_dim": 32,
            "vision": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
            "text": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
        },
        "data": {"views": {"local_size": 16}},
        "train": {"global_batch": GLOBAL_BATCH, "schedule_steps": 100},
        "optimizer": {"warmup_steps": 10},
    }
    return RunConfig.model_validate(sections | changes)


def tiny_batch(step: int, size: int = GLOBAL_BATCH) -> Batch:
    """Return the global batch of a step: 2 + 6 crops, 8 captions of various lengths."""
    config = tiny_config()
    lengths = [TINY_LENGTHS] * config.data.captions.count
    return random_batch(config.model, config.data.views, size, lengths, seed=1000 + step)


class Tiny(NamedTuple):
    """What a step needs."""

    student: Student
    teacher: Teacher
    loss: CosmosLoss

    def step(self, step: int, *, lr: float = 1e-3, momentum: float = 0.9, batch: Batch | None = None) -> StepOutput:
        """Train on this rank's share of a step's batch."""
        ranks = self.student.ranks
        share = (tiny_batch(step) if batch is None else batch).split(ranks.world_size)[ranks.rank]
        return train_step(self.student, self.teacher, self.loss, share, lr=lr, momentum=momentum)

    def close(self) -> None:
        """Free the engine."""
        Pair(self.student, self.teacher).close()

    def fragments(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """Return copies of all that this rank holds, by parameter and first element."""
        return {
            (fragment.name, fragment.start): {kind: tensor.clone() for kind, tensor in fragment.tensors().items()}
            for fragment in self.student.fragments
        }


def build_tiny(config: RunConfig, ranks: Ranks, *, teacher_seed: int = 0) -> Tiny:
    """Draw the student from the config's seed, the teacher from its own; equal seeds give equal weights."""
    pair = drawn_pair(config, ranks, teacher_seed=teacher_seed)
    return Tiny(pair.student, pair.teacher, CosmosLoss(config.optimizer.gradient_scale))


def whole(parts: list[dict[tuple[str, int], dict[str, Tensor]]], kind: str) -> dict[str, Tensor]:
    """Put the ranks' fragments of one kind together into flat parameters by name."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for rank_parts in parts:
        for (name, start), tensors in rank_parts.items():
            pieces.setdefault(name, {})[start] = tensors[kind]
    return {name: torch.cat([by_start[start] for start in sorted(by_start)]) for name, by_start in pieces.items()}


def worst_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of a tensor, and its name: norm of the difference over that of `theirs`.

    The key third of attention biases is left out: its true gradient is zero, so Adam amplifies rounding there.
    """
    assert ours.keys() == theirs.keys()
    worst = (0.0, "")
    for name, tensor in ours.items():
        pair = [tensor.double(), theirs[name].double()]
        if name.endswith("in_proj_bias"):
            pair = [torch.cat([flat.chunk(3)[0], flat.chunk(3)[2]]) for flat in pair]
        norm = pair[1].norm().item()
        difference = (pair[0] - pair[1]).norm().item()
        worst = max(worst, (difference / norm if norm else difference, name))
    return worst
