"""Checkpoints: a folder of safetensors fragments, one file a rank, and a manifest that is written last.

A folder counts as a checkpoint only with its manifest. The folder is made under a temporary name and renamed when it is
whole. The manifest says where each element of each parameter lies, so that ranks of any number, at any stage of ZeRO,
can read a checkpoint of any other number and stage. The manifest also holds a checksum for each megabyte of the files,
and a checksum of itself.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cosmos_scale import __version__
from cosmos_scale.checkpoint.files import BrokenCheckpoint, FileRecord, TensorFile, raise_if_gone
from cosmos_scale.config import RunConfig
from cosmos_scale.config.evaluation import in_new_form
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, sync_folder
from cosmos_scale.fragments import Fragment
from cosmos_scale.words import counted

FORMAT = 2
MANIFEST = "manifest.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")  # of a fragment's tensors, in the order of the files
SAVED_AS = {"student": "weight", "teacher": "ema"}
MOST_SHOWN = 10  # runs in a message
MOST_TRIES = 5  # to read the newest checkpoint of a run that goes on, and deletes its old ones


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors.

    step: steps done. samples: samples consumed over all ranks. updates: AdamW updates done. world_size: of the run that
    saved. loss_scaler: numbers of fp16's scaler. data: digest of the index that gives the samples' order.
    config: the run's configuration as plain data. lost_shards: the shards given up, each with the step from which on
    its samples are replaced. steps_per_epoch: of the data at this global batch, None where that was not saved.
    marks: digest of the shards' marks, empty where there is none. origin: where the run's first weights came from and
    what was done to them, in words; empty where they were drawn, or that was not saved. substituted: samples over all
    ranks that were replaced in the steps since the last record of metrics.jsonl, for the next one. skipped: steps that
    changed nothing, None where that was not saved; fp16's loss scaler drops further updates. galleries: what each
    evaluator reads, by its name, in words with digests.
    """

    step: int
    samples: int
    updates: int
    world_size: int
    loss_scaler: dict[str, Any]
    data: str
    config: dict[str, Any]
    lost_shards: dict[str, int] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    marks: str = ""
    origin: str = ""
    substituted: int = 0
    skipped: int | None = None
    galleries: dict[str, str] = field(default_factory=dict)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing; of older checkpoints all without an update."""
        return self.step - self.updates if self.skipped is None else self.skipped


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder, -1 for any other name."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return -1 if match is None else int(match[1])


def saved_folders(root: Path) -> list[Path]:
    """Return the folders with a checkpoint's final name, oldest first; each was whole when it got this name.

    Raises UserError where the folder is there and cannot be listed: it may hold checkpoints.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as failure:
        raise UserError(f"{root}: cannot be listed: {failure.strerror}") from failure
    return sorted((root / name for name in names if step_of(root / name) >= 0), key=step_of)


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints under a folder, oldest first: folders with a manifest, which is not read here."""
    return [folder for folder in saved_folders(root) if (folder / MANIFEST).exists()]


def newest(root: Path) -> Path | None:
    """Return the checkpoint of the highest step under a folder, None where there is no checkpoint."""
    for _ in range(MOST_TRIES):
        named = saved_folders(root)
        found = [folder for folder in named if (folder / MANIFEST).exists()]
        # A run may save its next checkpoint and delete this one while the list is gone through.
        if found or all(map(os.path.lexists, named)):
            break
    return found[-1] if found else None


def find_checkpoint(folder: Path) -> Path:
    """Return the checkpoint that a folder stands for: itself, or the newest in it or in its folder `checkpoints`.

    Raises UserError where there is none.
    """
    if (folder / MANIFEST).exists():
        return folder
    found = newest(folder) or newest(folder / "checkpoints")
    if found is None:
        rule = f"name a step-* folder, or a run with one{such_as_runs(folder)}"
        raise UserError(f"checkpoint {folder.absolute()}: none there; rule: {rule}")
    return found


def such_as_runs(folder: Path) -> str:
    """Return the end of a rule for a folder that is no run: the runs with checkpoints in it; empty where it has none.

    Runs that cannot be looked into are left out.
    """
    shown = []
    with suppress(OSError):
        for run in sorted(folder.iterdir()):
            with suppress(OSError, UserError):
                if found := checkpoints(run / "checkpoints"):
                    shown.append(f"{run.name} ({counted(len(found), 'checkpoint')}, the newest {found[-1].name})")
    more = f" and {counted(len(shown) - MOST_SHOWN, 'more run')}" if len(shown) > MOST_SHOWN else ""
    return f": {', '.join(shown[:MOST_SHOWN])}{more}" if shown else ""


class Manifest(NamedTuple):
    """What a checkpoint holds beside its tensors.

    written: when, in UTC and ISO 8601. parameters: by name, {"shape": [...], "pieces": [[file, first element,
    elements], ...]}.
    """

    state: RunState
    written: str
    versions: dict[str, str]
    parameters: dict[str, Any]
    files: dict[str, FileRecord]


def load_checkpoint(folder: Path, fragments: Iterable[Fragment]) -> RunState:
    """Fill a rank's fragments from a checkpoint of any world size and stage, and return the run's state.

    Only the chunks that hold the fragments are read. Raises BrokenCheckpoint where the files are not what was written,
    UserError where the checkpoint holds other parameters or shapes.
    """
    manifest = read_manifest(folder)
    with FragmentReader(folder, manifest) as reader:
        reader.fill(fragments)
    return manifest.state


def read_state(folder: Path) -> RunState:
    """Return the run state of a checkpoint; raises UserError where the folder is no readable checkpoint."""
    return read_manifest(folder).state


def read_run_config(folder: Path) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint; raises UserError where it cannot be read."""
    try:
        return RunConfig.model_validate(in_new_form(read_state(folder).config))
    except ValidationError as failure:
        first = failure.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"checkpoint {folder}: its run's configuration is not of this version: {key}: {first['msg']}"
        ) from failure


