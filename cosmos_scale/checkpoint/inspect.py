"""What is in a checkpoint, and which of its files are broken; for people and programs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Size

from cosmos_scale.checkpoint.files import BrokenCheckpoint, TensorFile
from cosmos_scale.checkpoint.interchange.names import HEAD_PREFIXES
from cosmos_scale.checkpoint.interchange.reading import or_a_file
from cosmos_scale.checkpoint.state import KINDS, MANIFEST, Manifest, read_manifest, saved_folders, step_of, such_as_runs
from cosmos_scale.errors import UserError
from cosmos_scale.files import whole_path
from cosmos_scale.words import counted

# A parameter belongs to the first part here that has a prefix of its name. So both towers' poolers are heads.
PARTS = {
    "heads": HEAD_PREFIXES,
    "log-scales": ("logit_scale", "distill_logit_scale"),
    "image tower": ("visual.",),
    "text tower": ("",),
}
SHOWN = ("image tower", "text tower", "heads", "log-scales")
KIND_NAMES = dict(zip(KINDS, ("weights", "moment 1", "moment 2", "EMA"), strict=True))
LOOKED_AT = "looked at: presence, sizes and headers of the files (--verify reads every byte)"


class FileReport(NamedTuple):
    """A file of a checkpoint, and in one line what is wrong with it, if anything."""

    name: str
    size: int
    error: str | None


@dataclass(frozen=True)
class Inspection:
    """What was found out about one checkpoint. manifest: None where it cannot be read; `errors` says why.

    verified: whether every byte was read; otherwise the files' presence, sizes and headers were looked at.
    """

    folder: Path
    manifest: Manifest | None
    files: tuple[FileReport, ...]
    errors: tuple[str, ...]
    verified: bool

    @property
    def whole(self) -> bool:
        """Whether nothing wrong was found with the checkpoint."""
        return not self.errors

    @property
    def size(self) -> int:
        """Bytes of the checkpoint's tensor files."""
        return sum(file.size for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """Return the same as plain data, for JSON."""
        known: dict[str, Any] = {}
        if self.manifest is not None:
            state = self.manifest.state
            known = {
                key: getattr(state, key)
                for key in ("step", "samples", "updates", "world_size", "lost_shards", "origin")
            }
            known |= {"epoch": epoch(self.manifest), "written": self.manifest.written, "data": state.data}
            known |= {"name": state.config.get("name"), "precision": state.config.get("precision")}
            known |= {"zero": state.config.get("zero"), "versions": self.manifest.versions}
            known |= {"parameters": parts(self.manifest)}
        files = [file._asdict() for file in self.files]
        end = {"bytes": self.size, "whole": self.whole, "verified": self.verified, "errors": list(self.errors)}
        return {"checkpoint": str(self.folder), **known, "files": files, **end}


def find_folders(folder: Path) -> list[Path]:
    """Return a folder that is a checkpoint, or all checkpoints of a run's folder, oldest first.

    Raises UserError where there is none.
    """
    if (folder / MANIFEST).exists() or (step_of(folder) >= 0 and folder.is_dir()):
        return [folder]
    found = saved_folders(folder) or saved_folders(folder / "checkpoints")
    if not found:
        rule = f"name a step-* folder, or a run with one{or_a_file(folder)}{such_as_runs(folder)}"
        raise UserError(f"{whole_path(folder)}: no checkpoint; rule: {rule}")
    return found


def total_size(folders: list[Path]) -> int:
    """Return how many bytes are read when these checkpoints are verified."""
    size = 0
    for folder in folders:
        with suppress(OSError):  # of a checkpoint that its run deletes meanwhile
            size += sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    return size


def inspect(folder: Path, *, verify: bool, advance: Callable[[int], None] = lambda count: None) -> Inspection:
    """Look at a checkpoint. verify: read every byte. advance: takes the bytes of each checked chunk."""
    try:
        manifest = read_manifest(folder)
    except UserError as failure:  # broken, or of another version
        return Inspection(folder, None, (), (str(failure),), verify)
    files = tuple(_check_files(folder, manifest, verify, advance))
    errors = [file.error for file in files if file.error is not None]
    errors += [
        f"checkpoint {folder}: {name} lacks elements; rule: none may lack"
        for name, entry in manifest.parameters.items()
        if sum(count for _, _, count in entry["pieces"]) < Size(entry["shape"]).numel()
    ]
    return Inspection(folder, manifest, files, tuple(errors), verify)


def _check_files(
    folder: Path, manifest: Manifest, verify: bool, advance: Callable[[int], None]
) -> Iterator[FileReport]:
    for record in manifest.files.values():
        error = None
        try:
            file = TensorFile(folder, record)
            try:
                if verify:
                    file.verify(advance)
            finally:
                file.close()
        except BrokenCheckpoint as failure:
            error = str(failure)
        yield FileReport(record.name, record.size, error)


def epoch(manifest: Manifest) -> float | None:
    """Return the passes over the data so far; None where the checkpoint does not say how long a pass is."""
    steps = manifest.state.steps_per_epoch
    return None if steps is None else manifest.state.step / steps


def parts(manifest: Manifest) -> dict[str, int]:
    """Return how many parameters each part of a checkpoint's model has."""
    return count_parts({name: entry["shape"] for name, entry in manifest.parameters.items()})


def count_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return how many parameters each part of a model has, from the shapes of its tensors by their names."""
    counts = dict.fromkeys(SHOWN, 0)
    for name, shape in shapes.items():
        counts[next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))] += Size(shape).numel()
    return counts


def show(found: Inspection, console: Console) -> None:
    """Print what one checkpoint holds."""
    console.print(f"{found.folder}: {verdict(found)}", style="bold", highlight=False, soft_wrap=True)
    if found.manifest is not None:
        console.print(_facts(found.manifest))
        console.print(_parameters(found.manifest))
        console.print(_files(found))
        if not found.verified:
            console.print(LOOKED_AT, soft_wrap=True)
    _say_what_is_wrong([found], console)


def show_all(found: list[Inspection], console: Console) -> None:
    """Print a line for each checkpoint of a run."""
    console.print(str(found[0].folder.parent), style="bold", highlight=False, soft_wrap=True)
    table = Table("checkpoint", "written (UTC)", "bytes", "ranks", "ZeRO", "")
    table.columns[2].justify = "right"
    for one in found:
        cells = ["", "", "", ""]
        if one.manifest is not None:
            state = one.manifest.state
            stage = str(state.config["zero"]["stage"])
            cells = [_time(one.manifest), f"{one.size:,}", str(state.world_size), stage]
        table.add_row(one.folder.name, *cells, "whole" if one.whole else "BROKEN")
    console.print(table)
    console.print("all bytes were read" if found[0].verified else LOOKED_AT, soft_wrap=True)
    _say_what_is_wrong(found, console)
    root = found[0].folder.parent
    for pattern, what in (("step-*.tmp", "unfinished or being deleted"), ("step-*.broken*", "broken and set aside")):
        if names := sorted(folder.name for folder in root.glob(pattern)):
            console.print(f"not counted, {what}: {', '.join(names)}", highlight=False, soft_wrap=True)


def verdict(found: Inspection) -> str:
    """Return in words whether a checkpoint is whole, as far as it was read."""
    if not found.whole:
        return "BROKEN"
    return "whole, every checksum is right" if found.verified else "whole"


def _say_what_is_wrong(found: list[Inspection], console: Console) -> None:
    for error in (error for one in found for error in one.errors):
        console.print(error, style="red", highlight=False, soft_wrap=True)


def _facts(manifest: Manifest) -> Table:
    state, config = manifest.state, manifest.state.config
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    done = epoch(manifest)
    zero = config["zero"]
    stage = f"ZeRO {zero['stage']}{', offloaded' if zero['offload'] else ''}"
    lost = ", ".join(f"{name} (from step {step:,} on)" for name, step in state.lost_shards.items())
    rows = {
        "run": config["name"],
        "written": f"{_time(manifest)} UTC",
        "step": f"{state.step:,}",
        "samples": f"{state.samples:,}",
        "updates": f"{state.updates:,}",
        "epoch": "not known" if done is None else f"{done:.3f} ({counted(state.steps_per_epoch or 0, 'step')} each)",
        "saved by": f"{counted(state.world_size, 'rank')}, {stage}",
        "precision": f"computed in {config['precision']}, saved in fp32",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "data digest": state.data,
        "lost shards": lost or "none",
        **({"first weights": state.origin} if state.origin else {}),
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _parameters(manifest: Manifest) -> Table:
    # Without lines between the columns the table has room on a terminal of 80 columns.
    table = Table("part", "parameters", *KIND_NAMES.values(), "together", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    counts = parts(manifest)
    for part, count in [*counts.items(), ("all", sum(counts.values()))]:
        table.add_row(part, f"{count:,}", *[_size(4 * count)] * len(KINDS), _size(4 * len(KINDS) * count))
    return table


def _files(found: Inspection) -> Table:
    table = Table("file", "bytes", "")
    table.columns[1].justify = "right"
    for file in found.files:
        table.add_row(file.name, f"{file.size:,}", "BROKEN" if file.error else "ok")
    return table


def _size(count: int) -> str:
    for unit, divisor in (("GB", 10**9), ("MB", 10**6)):
        if count >= divisor:
            return f"{count / divisor:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _time(manifest: Manifest) -> str:
    return manifest.written.replace("T", " ").removesuffix("+00:00")
