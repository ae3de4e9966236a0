"""A folder of Hugging Face's CLIPModel: config.json, and the tensors beside it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_scale.checkpoint.interchange.containers import open_tensors
from cosmos_scale.checkpoint.interchange.foreign import foreign_model
from cosmos_scale.checkpoint.interchange.names import hf_names
from cosmos_scale.checkpoint.interchange.openclip import named
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
from cosmos_scale.checkpoint.interchange.sizes import Known, infer_model
from cosmos_scale.checkpoint.interchange.weights import Activation, StoredWeights, refusal, shape_of
from cosmos_scale.checkpoint.interchange.wrapped import prefix_of, said
from cosmos_scale.config import TOKENIZER_VOCABULARY, ModelConfig, TextConfig, VisionConfig
from cosmos_scale.words import with_article

HF_CONFIG = "config.json"
HF_PIXELS = "preprocessor_config.json"
HF_PROCESSOR = "processor_config.json"  # in place of HF_PIXELS, by transformers from version 5 on
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there counts
ADAPTER = "adapter_config.json"  # of a LoRA
HF_INDEX = ".index.json"  # after such a name, of the list of the files that stand in its place
_WEIGHTS = tuple(name for whole in HF_WEIGHTS for name in (whole, f"{whole}{HF_INDEX}"))
# What CLIPConfig takes where a key is not there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-5},
    "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 8, "layer_norm_eps": 1e-5},
}
# Of the id of EOT, where the text's feature is read: 2 stands for the highest id of a text, which is EOT's.
_ENDS = (TOKENIZER_VOCABULARY - 1, 2)
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "quick_gelu": "quick_gelu"}


def open_hf_folder(folder: Path, asked: Activation | None, name: str | None = None) -> StoredWeights:
    """Return the model of such a folder; raises UserError where config and tensors are not those of one of our models.

    asked: the activation that must be its own, None for any. name: of the file of its tensors, None for the first of
    HF_WEIGHTS that is there, whole or in parts.
    """
    path = folder / HF_CONFIG
    content = read_settings(path)
    if content.get("model_type") != "clip":
        raise refusal(path, f"found Hugging Face's model_type {content.get('model_type')!r}, not 'clip'")
    vision, text = (_section(path, content, name) for name in ("vision_config", "text_config"))
    activation = _activation(path, vision, text)
    pixels_path, pixels = _picture_settings(folder)
    check_pixels(pixels_path, pixels.get("image_mean"), pixels.get("image_std"))
    held = _content(_files(folder) if name is None else [folder / name])
    rows = _our_rows(folder, named(folder, held))
    heads = stated_count(path, "vision_config.num_attention_heads", vision["num_attention_heads"])
    width = shape_of(rows["visual.class_embedding"])[0]
    if width % heads:
        raise refusal(path, f"found vision_config.num_attention_heads {heads}, which does not divide {width}")
    text_heads = stated_count(path, "text_config.num_attention_heads", text["num_attention_heads"])
    known = Known(width // heads, text_heads, one_activation(path, activation, asked))
    shapes = {name: shape_of(tensors) for name, tensors in rows.items()}
    inferred = infer_model(folder, shapes, known, activation)
    compare(path, _sizes(content, vision, text, inferred.model))
    kind = f"Hugging Face CLIPModel folder{said(prefix_of(folder, held))}"
    guessed = (
        *(other_weights(folder, _WEIGHTS) if name is None else ()),
        *([f"no LoRA: that of {ADAPTER} beside the weights is not applied"] if (folder / ADAPTER).is_file() else []),
        *inferred.guessed,
        *other_pictures(pixels_path, pixels, _pictures(inferred.model.vision.image_size)),
    )
    return StoredWeights("hf", kind, inferred.model, rows, False, guessed, None, inferred.told)


def _picture_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return what says how pictures are prepared, empty where nothing does, and its file.

    Where both files say it, transformers takes the processor's. Old versions wrote other things there, or none.
    """
    path = folder / HF_PROCESSOR
    content = read_settings(path) if path.exists() else {}
    if content.get("image_processor") is not None:
        return path, object_of(path, content, "image_processor")
    path = folder / HF_PIXELS
    return path, read_settings(path) if path.exists() else {}


def _pictures(side: int) -> dict[str, tuple[Any, ...]]:
    """Return what a preprocessing of pictures like ours says, in old versions of transformers too; side: in pixels."""
    said: dict[str, tuple[Any, ...]] = dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)
    )
    sizes = {"size": (side, {"shortest_edge": side}), "crop_size": (side, {"height": side, "width": side})}
    return said | {"resample": (3,)} | sizes


