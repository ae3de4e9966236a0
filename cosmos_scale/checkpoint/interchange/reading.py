"""Public checkpoints of every form: which form a path has, and one model of it."""

from collections.abc import Mapping
from pathlib import Path

from cosmos_scale.checkpoint.interchange.containers import open_tensors
from cosmos_scale.checkpoint.interchange.cosmos import cosmos_model, is_cosmos
from cosmos_scale.checkpoint.interchange.openclip import openclip_model
from cosmos_scale.checkpoint.interchange.sizes import Known
from cosmos_scale.checkpoint.interchange.weights import (
    Activation,
    PublicWeights,
    StoredWeights,
    Which,
    read_stored,
    refusal,
)


def is_public(path: Path) -> bool:
    """Tell whether a path is that of a file, so of another program's checkpoint: ours are folders."""
    return path.is_file()


def read_public(path: Path, which: Which, *, activation: Activation | None = None) -> PublicWeights:
    """Read one model of a public checkpoint into memory.

    which: of a file with both; other files have one model. activation: where it is known and the file does not say it.
    Raises UserError, on one line with what was found and what is accepted, where the path has no model that we can say.
    """
    return read_stored(open_public(path, which, activation=activation), path)


def open_public(path: Path, which: Which, *, activation: Activation | None = None) -> StoredWeights:
    """Open one model of a public checkpoint, and check names and shapes; arguments and errors as of `read_public`.

    Nothing but names and shapes is read. Numbers stay in the mapped file, those of an optimizer are never read.
    """
    content = open_tensors(path)
    if not isinstance(content, Mapping):
        raise refusal(path, f"found a {type(content).__name__}, not a dict of tensors")
    known = Known(activation=activation)
    if is_cosmos(content):
        return cosmos_model(path, content, which, known)
    return openclip_model(path, content, known)
