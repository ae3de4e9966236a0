"""A model as OpenCLIP's folder: open_clip.create_model_and_transforms("local-dir:FOLDER") opens it, strictly."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.checkpoint.interchange.export_files import ExportedFile, json_file, safetensors_file
from cosmos_scale.checkpoint.interchange.names import hf_names
from cosmos_scale.checkpoint.interchange.openclip_folder import OPENCLIP_CONFIG, OPENCLIP_WEIGHTS
from cosmos_scale.config import ModelConfig


def to_openclip(model: ModelConfig, tensors: Mapping[str, Tensor]) -> list[ExportedFile]:
    """Return the files of a model in OpenCLIP's format, which has no heads.

    tensors: float32 on the CPU, by state-dict name. Source of the names of files and keys: open_clip.factory.
    """
    kept = {name: tensors[name] for name in hf_names(model)}
    return [
        safetensors_file(OPENCLIP_WEIGHTS[0], kept),
        json_file(OPENCLIP_CONFIG, {"model_cfg": _model(model), "preprocess_cfg": _preprocessing()}),
    ]


def _model(model: ModelConfig) -> dict[str, Any]:
    return {
        "embed_dim": model.embed_dim,
        "quick_gelu": model.activation == "quick_gelu",
        "vision_cfg": model.vision.model_dump(),
        "text_cfg": model.text.model_dump(),
    }


def _preprocessing() -> dict[str, Any]:
    """The size of pictures is the model's image_size."""
    return {
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
