"""The model of a checkpoint, ours or a public one, ready to be evaluated."""

from pathlib import Path
from typing import Literal

import torch

from cosmos_scale.checkpoint import load_model, read_run_config
from cosmos_scale.checkpoint.interchange.reading import is_public, open_public, read_public
from cosmos_scale.checkpoint.interchange.weights import Activation, Which, refusal
from cosmos_scale.checkpoint.state import manifest_digest
from cosmos_scale.config import TOKENIZER_VOCABULARY, DataConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.model.cosmos import CosmosModel

ONE_MODEL = "model"  # what the one model of a public checkpoint is called beside student and teacher


def models_of(checkpoint: Path, asked: Literal["student", "teacher", "both"]) -> dict[str, Which]:
    """Return which models of a checkpoint to load, by the name to show; a public one may have one model alone.

    Raises UserError where a public checkpoint cannot be read, or lacks a model that was asked for.
    """
    names: tuple[Which, ...] = ("student", "teacher") if asked == "both" else (asked,)
    if is_public(checkpoint) and any(open_public(checkpoint, name).models is None for name in names):
        return {ONE_MODEL: "student"}
    return {name: name for name in names}


def load_encoder(
    checkpoint: Path,
    which: Which,
    device: Literal["auto", "cpu", "cuda"] | torch.device = "auto",
    activation: Activation | None = None,
) -> Encoder:
    """Load the float32 weights of one model of a checkpoint; the setting is that of its run, in one process.

    checkpoint: the folder itself, or a public checkpoint (`find_model` finds that of a path). device: auto is CUDA
    where there is a device. activation: of public weights that do not tell theirs.
    Raises UserError where there is no checkpoint, or not one of such a model, or no such device.
    """
    place = device if isinstance(device, torch.device) else _device(device)
    if is_public(checkpoint):
        return _public_encoder(checkpoint, which, place, activation)
    config = read_run_config(checkpoint)
    if activation not in (None, config.model.activation):
        raise UserError(f"activation: {activation}, but {checkpoint} is of a run with {config.model.activation}")
    # How the run computed is of no concern here: another machine may not be able to.
    model = CosmosModel(config.model.model_copy(update={"attention": "auto", "compile": False}))
    load_model(model, checkpoint, which)
    weights = f"{which} of {manifest_digest(checkpoint)}"
    return Encoder(model.to(place).eval(), Setting.of_run(config, 0, 1, place), weights)


def _public_encoder(checkpoint: Path, which: Which, device: torch.device, activation: Activation | None) -> Encoder:
    weights = read_public(checkpoint, which, activation=activation)
    vocabulary = weights.model.text.vocab_size
    if vocabulary != TOKENIZER_VOCABULARY:
        raise refusal(checkpoint, f"found {vocabulary:,} tokens, not the {TOKENIZER_VOCABULARY:,} of CLIP's tokenizer")
    model = CosmosModel(weights.model)
    model.load_state_dict(weights.tensors, strict=weights.has_heads)
    heads = "" if weights.has_heads else ", without cross-modality heads"
    return Encoder(
        model.to(device).eval(),
        Setting.of_model(weights.model, DataConfig(), device),
        # The same tensors compute other features with another activation or number of heads.
        f"{weights.digest} as {weights.model.model_dump_json()}",
        weights.has_heads,
        (f"{weights.kind}{heads}", *(f"assumed {guess}" for guess in weights.guessed)),
    )


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
