"""What is converted: models of a checkpoint, of this program or of another, and what is known of their training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cosmos_scale.checkpoint.interchange.reading import is_public, open_public
from cosmos_scale.checkpoint.interchange.weights import Activation, Which, read_stored
from cosmos_scale.checkpoint.state import Manifest, load_weights, read_manifest, read_run_config
from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.errors import UserError

Weights = dict[str, Tensor]
"""Float32 tensors on the CPU by state-dict name; log-scales are []."""


class Training(NamedTuple):
    """What a checkpoint of ours says of its run."""

    manifest: Manifest
    config: RunConfig


class Source(NamedTuple):
    """A checkpoint whose tensors are not read yet.

    path: the checkpoint's own folder or file. kind: what it is, for people. models: those it has; None where it has
    one, which is neither a student nor a teacher. training: None for another program's checkpoint. guessed: what its
    files do not say and was assumed, each on one line. read: reads the weights of one model; raises UserError.
    """

    path: Path
    kind: str
    model: ModelConfig
    has_heads: bool
    models: tuple[Which, ...] | None
    training: Training | None
    guessed: tuple[str, ...]
    read: Callable[[Which], Weights]

    @property
    def name(self) -> str:
        """The name of the run, or of another program's file or folder."""
        if self.training is not None:
            return self.training.config.name
        return self.path.absolute().name if self.path.is_dir() else self.path.stem


def open_source(path: Path, which: Sequence[Which], activation: Activation | None) -> Source:
    """Open a checkpoint of a run, or another program's checkpoint; nothing but names and shapes is read.

    path: as `find_model` returns it. which: the models that will be read. activation: of another program's checkpoint
    whose files do not say it. Raises UserError where there is no checkpoint, or a model is not in it.
    """
    if is_public(path):
        opened = {one: open_public(path, one, activation=activation) for one in which}
        first = opened[which[0]]
        return Source(
            path=path,
            kind=first.kind,
            model=first.model,
            has_heads=first.has_heads,
            models=first.models,
            training=None,
            guessed=first.guessed,
            read=lambda one: read_stored(opened[one], path).tensors,
        )
    training = Training(read_manifest(path), read_run_config(path))
    if activation is not None:
        raise UserError(f"--activation: {activation}; rule: is for files that do not say it; the run {path} does")
    return Source(
        path=path,
        kind=f"checkpoint of step {training.manifest.state.step:,} of the run {training.config.name}",
        model=training.config.model,
        has_heads=True,
        models=("student", "teacher"),
        training=training,
        guessed=(),
        read=lambda one: _finite(path, load_weights(path, one)),
    )


def _finite(folder: Path, weights: Weights) -> Weights:
    """Return weights; raises UserError where a number of them is not finite: no program could use them."""
    for name, tensor in weights.items():
        if wrong := tensor.numel() - int(tensor.isfinite().sum()):
            raise UserError(
                f"checkpoint {folder}: {wrong:,} of {tensor.numel():,} numbers of {name} are not finite; rule: convert "
                "an older checkpoint, from before the loss became NaN"
            )
    return weights
