"""The checkpoints of the published COSMOS code: a dict with `student` and `teacher`, and the optimizer beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_scale.checkpoint.interchange.openclip import named, stored_model
from cosmos_scale.checkpoint.interchange.sizes import Known
from cosmos_scale.checkpoint.interchange.weights import StoredWeights, Which, refusal

MODELS: tuple[Which, ...] = ("student", "teacher")


def is_cosmos(content: Mapping[Any, Any]) -> bool:
    """Tell whether a file's content is a COSMOS checkpoint."""
    return any(isinstance(content.get(model), Mapping) for model in MODELS)


def cosmos_model(path: Path, content: Mapping[Any, Any], which: Which, known: Known) -> StoredWeights:
    """Return one model of a COSMOS checkpoint; raises UserError where it is not there, or not of a COSMOS model."""
    models = tuple(model for model in MODELS if isinstance(content.get(model), Mapping))
    if which not in models:
        raise refusal(path, f"found a COSMOS checkpoint without a {which}, with a {models[0]}")
    epoch = content.get("epoch")
    kind = f"COSMOS checkpoint of epoch {epoch}" if isinstance(epoch, int) else "COSMOS checkpoint"
    stored = stored_model(path, named(path, content[which]), kind, known)
    return stored._replace(form="cosmos", models=models)
