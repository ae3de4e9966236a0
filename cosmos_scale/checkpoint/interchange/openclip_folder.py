"""A folder as OpenCLIP publishes its models: open_clip_config.json, and the state dict beside it."""

from pathlib import Path
from typing import Any

from cosmos_scale.checkpoint.interchange.containers import open_tensors
from cosmos_scale.checkpoint.interchange.openclip import openclip_model
from cosmos_scale.checkpoint.interchange.settings import (
    Stated,
    check_pixels,
    compare,
    object_of,
    one_activation,
    other_pictures,
    other_weights,
    read_settings,
    stated_count,
)
from cosmos_scale.checkpoint.interchange.sizes import HEAD_WIDTH, Known
from cosmos_scale.checkpoint.interchange.weights import Activation, StoredWeights, refusal
from cosmos_scale.config import ModelConfig

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first that is there counts
TEXT_HEADS = 8  # OpenCLIP's default

# Keys that change what the towers compute, with the one value that ours do. A key that is not here and not in _FREE may
# be there with an empty value (null, false, 0).
_ONLY: dict[str, dict[str, Any]] = {
    "model_cfg": {},
    "vision_cfg": {"mlp_ratio": 4, "pos_embed_type": "learnable", "pool_type": "tok"},
    "text_cfg": {"mlp_ratio": 4, "pool_type": "argmax", "proj_type": "linear"},
}
# What a preprocessing of pictures like ours says.
_PICTURES = {"mode": ("RGB",), "interpolation": ("bicubic", "random"), "resize_mode": ("shortest",)}
# Keys that are looked at elsewhere, or change nothing in an evaluation of our towers.
_FREE = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "cast_dtype"}
    | {"output_dict", "nonscalar_logit_scale"},
    "vision_cfg": {"layers", "width", "head_width", "patch_size", "image_size", "patch_dropout", "output_tokens"}
    | {"attn_pooler_queries", "attn_pooler_heads"}
    | {f"timm_{key}" for key in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "output_tokens", "pad_id", "eos_id"}
    | {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}


def openclip_weights(folder: Path) -> Path | None:
    """Return the file of the weights in a folder with open_clip_config.json, None where there is none."""
    return next((folder / name for name in OPENCLIP_WEIGHTS if (folder / name).is_file()), None)


def open_openclip_folder(folder: Path, asked: Activation | None, name: str | None = None) -> StoredWeights:
    """Return the model of such a folder; raises UserError where config and tensors are not those of one of our models.

    asked: the activation that must be its own, None for any. name: of the file of its tensors, None for the first of
    OPENCLIP_WEIGHTS that is there.
    """
    path = folder / OPENCLIP_CONFIG
    content = read_settings(path)
    model = object_of(path, content, "model_cfg") or content
    vision, text = object_of(path, model, "vision_cfg"), object_of(path, model, "text_cfg")
    for section, keys in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        _check_keys(path, section, keys)
    pixels = object_of(path, content, "preprocess_cfg")
    check_pixels(path, pixels.get("mean"), pixels.get("std"))
    known = Known(
        stated_count(path, "vision_cfg.head_width", vision.get("head_width", HEAD_WIDTH)),
        stated_count(path, "text_cfg.heads", text.get("heads", TEXT_HEADS)),
        one_activation(path, "quick_gelu" if model.get("quick_gelu") else "gelu", asked),
    )
    weights = openclip_weights(folder) if name is None else folder / name
    if weights is None:
        raise refusal(folder, f"found {OPENCLIP_CONFIG}, but neither {' nor '.join(OPENCLIP_WEIGHTS)}")
    stored = openclip_model(weights, open_tensors(weights), known)
    compare(path, _sizes(model, vision, text, stored.model))
    program = "COSMOS" if stored.has_heads else "OpenCLIP"
    _, comma, prefix = stored.kind.partition(", ")  # what is said of names that have a prefix
    kind = f"{program} folder with {OPENCLIP_CONFIG}{comma}{prefix}"
    guessed = (
        *(other_weights(folder, OPENCLIP_WEIGHTS) if name is None else ()),
        *stored.guessed,
        *other_pictures(path, pixels, _PICTURES),
    )
    return stored._replace(kind=kind, guessed=guessed)


def _check_keys(path: Path, section: str, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if key in _ONLY[section]:
            if value != _ONLY[section][key]:
                raise refusal(path, f"found {section}.{key} {value}, where our towers do {_ONLY[section][key]}")
        elif value and key not in _FREE[section]:
            raise refusal(path, f"found {section}.{key} {value}, which our towers do not do")


def _sizes(model: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], found: ModelConfig) -> list[Stated]:
    stated = [Stated("model_cfg.embed_dim", model.get("embed_dim"), found.embed_dim)]
    for key in ("layers", "width", "patch_size", "image_size"):
        stated.append(Stated(f"vision_cfg.{key}", vision.get(key), getattr(found.vision, key)))
    for key in ("context_length", "vocab_size", "width", "layers"):
        stated.append(Stated(f"text_cfg.{key}", text.get(key), getattr(found.text, key)))
    return stated
