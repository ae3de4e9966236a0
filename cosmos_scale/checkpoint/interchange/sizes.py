"""The config of a model from the shapes of its tensors, and whether all of its tensors are there in these shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from cosmos_scale.checkpoint.interchange.foreign import foreign_model
from cosmos_scale.checkpoint.interchange.names import Shape, is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.weights import Activation, refusal
from cosmos_scale.config import ModelConfig

HEAD_WIDTH = 64  # of published models of nearly all sizes
HEAD_WIDTHS = {1280: 80}  # by the image tower's width: ViT-H
POOLER_HEADS = 8
# Keys of the section `model` that change what weights compute, and that shapes of tensors do not tell.
UNTOLD = ("activation", "vision.head_width", "text.heads", "pooler_heads")
COSMOS_WIDTHS = (768, 512)  # of the published models' towers


class Known(NamedTuple):
    """What a config beside the tensors says, and tensors do not; None: not said.

    head_width: numbers of an attention head of the image tower. text_heads: attention heads of the text tower.
    """

    head_width: int | None = None
    text_heads: int | None = None
    activation: Activation | None = None


class Inferred(NamedTuple):
    """A model's config, and what was assumed since nothing says it.

    told: the keys of UNTOLD that were known all the same.
    """

    model: ModelConfig
    guessed: tuple[str, ...]
    told: frozenset[str]


def infer_model(path: object, shapes: Mapping[str, Shape], known: Known, assumed: Activation) -> Inferred:
    """Return the config of the model whose tensors have these shapes, by our names, and check all the shapes.

    path: of the checkpoint. assumed: the activation where `known` says none, which is then told as guessed; with heads
    it is GELU, since COSMOS has no other.
    Raises UserError, with what was found, where the tensors are not those of such a model.
    """
    if missing := [name for name in _TELLING if name not in shapes]:
        found = foreign_model(shapes) or f"a model without {missing[0]}"
        if len(missing) == len(_TELLING) and shapes:
            found = foreign_model(shapes) or f"no CLIP model, but tensors such as {next(iter(shapes))}"
        raise refusal(path, f"found {found}")
    guessed = []
    vision_width, text_width = _sized(path, shapes, "visual.conv1.weight", 4)[0], _sized(path, shapes, *_TABLE)[1]
    has_heads = any(map(is_of_heads, shapes))
    is_cosmos = has_heads and (vision_width, text_width) == COSMOS_WIDTHS
    head_width = known.head_width or HEAD_WIDTHS.get(vision_width, _head_width(vision_width))
    text_heads = known.text_heads or text_width // _head_width(text_width)
    if (known.head_width is None or known.text_heads is None) and not is_cosmos:
        counts = f"{vision_width // head_width} in the image tower, {text_heads} in the text tower"
        guessed.append(f"attention heads: {counts} (tensors do not tell)")
    activation = known.activation or ("gelu" if has_heads else assumed)
    if known.activation is None and not has_heads:
        guessed.append(f"activation: {assumed} (tensors do not tell)")
    sizes = _sizes(path, shapes)
    sizes["vision"]["head_width"], sizes["text"]["heads"] = head_width, text_heads
    sizes["activation"] = activation
    sizes["pooler_heads"] = math.gcd(POOLER_HEADS, sizes["embed_dim"])
    try:
        model = ModelConfig.model_validate(sizes)
    except ValidationError as error:
        details = error.errors()[0]
        where, said = ".".join(map(str, details["loc"])), str(details["msg"]).removeprefix("Value error, ")
        found = f"a model that the config cannot say: {where}{': ' * bool(where)}{said}"
        raise refusal(path, f"found {foreign_model(shapes) or found}") from None
    check_shapes(path, shapes, model)
    are_known = (
        known.activation is not None or has_heads,
        known.head_width is not None or is_cosmos,
        known.text_heads is not None or is_cosmos,
        is_cosmos,
    )
    told = frozenset(key for key, is_known in zip(UNTOLD, are_known, strict=True) if is_known)
    return Inferred(model, tuple(guessed), told)


_TABLE = ("token_embedding.weight", 2)
_TELLING = (
    "visual.conv1.weight",
    "visual.class_embedding",
    "visual.positional_embedding",
    "token_embedding.weight",
    "positional_embedding",
    "text_projection",
)


def _head_width(width: int) -> int:
    return HEAD_WIDTH if width % HEAD_WIDTH == 0 else width


def _sizes(path: object, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the keys of the section `model` that the shapes tell."""
    vision_width, channels, patch, columns = _sized(path, shapes, "visual.conv1.weight", 4)
    if channels != 3 or patch != columns:
        raise refusal(path, f"found patches of {channels} channels and {patch} x {columns} pixels in the image tower")
    positions = _sized(path, shapes, "visual.positional_embedding", 2)[0]
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1:
        raise refusal(path, f"found {positions} positions in the image tower, not those of a class token and a square")
    vocabulary, text_width = _sized(path, shapes, *_TABLE)
    return {
        "embed_dim": _sized(path, shapes, "text_projection", 2)[1],
        "vision": {
            "image_size": side * patch,
            "patch_size": patch,
            "width": vision_width,
            "layers": _layers(shapes, "visual.transformer"),
        },
        "text": {
            "context_length": _sized(path, shapes, "positional_embedding", 2)[0],
            "vocab_size": vocabulary,
            "width": text_width,
            "layers": _layers(shapes, "transformer"),
        },
    }


def _sized(path: object, shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    if len(shapes[name]) != dimensions:
        raise refusal(path, f"found {name} of shape {list(shapes[name])}, which has not {dimensions} dimensions")
    return shapes[name]


def _layers(shapes: Mapping[str, Shape], transformer: str) -> int:
    blocks = re.compile(rf"{re.escape(transformer)}\.resblocks\.(\d+)\.")
    return len({match[1] for match in map(blocks.match, shapes) if match})


def check_shapes(path: object, shapes: Mapping[str, Shape], model: ModelConfig) -> None:
    """Raise UserError unless these are the tensors of a model, by our names; all tensors of the heads may lack."""
    expected = tensor_shapes(model)
    has_heads = any(map(is_of_heads, shapes))
    wanted = {name: shape for name, shape in expected.items() if has_heads or not is_of_heads(name)}
    if found := _difference(shapes, wanted):
        raise refusal(path, f"found {foreign_model(shapes) or found}")


def _difference(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str | None:
    """Return the first difference between tensors and those of a model, None where there is none."""
    for name, shape in wanted.items():
        if name not in shapes:
            return f"a model without {name}"
        if shapes[name] != shape and name.endswith("mlp.c_fc.weight") and shapes[name][1:] == shape[1:]:
            return (
                f"a model whose MLPs are {shapes[name][0] / shape[1]:.4g} times as wide as its tower, where ours are 4"
            )
        if shapes[name] != shape:
            others = "where its other tensors are those of a model with"
            return f"{name} of shape {list(shapes[name])}, {others} {list(shape)}"
    unknown = [name for name in shapes if name not in wanted]
    more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
    return f"a model with other parts than ours: {unknown[0]}{more}" if unknown else None
