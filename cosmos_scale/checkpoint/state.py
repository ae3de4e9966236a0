"""Checkpoints: a folder of safetensors fragments, one file a rank, and a manifest that is written last.

A folder counts only with its manifest; it is made under a temporary name and renamed when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos_scale import __version__
from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.fragments import Fragment

FORMAT = 1
MANIFEST = "manifest.json"
SAVED_AS = {"student": "weight", "teacher": "ema"}


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors.

    step: steps done. samples: samples consumed over all ranks. updates: AdamW updates done. world_size: of the run that
    saved. loss_scaler: numbers of fp16's scaler. data: digest of the index that gives the samples' order.
    config: the run's configuration as plain data. lost_shards: the shards given up, each with the step from which on
    its samples are replaced.
    """

    step: int
    samples: int
    updates: int
    world_size: int
    loss_scaler: dict[str, Any]
    data: str
    config: dict[str, Any]
    lost_shards: dict[str, int] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints under a folder, oldest first."""
    return sorted(folder.parent for folder in root.glob(f"step-*/{MANIFEST}") if folder.parent.suffix != ".tmp")


def newest(root: Path) -> Path | None:
    """The whole checkpoint of the highest step under a folder, None where there is none."""
    found = checkpoints(root)
    return found[-1] if found else None


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that a folder means: itself, or the newest of a run's or of its checkpoints folder.

    Raises UserError where there is none.
    """
    if (folder / MANIFEST).exists():
        return folder
    found = newest(folder) or newest(folder / "checkpoints")
    if found is None:
        raise UserError(f"checkpoint {folder}: none there; rule: name a step-* folder, or a run with one")
    return found


def save_checkpoint(
    root: Path, fragments: Sequence[Fragment], state: RunState, group: dist.ProcessGroup, keep_last: int
) -> Path:
    """Write a checkpoint under root and delete all but it and the newest keep_last; collective over the CPU group.

    Raises UserError on every rank where one of them cannot write.
    """
    rank = dist.get_rank(group)
    final = root / checkpoint_name(state.step)
    temporary = final.with_suffix(".tmp")
    error = None
    if rank == 0:
        try:
            for abandoned in root.glob("step-*.tmp"):  # of runs that were killed while they saved
                shutil.rmtree(abandoned, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as failure:
            error = f"checkpoint {temporary}: {failure.strerror}"
    _raise_together(error, group)
    owned = [fragment for fragment in fragments if fragment.owned]
    file = f"fragments-{rank:05d}.safetensors"
    try:
        if owned:
            _write_fragments(temporary / file, owned)
    except (OSError, SafetensorError) as failure:
        error = f"checkpoint {temporary / file}: {failure} (rank {rank})"
    _raise_together(error, group)
    pieces: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(
        pieces, [(file, part.name, list(part.shape), part.start, part.weight.numel()) for part in owned], group=group
    )
    if rank == 0:
        try:
            _write_manifest(temporary, state, pieces)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync_folder(root)
            for old in checkpoints(root)[:-keep_last]:
                if old != final:  # a run that went back to an older checkpoint saves below the newest
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as failure:
            error = f"checkpoint {final}: {failure.strerror}"
    _raise_together(error, group)
    return final


def load_checkpoint(folder: Path, fragments: Iterable[Fragment]) -> RunState:
    """Fill a rank's fragments from a checkpoint, whatever world size and stage wrote it; reads only their bytes.

    Raises UserError where the folder is no checkpoint or holds other parameters or shapes.
    """
    manifest = _read_manifest(folder)
    with _Pieces(folder, manifest) as pieces:
        for fragment in fragments:
            pieces.check_shape(fragment.name, list(fragment.shape))
            for kind, tensor in fragment.tensors().items():
                with torch.no_grad():
                    pieces.read(fragment.name, kind, fragment.start, tensor)
    return RunState(**manifest["state"])


def read_state(folder: Path) -> RunState:
    """The run state of a checkpoint; raises UserError where the folder is none."""
    return RunState(**_read_manifest(folder)["state"])


def read_run_config(folder: Path) -> RunConfig:
    """The configuration of the run that wrote a checkpoint; raises UserError where this version cannot read it."""
    try:
        return RunConfig.model_validate(read_state(folder).config)
    except ValidationError as failure:
        first = failure.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"checkpoint {folder}: its run's configuration is not of this version: {key}: {first['msg']}"
        ) from failure