def _section(path: Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the config of a tower, as CLIPConfig puts it together from two objects and its defaults."""
    return _DEFAULTS[name] | object_of(path, content, name) | object_of(path, content, f"{name}_dict")


def _activation(path: Path, vision: dict[str, Any], text: dict[str, Any]) -> Activation:
    """Return the activation of both towers; raises UserError where it, their norm or the text's end is not ours."""
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if tower["layer_norm_eps"] != 1e-5:
            raise refusal(path, f"found {name}.layer_norm_eps {tower['layer_norm_eps']}, where our towers have 1e-05")
        if str(tower["hidden_act"]) not in _ACTIVATIONS:
            raise refusal(path, f"found {name}.hidden_act {tower['hidden_act']!r}, neither gelu nor quick_gelu")
    if text.get("eos_token_id", _ENDS[0]) not in _ENDS:
        raise refusal(path, f"found text_config.eos_token_id {text['eos_token_id']}, neither {_ENDS[0]} nor {_ENDS[1]}")
    if vision["hidden_act"] != text["hidden_act"]:
        found = f"found hidden_act {vision['hidden_act']} of the image tower and {text['hidden_act']} of the text tower"
        raise refusal(path, f"{found}, where ours have one")
    return _ACTIVATIONS[vision["hidden_act"]]


def _content(files: Sequence[Path]) -> dict[str, Any]:
    """Return what the files of a folder hold together, by the names there."""
    found: dict[str, Any] = {}
    for file in files:
        content = open_tensors(file)
        if not isinstance(content, Mapping):
            raise refusal(file, f"found {with_article(type(content).__name__)}, not a dict of tensors")
        # Old versions saved the positions' numbers beside the weights.
        found |= {str(key): value for key, value in content.items() if not str(key).endswith("position_ids")}
    return found


def _files(folder: Path) -> list[Path]:
    """Return the first file of weights that is there, or all that an index in its place lists."""
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise refusal(folder, f"found {HF_CONFIG}, but neither {' nor '.join(HF_WEIGHTS)}")
    if not name.endswith(HF_INDEX):
        return [folder / name]
    parts = set(map(str, object_of(folder / name, read_settings(folder / name), "weight_map").values()))
    return [folder / Path(part).name for part in sorted(parts)]


def _our_rows(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Return a CLIPModel's tensors under our names; raises UserError where one lacks or is too many."""
    vision, text = (_layers(tensors, tower) for tower in ("vision_model", "text_model"))
    model = ModelConfig(vision=VisionConfig(layers=max(vision, 1)), text=TextConfig(layers=max(text, 1)))
    rows: dict[str, tuple[Tensor, ...]] = {}
    used: set[str] = set()
    for ours, theirs in hf_names(model).items():
        if missing := [name for name in theirs.names if name not in tensors]:
            kind = foreign_model(tensors, has_config=True)
            raise refusal(folder, f"found {kind or f'a CLIPModel without {missing[0]}'}")
        parts = [tensors[name] for name in theirs.names]
        if len({part.shape for part in parts}) > 1:
            raise refusal(folder, f"found tensors of several shapes in {', '.join(theirs.names)}")
        rows[ours] = tuple(part.t() for part in parts) if theirs.transposed and parts[0].ndim == 2 else tuple(parts)
        used.update(theirs.names)
    if unknown := [name for name in tensors if name not in used]:
        kind = foreign_model(unknown, has_config=True)
        raise refusal(folder, f"found {kind or f'a CLIPModel with another tensor, {unknown[0]}'}")
    return rows


def _layers(tensors: Mapping[str, Tensor], tower: str) -> int:
    layer = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    return len({match[1] for match in map(layer.match, tensors) if match})


def _sizes(content: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], found: ModelConfig) -> list[Stated]:
    towers = (("vision_config", vision, found.vision), ("text_config", text, found.text))
    stated = [Stated("projection_dim", content.get("projection_dim"), found.embed_dim)]
    for name, tower, ours in towers:
        pairs = {"hidden_size": ours.width, "num_hidden_layers": ours.layers, "intermediate_size": 4 * ours.width}
        stated += [Stated(f"{name}.{key}", tower.get(key), size) for key, size in pairs.items()]
    for key in ("image_size", "patch_size"):
        stated.append(Stated(f"vision_config.{key}", vision.get(key), getattr(found.vision, key)))
    for key, size in (("vocab_size", found.text.vocab_size), ("max_position_embeddings", found.text.context_length)):
        stated.append(Stated(f"text_config.{key}", text.get(key), size))
    return stated
