"""The house's rules, read from the sources: who may import whom, what only named places import, how long files get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MOST_LINES = 400

# What everything may build on: plain data, configuration, errors, files.
FOUNDATION = {"__version__", "batch", "config", "errors", "files", "fragments"}

# kernels <- model, loss, engine <- step <- train <- cli; data, checkpoint and evaluation know none of engine and train.
PARTS = {"kernels", "model", "loss", "engine", "data", "checkpoint", "evaluation", "step"} | FOUNDATION
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "kernels": set(),
    "model": {"kernels"} | FOUNDATION,
    "loss": {"kernels"} | FOUNDATION,
    "engine": {"kernels", "model", "loss", "checkpoint"} | FOUNDATION,
    "step": {"kernels", "model", "loss", "engine"} | FOUNDATION,
    "data": FOUNDATION | {"model"},
    "checkpoint": {"model"} | FOUNDATION,
    "evaluation": {"checkpoint", "data", "model"} | FOUNDATION,
    "profiling": {"checkpoint", "data", "evaluation", "model", "engine"} | FOUNDATION,
    "run": PARTS,
    "train": PARTS | {"run"},
    "cli": PARTS | {"run", "train", "profiling"},
    "demo": PARTS | {"run", "cli"},
    "testing": PARTS | {"run", "train", "cli"},
}
# Within data: the way of a sample, from where it lies to a batch; tools, prepare and scenes stand beside it.
MAY_IMPORT_IN_DATA = {
    "shards": {"samples", "decode", "tools", "training"},
    "samples": set[str](),
    "decode": {"samples", "training"},
    "training": {"shards", "samples", "decode"},
    "tools": {"shards", "samples", "decode", "training", "prepare"},
    "prepare": {"shards", "samples", "decode", "tools"},
    "scenes": {"shards", "samples", "decode", "tools"},
}

# Packages that only the named places import: whole packages of ours, or single modules.
ONLY_IN = {
    "torch.distributed": {
        "cosmos_scale/loss/gather.py",
        "cosmos_scale/engine/",
        "cosmos_scale/checkpoint/",
        "cosmos_scale/testing/",
    },
    "deepspeed": {"cosmos_scale/engine/"},
}
# Optional or slow packages: one module each, whichever it is.
ONE_PLACE = (
    "pyarrow",
    "wandb",
    "tensorboard",
    "torch.utils.tensorboard",
    "flash_attn",
    "xformers",
    "nvidia.dali",
    "apex",
)
NEVER_AT_IMPORT = ("flash_attn", "xformers", "nvidia.dali", "apex", "wandb")

SOURCES = sorted([*REPOSITORY.glob("cosmos_scale/**/*.py"), *REPOSITORY.glob("kernels/**/*.py")])


def source_id(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def own_sources() -> list[Path]:
    # cosmos_scale/kernels is a link to kernels/: each file counts once, under its real name.
    return [path for path in SOURCES if not source_id(path).startswith("cosmos_scale/kernels/")]


def imported(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports, those of `from a import b` as a.b.

    A last `if __name__ == "__main__":` does not count: there a module only hands its command line on.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if body and isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'":
        del body[-1]
    nodes = body if at_import_only else (node for statement in body for node in ast.walk(statement))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source_id(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def part_of_house(path: Path) -> str:
    """The package below cosmos_scale, or the module's own name where it lies directly in it."""
    parts = path.relative_to(REPOSITORY).parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if len(parts) > 2 else path.stem


def broken_rules(path: Path) -> list[str]:
    part = part_of_house(path)
    ours = {name.split(".")[1] for name in imported(path) if is_under(name, "cosmos_scale") and "." in name}
    ours.discard(part)
    broken = []
    if part in MAY_IMPORT:
        broken += [f"{part} may not import {other}" for other in sorted(ours - MAY_IMPORT[part])]
    if part not in ("cli", "demo") and "cli" in ours:
        broken.append("only demo imports cli")
    if part not in ("cli", "demo") and "train" in ours:
        broken.append("only cli and demo import train")
    for package, places in ONLY_IN.items():
        names = {name for name in imported(path) if is_under(name, package)}
        names.discard("torch.distributed.ProcessGroup")  # a type in signatures calls nothing
        if names and not source_id(path).startswith(tuple(places)):
            broken.append(f"only {', '.join(sorted(places))} import {package}")
    broken += [
        f"imports {name} at import time, which is optional or slow"
        for name in imported(path, at_import_only=True)
        if any(is_under(name, package) for package in NEVER_AT_IMPORT)
    ]
    return broken


@pytest.mark.parametrize("path", own_sources(), ids=source_id)
def test_imports_follow_the_house(path: Path) -> None:
    assert broken_rules(path) == []


@pytest.mark.parametrize("package", ONE_PLACE)
def test_optional_packages_have_one_place(package: str) -> None:
    places = [source_id(path) for path in own_sources() if any(is_under(name, package) for name in imported(path))]
    assert len(places) <= 1, places


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("kernels/planted.py", "from cosmos_scale.batch import Batch", "kernels may not import batch"),
        ("cosmos_scale/model/planted.py", "import cosmos_scale.engine.student", "model may not import engine"),
        ("cosmos_scale/data/planted.py", "def f():\n    from cosmos_scale import train", "data may not import train"),
        ("cosmos_scale/model/planted.py", "import torch.distributed as dist", "torch.distributed"),
        ("cosmos_scale/train.py", "from torch import distributed", "torch.distributed"),
        ("cosmos_scale/step.py", "import deepspeed", "deepspeed"),
        ("cosmos_scale/train.py", "from cosmos_scale.cli.main import main", "only demo imports cli"),
        ("cosmos_scale/run/metrics.py", "import wandb", "at import time"),
    ],
)
def test_planted_imports_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, rule: str
) -> None:
    planted = tmp_path / name
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    monkeypatch.setattr("tests.test_imports.REPOSITORY", tmp_path)
    assert any(rule in broken for broken in broken_rules(planted))


def test_files_stay_short() -> None:
    folders = ("cosmos_scale", "kernels", "tests", "tools", "benchmarks")
    files = [path for folder in folders for path in REPOSITORY.glob(f"{folder}/**/*.py")]
    lengths = {source_id(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert lengths, "no source found"
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_kernels_are_one_package() -> None:
    link = REPOSITORY / "cosmos_scale" / "kernels"
    assert link.is_symlink(), "a copy would drift from kernels/"
    assert link.resolve() == (REPOSITORY / "kernels").resolve()
