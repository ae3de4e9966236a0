"""State dicts under OpenCLIP's names, alone, in its training checkpoints, or in a folder with open_clip_config.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import is_of_heads
from cosmos_scale.checkpoint.interchange.sizes import Known, infer_model
from cosmos_scale.checkpoint.interchange.weights import Activation, PublicForm, StoredWeights, refusal, shape_of
from cosmos_scale.checkpoint.interchange.wrapped import prefix_of, said

TEXT = "text."  # before the text tower's names, where OpenCLIP built the tower as a module of its own
# What OpenAI's state dicts hold beside the weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
MASKS = ("attn_mask", "text.attn_mask")
QUICK_GELU_NAMES = re.compile(r"quick_?gelu|(?<![a-z])(openai|metaclip|dfn)", re.IGNORECASE)


def named(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict under our names; buffers and sizes that are no weights stay away.

    Raises UserError where it holds anything but floating-point tensors, or two under one name; and as `prefix_of`.
    """
    prefix = prefix_of(path, state)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix(prefix)
        if name in OPENAI_SIZES or name in MASKS:
            continue
        if not isinstance(value, Tensor):
            raise refusal(path, f"found a dict with {key!r}, which is no tensor, among its tensors")
        plain = value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
        if not value.is_floating_point() or not plain:
            dtype = str(value.dtype).removeprefix("torch.")
            layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            form = dtype if layout == "strided" else f"{dtype}, {layout}"
            raise refusal(path, f"found {name} in {form}, not in plain floating-point numbers")
        if name == "logit_scale" and value.numel() == 1:
            value = value.reshape(())
        name = name.removeprefix(TEXT)
        if name in tensors:
            raise refusal(path, f"found two tensors for {name}, with a prefix and without")
        tensors[name] = value.detach()
    return tensors


def assumed_activation(path: Path, names: Mapping[Any, Any]) -> Activation:
    """Return the activation that a state dict most likely needs: that of the programs whose marks it bears.

    OpenAI's own state dicts hold sizes beside the weights. Others have OpenCLIP's tag in the name of file or folder.
    """
    tagged = QUICK_GELU_NAMES.search(path.name) or QUICK_GELU_NAMES.search(path.absolute().parent.name)
    marked = any(str(name).rpartition(".")[2] in OPENAI_SIZES for name in names)
    return "quick_gelu" if tagged or marked else "gelu"


def stored_model(
    path: Path, tensors: Mapping[str, Tensor], kind: str, known: Known, assumed: Activation = "gelu"
) -> StoredWeights:
    """Return the model whose tensors these are, by our names; raises UserError where they are those of another model.

    assumed: the activation where neither `known` nor the heads of COSMOS say it.
    """
    rows: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in tensors.items()}
    inferred = infer_model(path, {name: shape_of(tensor) for name, tensor in rows.items()}, known, assumed)
    has_heads = any(map(is_of_heads, rows))
    form: PublicForm = "cosmos" if has_heads else "openclip"
    return StoredWeights(form, kind, inferred.model, rows, has_heads, inferred.guessed, None, inferred.told)


def openclip_model(path: Path, content: Mapping[Any, Any], known: Known) -> StoredWeights:
    """Return the model of a state dict, alone or in a training checkpoint; raises UserError where it is none."""
    state = content.get("state_dict")
    kind = "state dict"
    if isinstance(state, Mapping):
        epoch = content.get("epoch")
        kind = "training checkpoint" + (f" of epoch {epoch}" if isinstance(epoch, int) else "")
    else:
        state = content
    if not any(isinstance(value, Tensor) for value in state.values()):
        shown = ", ".join(sorted(map(str, content))[:6])
        raise refusal(path, f"found {f'a dict of {shown}' if content else 'an empty dict'}, without tensors")
    tensors = named(path, state)
    program = "COSMOS" if any(map(is_of_heads, tensors)) else "OpenCLIP"
    kind = f"{program} {kind}{said(prefix_of(path, state))}"
    return stored_model(path, tensors, kind, known, assumed_activation(path, state))
