"""Changing checkpoints on purpose, so that they are whole and another than what was written."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from cosmos_scale.checkpoint.files import write_tensors
from cosmos_scale.checkpoint.state import MANIFEST, manifest_checksum


def content_of(folder: Path) -> dict[str, Any]:
    """What a manifest says."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def rewrite(folder: Path, content: dict[str, Any]) -> None:
    """Replace what a manifest says, with the checksum that belongs to it."""
    (folder / MANIFEST).write_text(json.dumps({**content, "checksum": manifest_checksum(content)}))


def replace_tensors(folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
    """Replace some tensors of one file, with the checksums that belong to them."""
    # Copies: what is loaded lies in the file itself, which is about to be written.
    kept = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    record = write_tensors(folder / file, kept | tensors)
    content = content_of(folder)
    content["files"] = [record._asdict() if known["name"] == file else known for known in content["files"]]
    rewrite(folder, content)
