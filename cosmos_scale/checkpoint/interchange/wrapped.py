"""Prefixes that other tools put before each name of a model: torch.compile, DDP, a module that holds the model."""

from collections.abc import Iterable
from pathlib import Path

from cosmos_scale.checkpoint.interchange.weights import refusal
from cosmos_scale.words import counted

DISTRIBUTED = "module."  # of a model that was trained on several devices
# A tensor that each CLIP model has once, by OpenCLIP's name and by Hugging Face's: it tells where a model lies.
_ONCE = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")


def prefix_of(path: Path, names: Iterable[object]) -> str:
    """Return the prefix before each name of a state dict, empty where there is none.

    Such as `_orig_mod.` of torch.compile, `model.` or `student.` of a module that was saved with the model in it, or
    several of them in a row.
    Raises UserError where models, or a model and more, lie behind prefixes: nothing says what is meant.
    """
    known = [str(name) for name in names]
    ends = (name.removesuffix(once) for once in _ONCE for name in known if name.endswith(once))
    found = sorted({prefix for prefix in ends if prefix == "" or prefix.endswith(".")})
    if not found or "" in found:
        return DISTRIBUTED if known and known[0].startswith(DISTRIBUTED) else ""
    rule = "save the tensors of one model alone, without the prefix"
    if len(found) > 1:
        raise refusal(path, f"found {counted(len(found), 'model')}, behind {' and '.join(found)} before names: {rule}")
    (prefix,) = found
    if others := [name for name in known if not name.startswith(prefix)]:
        raise refusal(path, f"found a model behind {prefix} before its names, and {others[0]} without it: {rule}")
    return prefix


def said(prefix: str) -> str:
    """Return what the kind of a checkpoint says of a prefix; nothing of the one that training itself leaves."""
    return "" if prefix in ("", DISTRIBUTED) else f", with {prefix} before its names"
