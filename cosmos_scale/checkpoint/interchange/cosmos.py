"""The checkpoints of the published COSMOS code: a dict with `student` and `teacher`, and the optimizer beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import Shape, is_of_heads
from cosmos_scale.checkpoint.interchange.openclip import named, stored_model
from cosmos_scale.checkpoint.interchange.settings import one_activation
from cosmos_scale.checkpoint.interchange.sizes import UNTOLD, Known, check_shapes
from cosmos_scale.checkpoint.interchange.weights import StoredWeights, Which, refusal, shape_of
from cosmos_scale.config import ModelConfig

MODELS: tuple[Which, ...] = ("student", "teacher")
# A key that the published code does not have: our section `model`, for what tensors do not tell.
CONFIG_KEY = "model_config"


def is_cosmos(content: Mapping[Any, Any]) -> bool:
    """Tell whether a file's content is a COSMOS checkpoint."""
    return bool(_models(content))


def cosmos_model(path: Path, content: Mapping[Any, Any], which: Which, known: Known) -> StoredWeights:
    """Return one model of a COSMOS checkpoint; raises UserError where it is not there, or not of a COSMOS model.

    Of a file with student and teacher both must have the same tensors in the same shapes.
    """
    models = _models(content)
    if which not in models:
        raise refusal(path, f"found a COSMOS checkpoint without a {which}, with a {models[0]}")
    epoch = content.get("epoch")
    kind = f"COSMOS checkpoint of epoch {epoch}" if isinstance(epoch, int) else "COSMOS checkpoint"
    tensors = named(path, content[which])
    stored = _stored(path, content, tensors, kind, known)._replace(form="cosmos", models=models)
    for other in models:
        if differing := _shapes(tensors) ^ _shapes(named(path, content[other])):
            raise refusal(
                path, f"found a student and a teacher of different models: they differ in {min(differing)[0]}"
            )
    return stored


def _stored(
    path: Path, content: Mapping[Any, Any], tensors: Mapping[str, Tensor], kind: str, known: Known
) -> StoredWeights:
    if CONFIG_KEY not in content:
        return stored_model(path, tensors, kind, known)
    try:
        model = ModelConfig.model_validate(content[CONFIG_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise refusal(path, f"found a {CONFIG_KEY} that is none ({said})") from None
    rows: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in tensors.items()}
    check_shapes(path, {name: shape_of(tensor) for name, tensor in rows.items()}, model)
    one_activation(path, model.activation, known.activation)
    return StoredWeights("cosmos", kind, model, rows, any(map(is_of_heads, rows)), (), None, frozenset(UNTOLD))


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, Shape]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _models(content: Mapping[Any, Any]) -> tuple[Which, ...]:
    return tuple(model for model in MODELS if isinstance(content.get(model), Mapping) and content[model])
