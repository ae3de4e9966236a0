"""The house's rules, read from the sources: who may import whom, what only named places import, how long files get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MOST_LINES = 400

# What everything may build on: plain data, configuration, errors, files, the host. "__init__": the version.
FOUNDATION = {
    "__init__",
    "batch",
    "config",
    "console",
    "drawing",
    "errors",
    "exit_status",
    "files",
    "fragments",
    "host",
    "import_path",
    "interfaces",
    "interrupt",
    "line_file",
    "openmp",
    "phases",
    "set_names",
    "threads",
    "versions",
    "words",
}

# kernels <- model, loss, engine <- step <- train <- cli; data, checkpoint and evaluation know none of engine and train.
PARTS = {"kernels", "model", "loss", "engine", "data", "checkpoint", "evaluation", "step"} | FOUNDATION
MAY_IMPORT = {
    "__init__": {"errors", "inference", "interrupt"},  # when it is asked for them
    "batch": set(),
    "config": {"errors", "files", "set_names", "versions", "words"},
    "console": {"words"},
    "drawing": set(),
    "errors": set(),
    "exit_status": set(),
    "files": {"errors"},
    "fragments": set(),
    "host": set(),
    "import_path": set(),
    "interfaces": set(),
    "interrupt": {"exit_status", "threads"},
    "line_file": {"files"},
    "openmp": set(),
    "phases": set(),
    "set_names": set(),
    "threads": set(),
    "versions": {"__init__"},
    "words": set(),
    "kernels": set(),
    "model": {"kernels"} | FOUNDATION,
    "loss": {"kernels"} | FOUNDATION,
    "engine": {"kernels", "model", "loss", "checkpoint"} | FOUNDATION,
    "step": {"loss", "engine"} | FOUNDATION,
    "data": {"kernels"} | FOUNDATION,
    "checkpoint": FOUNDATION,
    "evaluation": {"checkpoint", "data", "model"} | FOUNDATION,
    "inference": {"checkpoint", "data", "evaluation"} | FOUNDATION,
    # The planner counts a step by doing it, without other ranks and without the work: engine, loss and step themselves.
    "profiling": {"kernels", "model", "loss", "engine", "step"} | FOUNDATION,
    "run": PARTS - {"kernels", "loss"} | {"profiling"},
    "train": PARTS - {"kernels"} | {"run", "profiling"},
    "profile": PARTS - {"kernels"} | {"run", "profiling"},
    "launch": {"checkpoint", "data", "run"} | FOUNDATION,
    "report": {"checkpoint", "data", "evaluation", "model", "run"} | FOUNDATION,  # of run the names of its files
    "cli": PARTS - {"kernels", "loss", "step"} | {"run", "train", "profile", "launch", "profiling", "report"},
    "demo": PARTS | {"run", "cli", "demo_zero_shot", "report"},
    "demo_zero_shot": {"data", "evaluation"} | FOUNDATION,
    "testing": PARTS | {"run", "train", "launch", "cli", "profiling"},
}
# Within data, arrows go the way of a sample: samples <- decode <- shards <- training. Three rooms stand beside it:
# tools, prepare and scenes. The modules jobs, forked and work lie in no room: the long work of every room uses them.
SAMPLE_WAY = {"forked", "jobs", "work", "samples", "decode", "shards", "training"}
MAY_IMPORT_IN_DATA: dict[str, set[str]] = {
    "__init__": set(),
    "forked": set(),
    "jobs": {"forked"},
    "work": set(),
    "samples": {"jobs"},
    "decode": {"jobs", "samples"},
    "shards": {"jobs", "work", "samples", "decode"},
    "training": {"forked", "jobs", "samples", "decode", "shards"},
    "tools": SAMPLE_WAY | {"prepare"},
    "prepare": SAMPLE_WAY,
    "scenes": SAMPLE_WAY,
}
# Who may import cli and train; train's own guard (`if __name__ == "__main__":`) counts as cli.
ONLY_FROM = {"cli": {"demo", "testing"}, "train": {"cli", "testing"}, "profile": {"cli", "testing"}}

# Packages that only the named places import: whole packages of ours, or single modules.
ONLY_IN = {
    "torch.distributed": {
        "cosmos_scale/loss/gather.py",
        "cosmos_scale/engine/",
        "cosmos_scale/checkpoint/",
        "cosmos_scale/profiling/fake_ranks.py",
        "cosmos_scale/testing/",
    },
    # A fork server imports it once for the ranks of all tests.
    "deepspeed": {"cosmos_scale/engine/", "cosmos_scale/testing/preloaded.py"},
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

# Beside the package: no file of it imports them.
NOT_PACKAGED = ("tests", "benchmarks", "tools")

SOURCES = sorted([*REPOSITORY.glob("cosmos_scale/**/*.py"), *REPOSITORY.glob("kernels/**/*.py")])


def source_id(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def own_sources() -> list[Path]:
    # cosmos_scale/kernels is a link to kernels/: each file counts once, under its real name.
    return [path for path in SOURCES if not source_id(path).startswith("cosmos_scale/kernels/")]


def imported(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports, those of `from a import b` as a.b.

    A first or last `if __name__ == "__main__":` does not count: there a module only hands its command line on.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    ends = [statement for statement in (body[1:2] + body[-1:]) if isinstance(statement, ast.If)]
    handing_on = [statement for statement in ends if ast.unparse(statement.test) == "__name__ == '__main__'"]
    body = [statement for statement in body if statement not in handing_on]
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


def room_of_data(path: Path) -> str | None:
    """The room of data that a file lies in, or its own name where it lies in none; None for a file outside data."""
    parts = path.relative_to(REPOSITORY).parts
    if parts[:2] != ("cosmos_scale", "data"):
        return None
    return parts[2] if len(parts) > 3 else path.stem


def parts_imported(path: Path, package: str) -> set[str]:
    """The parts of a package of ours that a file imports; what __init__.py defines counts as the part "__init__"."""
    names = {name for name in imported(path) if is_under(name, package)}
    parts = {name.removeprefix(f"{package}.").split(".")[0] for name in names if name != package}
    return {"__init__" if part == "__version__" else part for part in parts}


def broken_rules(path: Path) -> list[str]:
    part, room = part_of_house(path), room_of_data(path)
    ours = parts_imported(path, "cosmos_scale") - {part}
    broken = []
    if part not in MAY_IMPORT:
        broken.append(f"no rule says what {part} may import")
    for other, users in ONLY_FROM.items():
        if other in ours and part not in users:
            broken.append(f"only {' and '.join(sorted(users))} import {other}")
    broken += [f"{part} may not import {other}" for other in sorted(ours - MAY_IMPORT.get(part, ours) - {*ONLY_FROM})]
    if room is not None and room not in MAY_IMPORT_IN_DATA:
        broken.append(f"no rule says what data/{room} may import")
    elif room is not None:
        others = parts_imported(path, "cosmos_scale.data") - {room} - MAY_IMPORT_IN_DATA[room]
        broken += [f"data/{room} may not import data/{other}" for other in sorted(others)]
    broken += [f"imports {name}" for name in imported(path) if name.split(".")[0] in NOT_PACKAGED]
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
        ("cosmos_scale/data/jobs.py", "def f():\n    from cosmos_scale import step", "data may not import step"),
        ("cosmos_scale/files.py", "from cosmos_scale.config import RunConfig", "files may not import config"),
        ("cosmos_scale/errors.py", "from cosmos_scale import __version__", "errors may not import __init__"),
        ("cosmos_scale/engine/planted.py", "import cosmos_scale.profiling.flops", "engine may not import profiling"),
        ("cosmos_scale/attic/planted.py", "import cosmos_scale.errors", "no rule says what attic may import"),
        ("cosmos_scale/planted.py", "", "no rule says what planted may import"),
        ("cosmos_scale/data/attic/planted.py", "", "no rule says what data/attic may import"),
        ("cosmos_scale/data/planted.py", "", "no rule says what data/planted may import"),
        (
            "cosmos_scale/data/shards/planted.py",
            "from cosmos_scale.data.training.order import EpochOrder",
            "data/shards may not import data/training",
        ),
        (
            "cosmos_scale/data/decode/planted.py",
            "from cosmos_scale.data.shards import index",
            "data/decode may not import data/shards",
        ),
        (
            "cosmos_scale/data/samples/planted.py",
            "from cosmos_scale.data import decode",
            "data/samples may not import data/decode",
        ),
        (
            "cosmos_scale/data/training/planted.py",
            "def f():\n    import cosmos_scale.data.tools.inspect",
            "data/training may not import data/tools",
        ),
        (
            "cosmos_scale/data/prepare/planted.py",
            "from cosmos_scale.data.scenes import scenes",
            "data/prepare may not import data/scenes",
        ),
        (
            "cosmos_scale/data/prepare/planted.py",
            "from cosmos_scale.data.tools import build",
            "data/prepare may not import data/tools",
        ),
        (
            "cosmos_scale/data/jobs.py",
            "from cosmos_scale.data.samples.sample import SampleKey",
            "data/jobs may not import data/samples",
        ),
        ("cosmos_scale/evaluation/planted.py", "import cosmos_scale.cli.main", "only demo and testing import cli"),
        ("cosmos_scale/train.py", "from cosmos_scale.cli.main import main", "only demo and testing import cli"),
        ("cosmos_scale/demo.py", "from cosmos_scale.train import train", "only cli and testing import train"),
        ("cosmos_scale/run/planted.py", "from cosmos_scale import train", "only cli and testing import train"),
        ("cosmos_scale/testing/planted.py", "from tests.conftest import REPOSITORY", "imports tests.conftest"),
        ("cosmos_scale/model/planted.py", "import torch.distributed as dist", "torch.distributed"),
        ("cosmos_scale/train.py", "from torch import distributed", "torch.distributed"),
        ("cosmos_scale/step.py", "import deepspeed", "deepspeed"),
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


def test_a_guard_may_hand_the_command_line_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_imports.REPOSITORY", tmp_path)
    planted = tmp_path / "cosmos_scale" / "train.py"
    planted.parent.mkdir()
    planted.write_text('if __name__ == "__main__":\n    from cosmos_scale.cli.main import main\n')
    assert broken_rules(planted) == []


@pytest.mark.parametrize(
    ("folder", "never"), [("benchmarks", "tests"), ("tools", "tests"), ("tests", "benchmarks")], ids=str
)
def test_tests_and_benchmarks_share_through_the_package_alone(folder: str, never: str) -> None:
    paths = [path for path in REPOSITORY.glob(f"{folder}/**/*.py") if path.parent.name != never]
    assert paths, "no source found"
    assert {source_id(path) for path in paths if any(is_under(name, never) for name in imported(path))} == set()


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
