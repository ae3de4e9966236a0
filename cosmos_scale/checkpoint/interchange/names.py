"""What other formats call the tensors of our state dicts, and in which form they hold them.

OpenCLIP has the names of our state dicts, but only the towers and their log-scale. A COSMOS .pt file has all names.
Source of Hugging Face's names: CLIPModel of transformers.
"""

from typing import NamedTuple

from cosmos_scale.config import ModelConfig

# The tensors that only COSMOS has: the heads, and the log-scale of the distillation.
ONLY_COSMOS = (
    "visual.attn_cross_pool.",
    "text_attn_cross_pool.",
    "image_token_mapping.",
    "text_token_mapping.",
    "distill_logit_scale",
)

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HfPlace(NamedTuple):
    """Where a tensor of ours is in CLIPModel's state dict.

    names: one name, or three: the rows of our tensor are those of the three tensors, one after the other. transposed:
    whether the matrix there is the transposed one.
    """

    names: tuple[str, ...]
    transposed: bool = False


def is_only_cosmos(name: str) -> bool:
    """Tell whether a tensor of our state dicts belongs to the heads or the distillation, which other formats lack."""
    return name.startswith(ONLY_COSMOS)


def hf_names(model: ModelConfig) -> dict[str, HfPlace]:
    """Return where each tensor of both towers, and the log-scale, is in CLIPModel's state dict, by our name."""
    places = {
        "visual.class_embedding": HfPlace(("vision_model.embeddings.class_embedding",)),
        "visual.positional_embedding": HfPlace(("vision_model.embeddings.position_embedding.weight",)),
        "visual.conv1.weight": HfPlace(("vision_model.embeddings.patch_embedding.weight",)),
        "visual.proj": HfPlace(("visual_projection.weight",), transposed=True),
        "token_embedding.weight": HfPlace(("text_model.embeddings.token_embedding.weight",)),
        "positional_embedding": HfPlace(("text_model.embeddings.position_embedding.weight",)),
        "text_projection": HfPlace(("text_projection.weight",), transposed=True),
        "logit_scale": HfPlace(("logit_scale",)),
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",  # so it is spelled there
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    places |= _weights_and_biases(norms)
    for ours, theirs, layers in (
        ("visual.", "vision_model", model.vision.layers),
        ("", "text_model", model.text.layers),
    ):
        for layer in range(layers):
            block, there = f"{ours}transformer.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
            places |= _weights_and_biases({f"{block}.{part}": f"{there}.{name}" for part, name in _BLOCK.items()})
            for kind in ("weight", "bias"):
                thirds = tuple(f"{there}.self_attn.{third}_proj.{kind}" for third in "qkv")
                places[f"{block}.attn.in_proj_{kind}"] = HfPlace(thirds)
    return places


def _weights_and_biases(modules: dict[str, str]) -> dict[str, HfPlace]:
    return {
        f"{ours}.{kind}": HfPlace((f"{theirs}.{kind}",))
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
