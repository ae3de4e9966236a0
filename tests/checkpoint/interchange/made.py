"""Tiny public checkpoints for tests: a COSMOS model drawn from a seed, and OpenCLIP's own model of the same sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import is_of_heads
from cosmos_scale.checkpoint.interchange.weights import PublicWeights
from cosmos_scale.config import ModelConfig
from cosmos_scale.model.cosmos import CosmosModel

# Heads of 64 numbers, as what reads bare tensors assumes: 2 in the image tower, 1 in the text tower.
SIZES = ModelConfig.model_validate(
    {
        "embed_dim": 64,
        "vision": {"image_size": 32, "patch_size": 16, "width": 128, "layers": 2},
        "text": {"context_length": 16, "width": 64, "heads": 1, "layers": 2},
    }
)
OPENCLIP_SIZES: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 128, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": SIZES.text.vocab_size, "width": 64, "heads": 1, "layers": 2},
}


def state_of(seed: int, model: ModelConfig = SIZES) -> dict[str, Tensor]:
    """The state dict of a model drawn from a seed, in the order of its parameters."""
    drawn = CosmosModel(model)
    drawn.init_weights(torch.Generator().manual_seed(seed))
    return dict(drawn.state_dict())


def towers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the heads, as OpenCLIP has it."""
    return {name: tensor for name, tensor in state.items() if not is_of_heads(name)}


def save_cosmos(path: Path, epoch: int = 32) -> Path:
    """Write a file as the published code leaves it after a distributed run; student of seed 1, teacher of seed 2."""
    student = {f"module.{name}": tensor for name, tensor in state_of(1).items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": np.float64(5e-4), "params": [0]}]}
    content = {"epoch": epoch, "name": "tiny", "student": student, "teacher": state_of(2), "optimizer": optimizer}
    torch.save(content | {"scaler": {"scale": 65536.0, "growth_factor": 2.0}}, path)
    return path


def openclip_model(seed: int = 3, **changes: Any) -> open_clip.CLIP:
    """OpenCLIP's model of these sizes, drawn from a seed, in evaluation mode."""
    torch.manual_seed(seed)
    return open_clip.CLIP(**(OPENCLIP_SIZES | changes)).eval()


def ours(weights: PublicWeights) -> CosmosModel:
    """The model that evaluation builds from weights; heads that are not there stay NaN."""
    model = CosmosModel(weights.model).eval()
    missing, unexpected = model.load_state_dict(weights.tensors, strict=False)
    assert (unexpected, all(map(is_of_heads, missing))) == ([], True)
    return model


def pictures_and_ids() -> tuple[Tensor, Tensor]:
    """Three pictures as a model sees them, and three captions as ids."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 49406, (3, 16), generator=generator)
    for row, end in enumerate((5, 9, 15)):
        ids[row, 0], ids[row, end], ids[row, end + 1 :] = 49406, 49407, 0
    return torch.randn(3, 3, 32, 32, generator=generator), ids
