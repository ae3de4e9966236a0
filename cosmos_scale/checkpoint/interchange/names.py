"""The tensors of a model: their names and shapes in our state dicts, and where they lie in Hugging Face's CLIPModel.

Our names are OpenCLIP's, and those of the COSMOS heads. So OpenCLIP needs no table.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cosmos_scale.config import ModelConfig

Shape = tuple[int, ...]

# Of the tensors that COSMOS has and OpenCLIP lacks.
HEAD_PREFIXES = ("visual.attn_cross_pool.", "text_attn_cross_pool.", "image_token_mapping.", "text_token_mapping.")
DISTILL_SCALE = "distill_logit_scale"


def is_of_heads(name: str) -> bool:
    """Tell whether a tensor, by our name, belongs to the heads or is their log-scale: OpenCLIP's files lack these."""
    return name == DISTILL_SCALE or name.startswith(HEAD_PREFIXES)


def tensor_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the shape of each tensor of a model's state dict, by our names; log-scales have shape ()."""
    vision, text, embed = model.vision, model.text, model.embed_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes: dict[str, Shape] = {
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": (1 + patches, vision.width),
        "visual.proj": (vision.width, embed),
        "visual.conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        **_norm("visual.ln_pre", vision.width),
        **_blocks("visual.transformer", vision.width, vision.layers),
        **_norm("visual.ln_post", vision.width),
        "token_embedding.weight": (text.vocab_size, text.width),
        "positional_embedding": (text.context_length, text.width),
        **_blocks("transformer", text.width, text.layers),
        **_norm("ln_final", text.width),
        "text_projection": (text.width, embed),
        "logit_scale": (),
        DISTILL_SCALE: (),
        **_linear("image_token_mapping", vision.width, embed),
        **_linear("text_token_mapping", text.width, embed),
    }
    for pooler in ("visual.attn_cross_pool", "text_attn_cross_pool"):
        shapes |= _norm(f"{pooler}.ln_q", embed) | _norm(f"{pooler}.ln_k", embed) | _attention(f"{pooler}.attn", embed)
    return shapes


def _blocks(transformer: str, width: int, layers: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for block in (f"{transformer}.resblocks.{number}" for number in range(layers)):
        shapes |= _norm(f"{block}.ln_1", width) | _attention(f"{block}.attn", width) | _norm(f"{block}.ln_2", width)
        shapes |= _linear(f"{block}.mlp.c_fc", width, 4 * width) | _linear(f"{block}.mlp.c_proj", 4 * width, width)
    return shapes


def _attention(name: str, width: int) -> dict[str, Shape]:
    packed: dict[str, Shape] = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return packed | _linear(f"{name}.out_proj", width, width)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


class HfTensors(NamedTuple):
    """Where a tensor of ours lies in a CLIPModel.

    names: of one tensor, or of three whose rows follow each other in ours. transposed: whether theirs is ours,
    transposed.
    """

    names: tuple[str, ...]
    transposed: bool = False


def hf_names(model: ModelConfig) -> dict[str, HfTensors]:
    """Return where each tensor of ours, by our names, lies in a CLIPModel, which has no heads."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
        **_pair("visual.ln_pre", "vision_model.pre_layrnorm"),  # so spelt there
        **_pair("visual.ln_post", "vision_model.post_layernorm"),
        **_pair("ln_final", "text_model.final_layer_norm"),
    }
    found = {ours: HfTensors((theirs,)) for ours, theirs in names.items()}
    found["visual.proj"] = HfTensors(("visual_projection.weight",), transposed=True)
    found["text_projection"] = HfTensors(("text_projection.weight",), transposed=True)
    for tower, layers, theirs in (
        ("visual.transformer", model.vision.layers, "vision_model"),
        ("transformer", model.text.layers, "text_model"),
    ):
        for number in range(layers):
            found |= _hf_block(f"{tower}.resblocks.{number}", f"{theirs}.encoder.layers.{number}")
    return found


def _hf_block(ours: str, theirs: str) -> Iterator[tuple[str, HfTensors]]:
    parts = ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")
    for part, name in (*parts, ("attn.out_proj", "self_attn.out_proj")):
        for ours_name, their_name in _pair(f"{ours}.{part}", f"{theirs}.{name}").items():
            yield ours_name, HfTensors((their_name,))
    for kind in ("weight", "bias"):
        rows = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield f"{ours}.attn.in_proj_{kind}", HfTensors(rows)


def _pair(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
