"""The checkpoints of the published COSMOS code: a dict with `student` and `teacher`, and the optimizer beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import Shape
from cosmos_scale.checkpoint.interchange.openclip import named, stored_model
from cosmos_scale.checkpoint.interchange.sizes import Known
from cosmos_scale.checkpoint.interchange.weights import StoredWeights, Which, refusal
from cosmos_scale.checkpoint.interchange.wrapped import prefix_of, said

MODELS: tuple[Which, ...] = ("student", "teacher")


def cosmos_model(path: Path, content: Mapping[Any, Any], which: Which, known: Known) -> StoredWeights:
    """Return one model of a COSMOS checkpoint; raises UserError where it is not there, or not of a COSMOS model.

    Of a file with student and teacher both must have the same tensors in the same shapes.
    """
    models = models_held(content)
    if which not in models:
        raise refusal(path, f"found a COSMOS checkpoint without a {which}, with a {models[0]}")
    epoch = content.get("epoch")
    kind = f"COSMOS checkpoint of epoch {epoch}" if isinstance(epoch, int) else "COSMOS checkpoint"
    kind += said(prefix_of(path, content[which]))
    tensors = named(path, content[which])
    stored = stored_model(path, tensors, kind, known)._replace(form="cosmos", models=models)
    for other in models:
        if differing := _shapes(tensors) ^ _shapes(named(path, content[other])):
            raise refusal(
                path, f"found a student and a teacher of different models: they differ in {min(differing)[0]}"
            )
    return stored


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, Shape]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def models_held(content: Mapping[Any, Any]) -> tuple[Which, ...]:
    """Return which models a file's content holds as a COSMOS checkpoint; none where it is no such checkpoint."""
    return tuple(model for model in MODELS if isinstance(content.get(model), Mapping) and content[model])
