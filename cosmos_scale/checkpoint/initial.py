"""The weights that a new run starts from, by the keys `init_from` and `init_heads`: ours, or another program's.

They are made to fit the run's model: position tables of another length are resized, and heads may be left to be drawn.
What else differs is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cosmos_scale.checkpoint.files import GoneCheckpoint
from cosmos_scale.checkpoint.interchange.names import Shape, is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.reading import first_model, is_public, of_newest, open_public
from cosmos_scale.checkpoint.interchange.resize import can_resize, resize_tables, resizing
from cosmos_scale.checkpoint.interchange.sizes import UNTOLD
from cosmos_scale.checkpoint.interchange.weights import Which, read_stored, shape_of
from cosmos_scale.checkpoint.state import (
    check_files,
    load_weights,
    manifest_digest,
    read_manifest,
    read_run_config,
)
from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import whole_path

OF_HEADS = "pooler_heads"  # the key of UNTOLD that matters where the heads are taken


class _Source(Protocol):
    """A checkpoint whose names and shapes are known. told: the keys of UNTOLD that it says by other means.

    digests: what the digest is made of, for people.
    """

    path: Path
    kind: str
    model: ModelConfig
    shapes: dict[Which, dict[str, Shape]]
    told: frozenset[str]
    digests: str

    def read(self, which: Which) -> dict[str, Tensor]: ...

    def digest(self) -> str: ...


class _Ours:
    """A checkpoint of a run."""

    told = frozenset(UNTOLD)
    digests = "manifests"

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(self.path)
        check_files(self.path, manifest)
        self.kind = f"checkpoint of step {manifest.state.step:,}"
        self.model = read_run_config(self.path).model
        saved = manifest.parameters.items()
        shapes: dict[str, Shape] = {
            name: () if name.endswith("logit_scale") else tuple(entry["shape"]) for name, entry in saved
        }
        self.shapes: dict[Which, dict[str, Shape]] = {"student": shapes, "teacher": shapes}
        self._digest = manifest_digest(self.path)  # read now: the run may delete the checkpoint

    def read(self, which: Which) -> dict[str, Tensor]:
        return load_weights(self.path, which)

    def digest(self) -> str:
        return self._digest


class _Public:
    """A checkpoint of another program: of a student and a teacher, or of one model, which both models begin as."""

    digests = "weights"

    def __init__(self, path: Path) -> None:
        self.path, self._digests = path, dict[Which, str]()
        self._first = first_model(path)
        stored = open_public(path, self._first)
        self.kind, self.model, self.told = stored.kind, stored.model, stored.told
        self.shapes: dict[Which, dict[str, Shape]] = {}
        for which in stored.models or (self._first,):
            rows = open_public(path, which).rows
            self.shapes[which] = {name: shape_of(tensors) for name, tensors in rows.items()}

    def read(self, which: Which) -> dict[str, Tensor]:
        which = which if which in self.shapes else self._first
        weights = read_stored(open_public(self.path, which), self.path)
        self._digests[which] = weights.digest
        return weights.tensors

    def digest(self) -> str:
        for which in self.shapes:
            if which not in self._digests:
                self.read(which)
        return " ".join(self._digests[which] for which in self.shapes)


class InitialWeights:
    """The weights of a checkpoint that fit the model of a new run. They are read when they are asked for.

    has_heads: whether they have the heads; else these are to be drawn. notes: what is done to them, and what of the
    config nothing in the checkpoint tells, in words.
    """

    def __init__(self, source: _Source, config: RunConfig) -> None:
        self._source, self._wanted = source, tensor_shapes(config.model)
        there = any(map(is_of_heads, next(iter(source.shapes.values()))))
        if not there and config.init_heads == "from":
            found = f"{source.kind} without the cross-modality heads"
            raise UserError(f"checkpoint {whole_path(source.path)}: found {found}; rule: init_heads=new draws them")
        self.has_heads = config.init_heads == "from"
        if not self.has_heads:
            self._wanted = {name: shape for name, shape in self._wanted.items() if not is_of_heads(name)}
        student, *teacher = [self._fit(shapes) for shapes in source.shapes.values()]
        self.notes = student if teacher else ["student and teacher are the same model", *student]
        if not self.has_heads:
            self.notes.append(f"heads and distill_logit_scale drawn from seed {config.seed}")
        assumed = [_agreed(source, config.model, key) for key in UNTOLD if self.has_heads or key != OF_HEADS]
        if any(assumed):
            said = ", ".join(text for text in assumed if text)
            self.notes.append(f"by the config, since the file does not tell: {said}")

    @property
    def path(self) -> Path:
        """The checkpoint's file or folder."""
        return self._source.path

    @property
    def kind(self) -> str:
        """Of what program the checkpoint is, for people."""
        return self._source.kind

    @property
    def digests(self) -> str:
        """What `digest` is made of: of the manifests, or of the weights."""
        return self._source.digests

    @property
    def tensors(self) -> int:
        """How many tensors of a model are taken from the checkpoint."""
        return len(self._wanted)

    def digest(self) -> str:
        """Return what stands for these weights; those of another program are read for it, once.

        Raises UserError where they are damaged or not finite.
        """
        with _named():
            return self._source.digest()

    def read(self, which: Which) -> dict[str, Tensor]:
        """Return a model's float32 tensors by state-dict name, in the shapes of the run's model, without untaken heads.

        Raises UserError where they are damaged or not finite, GoneCheckpoint where their run has deleted them since.
        """
        with _named():
            tensors = self._source.read(which)
        return resize_tables({name: tensors[name] for name in self._wanted}, self._wanted)

    def describe(self) -> str:
        """Return where these weights come from and what is done to them, on one line."""
        return "; ".join([f"{whole_path(self.path)}: {self.kind} ({self.digest()})", *self.notes])

    def _fit(self, shapes: dict[str, Shape]) -> list[str]:
        """Say which tables are resized; raises UserError where any other tensor has another shape, or lacks."""
        found = {name: shape for name, shape in shapes.items() if self.has_heads or not is_of_heads(name)}
        said = []
        for name in (*self._wanted, *(name for name in found if name not in self._wanted)):
            here, there = self._wanted.get(name), found.get(name)
            if here == there:
                continue
            if here is None or there is None or not can_resize(name, there, here):
                shown = [list(shape) if shape is not None else "none" for shape in (there, here)]
                raise UserError(
                    f"checkpoint {whole_path(self.path)}: does not fit the model: size mismatch of {name}: "
                    f"{shown[0]} there, {shown[1]} in the model; rule: the keys of model say the checkpoint's sizes, "
                    "but for vision.image_size and text.context_length"
                )
            said.append(resizing(name, there, here))
        return said


