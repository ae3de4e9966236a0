"""The model of a checkpoint, ready to be evaluated."""

from pathlib import Path
from typing import Literal

import torch

from cosmos_scale.checkpoint import load_model, read_run_config
from cosmos_scale.checkpoint.state import manifest_digest
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.model.cosmos import CosmosModel


def load_encoder(
    folder: Path,
    which: Literal["student", "teacher"],
    device: Literal["auto", "cpu", "cuda"] | torch.device = "auto",
) -> Encoder:
    """Load the float32 weights of one model of a checkpoint; the setting is that of its run, in one process.

    folder: the checkpoint's own (`find_checkpoint` finds that of a run). device: auto is CUDA where there is a device.
    Raises UserError where the folder is no checkpoint, or not one of such a model, or there is no such device.
    """
    config = read_run_config(folder)
    # How the run computed is of no concern here: another machine may not be able to.
    model = CosmosModel(config.model.model_copy(update={"attention": "auto", "compile": False}))
    load_model(model, folder, which)
    place = device if isinstance(device, torch.device) else _device(device)
    weights = f"{which} of {manifest_digest(folder)}"
    return Encoder(model.to(place).eval(), Setting.of_run(config, 0, 1, place), weights)


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