def load_weights(folder: Path, which: Literal["student", "teacher"]) -> dict[str, Tensor]:
    """Return a model's whole float32 weights by state-dict name; log-scales are [], as in public checkpoints."""
    manifest = read_manifest(folder)
    weights = {}
    with FragmentReader(folder, manifest) as reader:
        for name, entry in manifest.parameters.items():
            flat = torch.empty(torch.Size(entry["shape"]).numel())
            reader.read(name, SAVED_AS[which], 0, flat)
            weights[name] = flat.view([] if name.endswith("logit_scale") else entry["shape"])
    return weights


def load_model(model: nn.Module, folder: Path, which: Literal["student", "teacher"]) -> None:
    """Fill a model with a checkpoint's weights; raises UserError where they do not fit the model."""
    try:
        model.load_state_dict(load_weights(folder, which))
    except RuntimeError as failure:
        # torch lists all keys and shapes that differ, a line for each kind; the first line says enough.
        first = str(failure).splitlines()[1].strip()
        raise UserError(f"checkpoint {folder}: does not fit the model: {first[:200]}") from failure


class _Slice(NamedTuple):
    """Elements of a tensor of one file, from `start` on, that fill `out`."""

    file: str
    key: str
    start: int
    out: Tensor


class FragmentReader:
    """Reads parameters out of the files of a checkpoint; a context that closes the files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> "FragmentReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    @torch.no_grad()
    def fill(self, fragments: Iterable[Fragment]) -> None:
        """Fill fragments; raises UserError where the checkpoint holds other parameters or shapes."""
        slices: list[_Slice] = []
        for fragment in fragments:
            self.check_shape(fragment.name, list(fragment.shape))
            for kind in KINDS:
                slices += self._slices(fragment.name, kind, fragment.start, fragment.tensors()[kind])
        # In the order of the files, so that each chunk is read once: another layout has fragments in another order.
        for piece in sorted(
            slices, key=lambda piece: (piece.file, self.file(piece.file).place(piece.key), piece.start)
        ):
            self.file(piece.file).read(piece.key, piece.start, piece.out)

    def check_shape(self, name: str, shape: list[int]) -> None:
        """Raise UserError where the checkpoint lacks a parameter, or has it in another shape."""
        if name not in self.manifest.parameters:
            raise UserError(f"checkpoint {self.folder}: has no parameter {name!r}; rule: the model must be the same")
        saved = self.manifest.parameters[name]["shape"]
        if saved != shape:
            raise UserError(
                f"checkpoint {self.folder}: {name} has shape {saved}, the model {shape}; rule: they must be equal"
            )

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill `out`, [n] float32, with a parameter's elements from start on; raises BrokenCheckpoint."""
        for piece in self._slices(name, kind, start, out):
            self.file(piece.file).read(piece.key, piece.start, piece.out)

    def _slices(self, name: str, kind: str, start: int, out: Tensor) -> "list[_Slice]":
        """Find in which files a parameter's elements lie; raises BrokenCheckpoint where some are in none."""
        end, slices = start + out.numel(), []
        for file, piece_start, count in self.manifest.parameters[name]["pieces"]:
            low, high = max(start, piece_start), min(end, piece_start + count)
            if low < high:
                slices.append(_Slice(file, f"{name}|{kind}", low - piece_start, out[low - start : high - start]))
        filled = sum(piece.out.numel() for piece in slices)
        if filled != out.numel():
            raise BrokenCheckpoint(
                f"checkpoint {self.folder}: {name} has {filled} of {out.numel()} elements; rule: none may lack"
            )
        return slices

    def file(self, name: str) -> TensorFile:
        """Return one of the checkpoint's files, opened when it is first asked for; raises BrokenCheckpoint."""
        if name not in self._open:
            if name not in self.manifest.files:
                raise BrokenCheckpoint(f"checkpoint {self.folder}: {MANIFEST} does not know its file {name}")
            self._open[name] = TensorFile(self.folder, self.manifest.files[name])
        return self._open[name]


