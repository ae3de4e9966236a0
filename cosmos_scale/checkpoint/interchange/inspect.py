"""What is in a public checkpoint; for people and programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cosmos_scale.checkpoint.inspect import count_parts
from cosmos_scale.checkpoint.interchange.reading import open_public
from cosmos_scale.checkpoint.interchange.weights import StoredWeights, Which, read_stored, shape_of
from cosmos_scale.config import ModelConfig
from cosmos_scale.errors import UserError

SHAPES_ONLY = "looked at: names and shapes of the tensors (--verify reads their numbers)"


@dataclass(frozen=True)
class PublicInspection:
    """What was found out about one public checkpoint.

    models: each by its name; a checkpoint with one model has it under "model". errors: of the numbers, where these were
    read; each on one line. verified: whether they were.
    """

    path: Path
    models: dict[str, StoredWeights]
    errors: tuple[str, ...]
    verified: bool

    @property
    def first(self) -> StoredWeights:
        """One of the models: all have one config."""
        return next(iter(self.models.values()))

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters each part of a model has."""
        return count_parts({name: shape_of(rows) for name, rows in self.first.rows.items()})

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the tensors in the file."""
        rows = [tensor for stored in self.models.values() for rows in stored.rows.values() for tensor in rows]
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in rows})

    @property
    def size(self) -> int:
        """Bytes of the file, or of all files of the folder."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def as_json(self) -> dict[str, Any]:
        """Return the same as plain data, for JSON."""
        first = self.first
        return {
            "checkpoint": str(self.path),
            "format": first.form,
            "kind": first.kind,
            "models": list(self.models),
            "heads": first.has_heads,
            "guessed": list(first.guessed),
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "config": first.model.model_dump(mode="json"),
            "bytes": self.size,
            "whole": not self.errors,
            "verified": self.verified,
            "errors": list(self.errors),
        }


def inspect_public(path: Path, *, verify: bool) -> PublicInspection:
    """Look at a public checkpoint, and with `verify` at its numbers; raises UserError where it is none that we read."""
    asked: tuple[Which, ...] = ("student", "teacher")
    try:
        first = open_public(path, "student")
    except UserError:
        first = open_public(path, "teacher")  # of a file without a student
    models: dict[str, StoredWeights] = {"model": first}
    if first.models is not None:
        models = {which: open_public(path, which) for which in asked if which in first.models}
    errors = []
    for name, stored in models.items() if verify else ():
        try:
            read_stored(stored, path)
        except UserError as failure:
            errors.append(str(failure) if len(models) == 1 else f"{name}: {failure}")
    return PublicInspection(path, models, tuple(errors), verify)


def show_public(found: PublicInspection, console: Console) -> None:
    """Print what a public checkpoint holds."""
    verdict = "" if not found.verified else ", BROKEN" if found.errors else ", every number is finite"
    console.print(f"{found.path}: {found.first.kind}{verdict}", style="bold", highlight=False, soft_wrap=True)
    console.print(_facts(found))
    parts = Table("part", "parameters", box=None, pad_edge=False)
    parts.columns[1].justify = "right"
    for part, count in [*found.parameters.items(), ("all", sum(found.parameters.values()))]:
        parts.add_row(part, f"{count:,}")
    console.print(parts)
    if not found.verified:
        console.print(SHAPES_ONLY, soft_wrap=True)
    for error in found.errors:
        console.print(error, style="red", highlight=False, soft_wrap=True)


def _facts(found: PublicInspection) -> Table:
    first = found.first
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    there, lacking = "there", "not there: no attention maps; a run that starts from it draws them (init_heads: new)"
    rows = {
        "format": first.form,
        "models": ", ".join(found.models),
        "heads": there if first.has_heads else lacking,
        **_towers(first.model),
        "assumed": "\n".join(first.guessed) or "nothing",
        "saved in": ", ".join(found.dtypes),
        "bytes": f"{found.size:,}",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _towers(model: ModelConfig) -> dict[str, str]:
    vision, text = model.vision, model.text
    heads = vision.width // vision.head_width
    return {
        "image tower": f"{vision.image_size} px in patches of {vision.patch_size}, width {vision.width}, "
        f"{vision.layers} layers, {heads} heads",
        "text tower": f"{text.context_length} tokens of {text.vocab_size:,}, width {text.width}, "
        f"{text.layers} layers, {text.heads} heads",
        "features": f"{model.embed_dim} numbers",
        "activation": model.activation,
    }