def open_initial(config: RunConfig) -> InitialWeights:
    """Look for the weights that `init_from` names, and whether they fit the model; no number is read.

    Of a run that deletes its newest checkpoint meanwhile the next one is taken. Raises UserError, with the name of the
    key, where there are none or they do not fit.
    """
    assert config.init_from is not None
    with _named():
        if is_public(config.init_from):
            return InitialWeights(_Public(config.init_from), config)
        # `describe` names the checkpoint, so nothing is said of another one that is gone.
        return of_newest(config.init_from, lambda found: InitialWeights(_Ours(found), config), lambda line: None)


def open_chosen(config: RunConfig, checkpoint: Path) -> InitialWeights:
    """Look for the weights of a checkpoint that another rank has found in the run that `init_from` names.

    Raises as `open_initial` does, and GoneCheckpoint where the run has deleted the checkpoint meanwhile.
    """
    with _named():
        return InitialWeights(_Ours(checkpoint), config)


def _agreed(source: _Source, model: ModelConfig, key: str) -> str:
    """Return the value of a key that nothing in the checkpoint tells, with its name; empty where it is told.

    Raises UserError where the checkpoint has another value. A mark of QuickGELU, such as OpenAI's name, counts as told:
    a model that runs with the wrong activation is worse, and nothing else shows it.
    """
    here, there = _value(model, key), _value(source.model, key)
    if here != there and (key in source.told or there == "quick_gelu"):
        how, way_out = "needs", ""
        if key not in source.told:
            how, way_out = "is, by its name or form, of those that need", ", or rename the file where that is wrong"
        raise UserError(
            f"checkpoint {whole_path(source.path)}: {how} model.{key} {there}, but the config says {here}; rule: set "
            f"model.{key}={there}{way_out}"
        )
    if key in source.told:
        return ""
    return f"{key} {here}" + (f" (most models of these sizes have {there})" if here != there else "")


def _value(model: ModelConfig, key: str) -> object:
    value: object = model
    for name in key.split("."):
        value = getattr(value, name)
    return value


@contextmanager
def _named() -> Iterator[None]:
    """Name the key in what is refused."""
    try:
        yield
    except GoneCheckpoint as gone:  # another one may be taken
        raise GoneCheckpoint(gone.folder, "init_from: ") from gone
    except UserError as failure:
        raise UserError(f"init_from: {failure}") from failure
