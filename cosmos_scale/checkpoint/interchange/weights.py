"""The weights of a public checkpoint: where they lie in its file, and read into memory."""

import hashlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import Shape
from cosmos_scale.config import ModelConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import whole_path

PublicForm = Literal["cosmos", "openclip", "hf"]
Which = Literal["student", "teacher"]
Activation = Literal["gelu", "quick_gelu"]

ACCEPTED = (
    "a step-* folder or a run of this program; a COSMOS .pt; an OpenCLIP state dict, safetensors, training checkpoint "
    "or folder with open_clip_config.json; a folder of Hugging Face's CLIPModel"
)


def refusal(what: object, found: str) -> UserError:
    """Return the error of a file or folder that is no checkpoint which can be read: what was found, what is accepted.

    what: its path.
    """
    return UserError(f"checkpoint {whole_path(str(what))}: {found}; accepted: {ACCEPTED}")


class PublicWeights(NamedTuple):
    """The float32 weights of one model of a public checkpoint.

    form: the file's. kind: the same for people, on one line. model: inferred from the tensors, and from the config
    beside them where there is one. tensors: on the CPU, by the names of `CosmosModel.state_dict`; log-scales have shape
    []. has_heads: False where only the towers are there: then `tensors` lacks the heads and distill_logit_scale.
    digest: of the tensors, in hexadecimal digits. guessed: what the file does not say and was assumed, each on one
    line.
    """

    form: PublicForm
    kind: str
    model: ModelConfig
    tensors: dict[str, Tensor]
    has_heads: bool
    digest: str
    guessed: tuple[str, ...]


class StoredWeights(NamedTuple):
    """One model of a public checkpoint whose tensors' names and shapes are checked, and whose numbers are not read yet.

    rows: by our names, the tensors whose rows are put together to ours; they lie in the mapped file, in its dtype.
    models: those that the file has; None where it has one model, which is neither a student nor a teacher. told: the
    keys of the section `model` that shapes do not tell (`sizes.UNTOLD`), and that the file says in another way.
    The other fields are those of PublicWeights.
    """

    form: PublicForm
    kind: str
    model: ModelConfig
    rows: dict[str, tuple[Tensor, ...]]
    has_heads: bool
    guessed: tuple[str, ...]
    models: tuple[Which, ...] | None
    told: frozenset[str]


def shape_of(rows: tuple[Tensor, ...]) -> Shape:
    """Return the shape of tensors whose rows are put together."""
    first = tuple(rows[0].shape)
    return first if len(rows) == 1 else (sum(len(tensor) for tensor in rows), *first[1:])


def read_stored(stored: StoredWeights, where: object) -> PublicWeights:
    """Read the numbers of a model into memory, in float32; where: the checkpoint's path.

    Raises UserError where a number is no finite number.
    """
    digest = hashlib.sha256()
    tensors = {}
    for name, rows in sorted(stored.rows.items()):
        tensor = torch.cat(rows) if len(rows) > 1 else rows[0]
        tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if wrong := tensor.numel() - int(tensor.isfinite().sum()):
            raise refusal(where, f"{wrong:,} of {tensor.numel():,} numbers of {name} are not finite")
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data.cast("B") if tensor.ndim else tensor.reshape(1).numpy().data.cast("B"))
        tensors[name] = tensor
    return PublicWeights(
        stored.form, stored.kind, stored.model, tensors, stored.has_heads, digest.hexdigest()[:16], stored.guessed
    )
