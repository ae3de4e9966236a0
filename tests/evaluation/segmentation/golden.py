"""The golden file of evaluation: its tensors, its header, and its tiny model, for tests."""

import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cosmos_scale.config import ModelConfig, RemoteConfig, TextConfig, VisionConfig
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.evaluation.segmentation.oracle import Array, Sizes

FILE = REPOSITORY / "tests" / "golden" / "golden_eval.safetensors"


class GoldenFile(NamedTuple):
    tensors: dict[str, Tensor]
    header: dict[str, str]
    encoder: Encoder

    def tower_in_float64(self) -> tuple[dict[str, Array], Sizes]:
        """The image tower's weights and sizes, for the oracle."""
        weights = {
            name.removeprefix("student.visual."): tensor.double().numpy()
            for name, tensor in self.tensors.items()
            if name.startswith("student.visual.")
        }
        sizes = json.loads(self.header["config"])
        return weights, Sizes(patch=sizes["ps"], heads=sizes["vw"] // sizes["head_width"], layers=sizes["vl"])

    def image(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self.tensors[name].numpy()


@lru_cache(maxsize=1)
def golden_file() -> GoldenFile:
    """Read the file, once a process."""
    with safe_open(FILE, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = json.loads(header["config"])
    state = {name.removeprefix("student."): tensor for name, tensor in tensors.items() if name.startswith("student.")}
    table = torch.zeros(sizes["vocab"], sizes["tw"])
    table[tensors["token_rows.ids"].long()] = tensors["token_rows.values"]
    context = state["positional_embedding"].shape[0]
    model = CosmosModel(
        ModelConfig(
            embed_dim=sizes["ed"],
            pooler_heads=sizes["pooler_heads"],
            vision=VisionConfig(
                image_size=sizes["image_size"],
                patch_size=sizes["ps"],
                width=sizes["vw"],
                layers=sizes["vl"],
                head_width=sizes["head_width"],
            ),
            text=TextConfig(
                context_length=context,
                vocab_size=sizes["vocab"],
                width=sizes["tw"],
                layers=sizes["tl"],
                heads=sizes["th"],
            ),
        )
    )
    model.load_state_dict(state | {"token_embedding.weight": table})
    setting = Setting(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        image_size=sizes["image_size"],
        tokenizer=Tokenizer(context),
        max_pixels=10**7,
        background="keep",
        remote=RemoteConfig(),
    )
    return GoldenFile(tensors, header, Encoder(model.eval(), setting))
