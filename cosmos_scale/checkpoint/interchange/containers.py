"""Files of tensors of other programs, opened so that nothing in them is executed and no number is read before its use.

Two forms: safetensors, and what torch.save writes, which is a pickle. Of a pickle only tensors, plain values and the
scalars of numpy are accepted: an optimizer's learning rate is often such a scalar.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_scale.checkpoint.interchange.weights import refusal
from cosmos_scale.files import reason_of, regular_only

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file: fetch the file itself (git lfs pull)"),
    (b"<", "a page of HTML or XML, as a failed download leaves"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
)


def open_tensors(path: Path) -> Any:
    """Return what a file holds: a dict of tensors for safetensors, for a file of torch.save whatever was saved.

    Tensors of safetensors and of torch's zip files lie in the mapped file. Raises UserError, with what was found, where
    the file is of another kind, cut off or damaged, or holds more than tensors and plain values.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            begin = file.read(64)
    except OSError as error:
        raise refusal(path, f"cannot be read: {reason_of(error)}") from error
    if begin.startswith((ZIP, PICKLE)):
        return _open_torch(path, mapped=begin.startswith(ZIP))
    if begin[8:9] == b"{" or path.suffix == ".safetensors":
        return _open_safetensors(path)
    for beginning, found in _BEGINNINGS:
        if begin.lstrip().startswith(beginning):
            raise refusal(path, f"found {found}")
    raise refusal(path, "found an empty file" if not begin else "found neither a file of torch.save nor safetensors")


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise refusal(path, f"found safetensors that are cut off or damaged ({_first_line(error)})") from error


def _open_torch(path: Path, mapped: bool) -> Any:
    members = _members(path) if mapped else []
    if any(name.endswith("/constants.pkl") for name in members):
        raise refusal(
            path, "found a TorchScript program, as OpenAI published its weights: write its state_dict() with torch.save"
        )
    if members and not any(name.endswith("/data.pkl") for name in members):
        raise refusal(path, "found a zip file that torch.save did not write")
    try:
        with _four_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in another protocol: what is wrong with one is told below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise refusal(path, _refused_pickle(str(error))) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise refusal(path, f"found a file of torch.save that is cut off or damaged ({_first_line(error)})") from error


def _members(path: Path) -> list[str]:
    """Return the names in a zip file; none of one whose list of contents is damaged, of which torch.load will tell."""
    try:
        with open(path, "rb", opener=regular_only) as file, zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except Exception:  # a damaged list can raise anything
        return []


@contextmanager
def _four_globals() -> Iterator[None]:
    """Let a pickle name these globals beside torch's own, and no others that a library may have added."""
    scalar = np.float64(0).__reduce__()[0]  # the function that numpy's pickles name
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        # Numpy 1 wrote the function under another name than numpy 2.
        names: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        with torch.serialization.safe_globals([*names, np.dtype, np.dtypes.Float64DType]):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refused_pickle(said: str) -> str:
    """Return what was found in a pickle, from what torch says of it."""
    if match := re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", said):
        name = match[1] or match[2]
        return f"found a pickle that calls {name}, which was not executed: only tensors and plain values are read"
    reason = re.search(r"WeightsUnpickler error:\s*([^\n]+)", said)
    shown = _first_line(reason[1] if reason else said)
    return f"found a pickle that is not of torch.save, or is cut off or damaged ({shown})"


def _first_line(error: object) -> str:
    """Return the first sentence: the others of torch are advice that does not help here."""
    lines = re.split(r"\n|\. ", str(error).strip())
    return lines[0][:160].rstrip(" .") or type(error).__name__
