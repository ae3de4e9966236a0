"""A model as Hugging Face's folder: weights, configuration, tokenizer and image processor of CLIPModel."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.checkpoint.interchange.export_files import ExportedFile, json_file, safetensors_file, text_file
from cosmos_scale.checkpoint.interchange.hf import HF_CONFIG, HF_PIXELS, HF_WEIGHTS
from cosmos_scale.checkpoint.interchange.names import hf_names
from cosmos_scale.config import ModelConfig

START, END = "<|startoftext|>", "<|endoftext|>"
_BICUBIC = 3  # the number of this resampling in Pillow, which the image processor's file holds
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


BytePairs = tuple[dict[str, int], list[tuple[str, str]]]
"""CLIP's vocabulary as `model.tokenizer.byte_pairs` gives it."""


def to_hf(model: ModelConfig, tensors: Mapping[str, Tensor], pairs: BytePairs) -> list[ExportedFile]:
    """Return the files of a model in the format of Hugging Face's CLIPModel, which has no heads.

    tensors: float32 on the CPU, by state-dict name. pairs: the tokenizer's. Source of names and keys: transformers.
    """
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    words, merges = pairs
    vocabulary = {**words, START: len(words), END: len(words) + 1}
    tokenizer_config = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": model.text.context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    return [
        safetensors_file(HF_WEIGHTS[0], hf_tensors(model, tensors)),
        json_file(HF_CONFIG, _config(model, vocabulary)),
        json_file(HF_PIXELS, _image_processor(model.vision.image_size)),
        json_file("tokenizer_config.json", tokenizer_config),
        json_file("special_tokens_map.json", special),
        text_file("vocab.json", json.dumps(vocabulary, ensure_ascii=False)),
        text_file("merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n"),
        text_file("tokenizer.json", _tokenizer(vocabulary, merges)),
    ]


def hf_tensors(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the towers' tensors by the names and in the form of CLIPModel's state dict."""
    found: dict[str, Tensor] = {}
    for name, place in hf_names(model).items():
        tensor = tensors[name].T if place.transposed else tensors[name]
        parts = tensor.chunk(len(place.names)) if tensor.ndim else [tensor]
        found |= dict(zip(place.names, parts, strict=True))
    return found


def _config(model: ModelConfig, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    both = {
        "hidden_act": model.activation,  # the key's values are transformers' names, too
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": model.embed_dim,
    }
    vision, text = model.vision, model.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": model.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": 4 * vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "num_channels": 3,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **both,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "bos_token_id": vocabulary[START],
            "eos_token_id": vocabulary[END],
            "pad_token_id": vocabulary[END],
            **both,
        },
    }


def _image_processor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> str:
    """Return tokenizer.json, which transformers would otherwise make of the other two files each time."""
    model = BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=END,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    cut = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in (START, END)])
    return str(made.to_str())