def load_weights(folder: Path, which: Literal["student", "teacher"]) -> dict[str, Tensor]:
    """Whole float32 weights of one model by state-dict name; log-scales have shape [], as in public checkpoints."""
    manifest = _read_manifest(folder)
    weights = {}
    with _Pieces(folder, manifest) as pieces:
        for name, entry in manifest["parameters"].items():
            flat = torch.empty(torch.Size(entry["shape"]).numel())
            pieces.read(name, SAVED_AS[which], 0, flat)
            weights[name] = flat.view([] if name.endswith("logit_scale") else entry["shape"])
    return weights


def load_model(model: nn.Module, folder: Path, which: Literal["student", "teacher"]) -> None:
    """Fill a model with the weights of one; raises UserError where they are not those of such a model."""
    try:
        model.load_state_dict(load_weights(folder, which))
    except RuntimeError as failure:
        # torch lists every key and shape, a line each kind; the first one says enough.
        first = str(failure).splitlines()[1].strip()
        raise UserError(f"checkpoint {folder}: does not fit the model: {first[:200]}") from failure


class _Pieces:
    """Open fragment files of one checkpoint."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.parameters: dict[str, Any] = manifest["parameters"]
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "_Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def check_shape(self, name: str, shape: list[int]) -> None:
        if name not in self.parameters:
            raise UserError(f"checkpoint {self.folder}: has no parameter {name!r}; rule: the model must be the same")
        saved = self.parameters[name]["shape"]
        if saved != shape:
            raise UserError(
                f"checkpoint {self.folder}: {name} has shape {saved}, the model {shape}; rule: they must be equal"
            )

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill out ([n]) with the parameter's elements start .. start + n."""
        end, filled = start + out.numel(), 0
        for file, piece_start, count in self.parameters[name]["pieces"]:
            low, high = max(start, piece_start), min(end, piece_start + count)
            if low < high:
                out[low - start : high - start] = self._stored(file, f"{name}|{kind}", low - piece_start, high - low)
                filled += high - low
        if filled != out.numel():
            raise UserError(
                f"checkpoint {self.folder}: {name} has {filled} of {out.numel()} elements; rule: none may lack"
            )

    def _stored(self, file: str, key: str, start: int, count: int) -> Tensor:
        """[count] elements of a stored tensor."""
        path = self.folder / file
        try:
            if file not in self.files:
                self.files[file] = safe_open(path, framework="pt")
            stored: Tensor = self.files[file].get_slice(key)[start : start + count]
        except (OSError, SafetensorError) as failure:
            reason = str(failure).splitlines()[0]
            raise UserError(f"checkpoint file {path}: {reason}; rule: it must be whole") from failure
        return stored


def _write_fragments(path: Path, fragments: Sequence[Fragment]) -> None:
    tensors = {
        f"{fragment.name}|{kind}": tensor.detach().cpu().contiguous()
        for fragment in fragments
        for kind, tensor in fragment.tensors().items()
    }
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_manifest(folder: Path, state: RunState, pieces: list[Any]) -> None:
    parameters: dict[str, Any] = {}
    for file, name, shape, start, count in (piece for rank_pieces in pieces for piece in rank_pieces):
        entry = parameters.setdefault(name, {"shape": shape, "pieces": []})
        entry["pieces"].append([file, start, count])
    manifest = {
        "format": FORMAT,
        "versions": {"cosmos_scale": __version__, "torch": torch.__version__},
        "state": asdict(state),
        "parameters": parameters,
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:  # what lacks here would be missed further on
            _ = RunState(**manifest["state"])
            _check_parameters(manifest["parameters"])
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise UserError(
            f"checkpoint {folder}: no readable {MANIFEST}; rule: name a step-* folder of a run"
        ) from failure
    if version != FORMAT:
        raise UserError(f"checkpoint {folder}: format {version}; rule: this version reads format {FORMAT}")
    return manifest


def _check_parameters(parameters: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError where a manifest's parameters are not of the form that is written."""
    if not isinstance(parameters, dict):
        raise TypeError("parameters are no object")
    for name, entry in parameters.items():
        numbers = [*entry["shape"], *(number for _, *numbers in entry["pieces"] for number in numbers)]
        files = [file for file, _, _ in entry["pieces"]]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"{name}: shape, starts and counts are numbers from 0")
        if not all(isinstance(file, str) for file in files):
            raise ValueError(f"{name}: files are named by strings")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_together(error: str | None, group: dist.ProcessGroup) -> None:
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    failed = next((text for text in errors if text is not None), None)
    if failed is not None:
        raise UserError(f"{failed}; the previous checkpoints are untouched")
