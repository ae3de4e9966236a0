"""Public checkpoints of every form: which form a path has, and one model of it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cosmos_scale.checkpoint.files import GoneCheckpoint
from cosmos_scale.checkpoint.interchange.containers import open_tensors
from cosmos_scale.checkpoint.interchange.cosmos import cosmos_model, models_held
from cosmos_scale.checkpoint.interchange.hf import ADAPTER, HF_CONFIG, HF_WEIGHTS, open_hf_folder
from cosmos_scale.checkpoint.interchange.openclip import openclip_model
from cosmos_scale.checkpoint.interchange.openclip_folder import (
    OPENCLIP_CONFIG,
    OPENCLIP_WEIGHTS,
    open_openclip_folder,
    openclip_weights,
)
from cosmos_scale.checkpoint.interchange.sizes import Known
from cosmos_scale.checkpoint.interchange.weights import (
    Activation,
    PublicWeights,
    StoredWeights,
    Which,
    read_stored,
    refusal,
)
from cosmos_scale.checkpoint.state import MANIFEST, MOST_TRIES, find_checkpoint, newest, step_of
from cosmos_scale.errors import UserError
from cosmos_scale.words import with_article

# A folder with one of these is another program's, whatever it turns out to be.
SETTINGS = (OPENCLIP_CONFIG, HF_CONFIG, ADAPTER)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]*(clip|cosmos)[\w.-]*", re.IGNORECASE)
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

Value = TypeVar("Value")


def is_public(path: Path) -> bool:
    """Tell whether a path is for `read_public`: a file, or a folder of another program that is no checkpoint of ours.

    A path where nothing is counts by its suffix: a checkpoint of ours is a folder.
    """
    if not path.is_dir():
        return path.exists() or path.suffix in SUFFIXES
    if (path / MANIFEST).exists() or newest(path) or newest(path / "checkpoints"):
        return False
    return any((path / name).is_file() for name in SETTINGS)


def find_model(path: Path) -> Path:
    """Return the checkpoint that a path stands for: a public one as it is, a run by its newest.

    Raises UserError where there is none. A public checkpoint is looked into when it is opened.
    """
    if is_public(path):
        return path
    try:
        return find_checkpoint(path)
    except UserError as failure:
        raise UserError(f"{failure}{or_a_file(path)}") from None


def of_newest(
    path: Path,
    read: Callable[[Path], Value],
    say: Callable[[str], object],
    find: Callable[[Path], Path] = find_model,
) -> Value:
    """Return what is read of the checkpoint that a path stands for.

    Where that is a run's newest one, and the run deletes it meanwhile, the next one is read, a few times at most.
    say: is told of it, on one line. find: finds the checkpoint. Raises UserError as `find` and `read` do.
    """
    gone: GoneCheckpoint | None = None
    for left in reversed(range(MOST_TRIES)):
        checkpoint = find(path)
        if gone is not None:
            say(f"checkpoint {checkpoint} is taken: its run has deleted the one before it meanwhile")
        try:
            return read(checkpoint)
        except GoneCheckpoint as failure:
            if checkpoint == path or left == 0:
                raise
            gone = failure
    raise AssertionError("the last try returns or raises")


def or_a_file(folder: Path) -> str:
    """Return the end of a rule for a folder that is no checkpoint: name a file of weights in it, where there is one.

    Or the folder of a download, where the path may be a name of Hugging Face's hub. Empty for any other path, and for a
    folder of a run's step, whose files are parts of a checkpoint.
    """
    if not folder.exists() and _HUB_NAME.fullmatch(str(folder)) and not folder.parent.exists():
        return f", or, of a name of Hugging Face's hub, the folder of a download (hf download {folder} --local-dir DIR)"
    if not folder.is_dir() or step_of(folder) >= 0:
        return ""
    if snapshots := sorted(folder.glob("snapshots/*/")):  # in the cache of Hugging Face's library
        return f", or {snapshots[-1]}"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    return f", or a file in it, such as {files[0]}" if files else ""


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
    if path.is_dir():
        return _open_folder(path, activation)
    if opener := _opener_of(path):
        return opener(path.parent, activation, path.name)
    content = _content(path)
    known = Known(activation=activation)
    if models_held(content):
        return cosmos_model(path, content, which, known)
    return openclip_model(path, content, known)


def first_model(path: Path) -> Which:
    """Return the model of a public checkpoint that `open_public` finds: the teacher where a COSMOS file has no student.

    Raises UserError where the path cannot be read.
    """
    if path.is_dir() or _opener_of(path) is not None:
        return "student"
    return next(iter(models_held(_content(path))), "student")


def _content(file: Path) -> Mapping[Any, Any]:
    content = open_tensors(file)
    if not isinstance(content, Mapping):
        raise refusal(file, f"found {with_article(type(content).__name__)}, not a dict of tensors")
    return content


def _opener_of(file: Path) -> Callable[[Path, Activation | None, str], StoredWeights] | None:
    """Return what opens a file of weights with the config in its folder, by the file's name; None without a config."""
    if file.name in OPENCLIP_WEIGHTS and (file.parent / OPENCLIP_CONFIG).is_file():
        return open_openclip_folder
    return open_hf_folder if file.name in HF_WEIGHTS and (file.parent / HF_CONFIG).is_file() else None


def _open_folder(folder: Path, activation: Activation | None) -> StoredWeights:
    # A published folder may have both configs, with the weights of one of them.
    if (folder / OPENCLIP_CONFIG).is_file() and (openclip_weights(folder) or not (folder / HF_CONFIG).is_file()):
        return open_openclip_folder(folder, activation)
    if (folder / HF_CONFIG).is_file():
        return open_hf_folder(folder, activation)
    if (folder / ADAPTER).is_file():
        raise refusal(folder, f"found a LoRA ({ADAPTER}), which changes a model and is none: merge it into its model")
    raise refusal(folder, "found a folder in which nothing is known")
