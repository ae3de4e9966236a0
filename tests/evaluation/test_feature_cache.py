"""What is told where features cannot be kept: the file or folder, and the way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cosmos_scale.evaluation import feature_cache
from cosmos_scale.evaluation.feature_cache import FeatureCache

TENSORS = {"image": torch.ones(2, 3)}


def test_a_file_in_the_place_of_the_folder_is_named_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    folder.write_text("")
    cache = FeatureCache(folder)
    for _ in range(2):  # told once
        cache.save("weights", TENSORS)
    assert capsys.readouterr().err == (
        f"features are not kept: {folder}: cannot be written: File exists; "
        "rule: mend this place, or leave out --cache\n"
    )


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(feature_cache, "save_file", full)
    FeatureCache(tmp_path).save("weights", TENSORS)
    said = capsys.readouterr().err
    assert said.startswith(f"features are not kept: {tmp_path}{os.sep}")
    assert ".safetensors: cannot be written: " in said
    assert "No space left on device" in said
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for_and_replaced(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.save("weights", TENSORS)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    # In a process of its own: opened, it would be waited for in a library that no signal interrupts.
    load = "import sys, pathlib, cosmos_scale.evaluation.feature_cache as c; c.FeatureCache(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{load}.load('weights')", str(tmp_path)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    cache.save("weights", TENSORS)
    assert cache.load("weights") is not None