def write_manifest(
    folder: Path, state: RunState, ranks: Sequence[tuple[FileRecord, Sequence[tuple[str, list[int], int, int]]]]
) -> None:
    """Write the manifest, which makes a folder a checkpoint, and wait for the disk; raises OSError.

    ranks: for each file its record, and (name, shape, first element, elements) of the pieces in it.
    """
    parameters: dict[str, Any] = {}
    for record, pieces in ranks:
        for name, shape, start, count in pieces:
            entry = parameters.setdefault(name, {"shape": shape, "pieces": []})
            entry["pieces"].append([record.name, start, count])
    content = {
        "format": FORMAT,
        "versions": {"cosmos_scale": __version__, "torch": torch.__version__},
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "state": asdict(state),
        "parameters": parameters,
        "files": [record._asdict() for record, _ in ranks],
    }
    content["checksum"] = manifest_checksum(content)
    with open(folder / MANIFEST, "w", opener=regular_only) as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def manifest_checksum(content: dict[str, Any]) -> int:
    """Return the CRC-32 of a manifest's content without its checksum."""
    return zlib.crc32(json.dumps({key: value for key, value in content.items() if key != "checksum"}).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises BrokenCheckpoint where it is missing or damaged, UserError where another version wrote it.
    """
    path = folder / MANIFEST
    try:
        content: dict[str, Any] = load_json(read_regular(path))
        # The checksum comes first: a damaged format number would look like another version's. Format 1 had no checksum.
        if ("checksum" in content or content["format"] == FORMAT) and content["checksum"] != manifest_checksum(content):
            raise ValueError("its checksum is another")
        if isinstance(content["format"], str):  # `data build` leaves a file of this name too
            raise UserError(
                f"checkpoint {folder}: holds {content['format']!r}, no checkpoint; rule: name a step-* folder of a run"
            )
        if content["format"] != FORMAT:
            raise UserError(
                f"checkpoint {folder}: format {content['format']}; rule: this version reads format {FORMAT}"
            )
        files = {file["name"]: FileRecord(**file) for file in content["files"]}
        # The checkpoint is sound: passed over as a broken one, its steps would be lost.
        if unknown := sorted(content["state"].keys() - {known.name for known in fields(RunState)}):
            raise UserError(
                f"checkpoint {folder}: holds {', '.join(unknown)}, which this version does not know; rule: go on with "
                f"the version that wrote it, cosmos-scale {content['versions']['cosmos_scale']}"
            )
        state = RunState(**content["state"])
        if step_of(folder) not in (-1, state.step):
            raise ValueError(f"it is of step {state.step}, not of the step in the folder's name")
        return Manifest(state, content["written"], content["versions"], content["parameters"], files)
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise_if_gone(folder, failure)
        raise BrokenCheckpoint(
            f"checkpoint {folder}: no readable {MANIFEST} ({failure}); rule: name a step-* folder of a run"
        ) from failure


def manifest_digest(folder: Path) -> str:
    """Return a digest of a checkpoint's manifest, which holds the checksums of all files: equal copies have one digest.

    Raises BrokenCheckpoint where the manifest cannot be read.
    """
    try:
        return hashlib.sha256(read_regular(folder / MANIFEST)).hexdigest()[:16]
    except OSError as failure:
        raise_if_gone(folder, failure)
        raise BrokenCheckpoint(f"checkpoint {folder}: {MANIFEST} cannot be read: {failure.strerror}") from failure


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise BrokenCheckpoint where a file is missing, or its size or header is wrong; no tensor is read."""
    for record in manifest.files.values():
        TensorFile(folder, record).close()
