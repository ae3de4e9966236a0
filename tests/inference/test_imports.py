"""What importing the package and loading a model import: counted in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cosmos_scale
from tests.checkpoint.interchange.made import save_cosmos
from tests.inference.conftest import Saved

# What neither training's parts nor a picture's way needs.
NEVER = (
    "cosmos_scale.engine",
    "cosmos_scale.run",
    "cosmos_scale.train",
    "cosmos_scale.loss",
    "cosmos_scale.cli",
    "deepspeed",
    "matplotlib",
    "open_clip",
    "pyarrow",
    "rich.progress",
    "torchvision",
    "transformers",
    "triton",
    "webdataset",
)
USE = """
import sys, warnings, cosmos_scale
warnings.simplefilter("ignore", UserWarning)  # of what is assumed of the public checkpoint
model = cosmos_scale.load({run!r}, device="cpu")
model.classify([{picture!r}], ["cat", "dog"])
model.segment({picture!r}, ["cat", "dog"])
model.attention_maps({picture!r}, "a cat")
cosmos_scale.load({public!r}, device="cpu").encode_text(["a cat"])
import torch.distributed
assert not torch.distributed.is_initialized()
"""


def modules_after(code: str, folder: Path) -> list[str]:
    """The names of all modules that a fresh process has after it ran some code, in order."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names: list[str] = json.loads(done.stdout)
    return names


def test_the_package_alone_imports_itself_and_the_standard_library(tmp_path: Path) -> None:
    bare, found = (set(modules_after(code, tmp_path)) for code in ("import typing, json", "import cosmos_scale"))
    assert found - bare == {"cosmos_scale"}


def test_a_model_at_work_imports_nothing_of_training(saved: Saved, tmp_path: Path) -> None:
    public = save_cosmos(tmp_path / "cosmos.pt")
    used = USE.format(run=str(saved.run), picture=str(saved.files()[0]), public=str(public))
    found = modules_after(used, tmp_path)
    assert "cosmos_scale.inference.loaded_model" in found
    assert [name for name in found if any(name == never or name.startswith(f"{never}.") for never in NEVER)] == []


def test_names_that_are_not_there_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'cosmos_scale' has no attribute 'lod'"):
        getattr(cosmos_scale, "lod")  # noqa: B009 - the type checker knows better
    assert all(hasattr(cosmos_scale, name) for name in cosmos_scale.__all__)
    assert {*cosmos_scale.__all__, "__version__"} <= set(dir(cosmos_scale))
    assert Path(cosmos_scale.__file__).with_name("py.typed").is_file()
