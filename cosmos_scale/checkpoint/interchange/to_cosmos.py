"""Student and teacher as a .pt file in the layout of the public COSMOS checkpoints, for the published programs."""

from collections.abc import Mapping

from torch import Tensor

from cosmos_scale.checkpoint.interchange.export_files import ExportedFile, torch_file
from cosmos_scale.checkpoint.interchange.names import tensor_shapes
from cosmos_scale.checkpoint.interchange.sizes import Known, infer_model
from cosmos_scale.config import ModelConfig
from cosmos_scale.errors import UserError

COSMOS_FILE = "cosmos.pt"


def check_cosmos_sizes(model: ModelConfig) -> None:
    """Raise UserError where readers of the COSMOS layout, which holds no config, would take another model for it."""
    read = infer_model(COSMOS_FILE, tensor_shapes(model), Known(), "gelu").model
    keys = (
        ("vision.head_width", model.vision.head_width, read.vision.head_width),
        ("text.heads", model.text.heads, read.text.heads),
        ("pooler_heads", model.pooler_heads, read.pooler_heads),
        ("text_padding", model.text_padding, read.text_padding),
        ("activation", model.activation, read.activation),
    )
    for key, value, taken in keys:
        if value != taken:
            raise UserError(
                f"model.{key}: {value}; rule: must be {taken} for a COSMOS file, which does not hold this key: its "
                "readers would take that"
            )


def to_cosmos(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], *, epoch: int, name: str
) -> list[ExportedFile]:
    """Return both models in the COSMOS layout; tensors: float32 on the CPU, by state-dict name, log-scales [].

    The student's names have the prefix `module.`, as its published trainer saves it out of DDP; the teacher's have
    none. epoch: how many are done.
    """
    content = {
        "epoch": epoch,
        "name": name,
        "student": {f"module.{key}": tensor for key, tensor in student.items()},
        "teacher": dict(teacher),
    }
    return [torch_file(COSMOS_FILE, content)]
