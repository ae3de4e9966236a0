"""`cosmos-scale checkpoint inspect`: what it prints of whole and of broken checkpoints, and its exit status."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Size

from cosmos_scale import __version__
from cosmos_scale.checkpoint.state import MANIFEST, Manifest, find_checkpoint, read_manifest
from cosmos_scale.cli import main as cli
from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.test_state import SHAPES, keep, save_all, state
from tests.checkpoint.test_writer import writer_of

LAST = "fragments-00001.safetensors"
BYTES = 16 * sum(Size(shape).numel() for shape in SHAPES.values())  # of the tensors; the headers come on top


def save_one(rank: int, world_size: int, root: Path) -> None:
    config = RunConfig.model_validate({"name": "shown", "precision": "fp32", "zero": {"stage": 2}})
    lost = {"scenes/3.tar": 4}
    with writer_of(rank, world_size, root) as writer:
        plain = config.model_dump(mode="json")
        writer.save(replace(state(1200), config=plain, lost_shards=lost, steps_per_epoch=500))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with checkpoints at steps 3, 6 and 1200."""
    run = tmp_path_factory.mktemp("inspected") / "shown"
    run_ranks(save_all, 2, run / "checkpoints", [3, 6], keep(9))
    run_ranks(save_one, 2, run / "checkpoints")
    return run


def test_a_folder_of_runs_is_told_with_its_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = copy_of(run, tmp_path)
    for number in range(20):
        shutil.copytree(checkpoints / "step-00000003", tmp_path / f"run-{number:02}" / "checkpoints" / "step-00000003")
    (tmp_path / "none").mkdir()
    said = "rule: name a step-* folder, or a run with one: run-00 (1 checkpoint, the newest step-00000003), run-01 "
    told = inspect(capsys, tmp_path, status=2)
    assert told.startswith(f"cosmos-scale checkpoint inspect: {tmp_path}: no checkpoint; {said}")
    assert told.endswith(" and 11 more runs\n")
    with pytest.raises(UserError) as refused:  # as `eval` and `load` tell it
        find_checkpoint(tmp_path)
    assert said in str(refused.value)
    shutil.rmtree(tmp_path / "shown")
    with pytest.raises(UserError, match=r"a run with one$"):
        find_checkpoint(tmp_path / "none")


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "shown")
    return folder / "shown" / "checkpoints"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert cli.main(["checkpoint", "inspect", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    if status != 2:
        assert captured.err == ""
        return captured.out
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    text = inspect(capsys, *arguments, "--json", status=status)
    assert text.count("\n") == 1
    return json.loads(text)


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_json_of_one(run: Path, capsys: pytest.CaptureFixture[str], verify: list[str]) -> None:
    folder = run / "checkpoints" / "step-00001200"
    found = inspect_json(capsys, folder, *verify)
    expected = {
        "checkpoint": str(folder),
        "step": 1200,
        "samples": 9600,
        "updates": 1200,
        "epoch": 2.4,
        "world_size": 2,
        "precision": "fp32",
        "zero": {"stage": 2, "offload": False, "gradient_dtype": "fp32"},
        "data": "digest",
        "lost_shards": {"scenes/3.tar": 4},
        "origin": "",
        "name": "shown",
        "parameters": {"image tower": 48, "text tower": 0, "heads": 0, "log-scales": 1},
        "whole": True,
        "verified": bool(verify),
        "errors": [],
    }
    assert {key: found[key] for key in expected} == expected
    assert found["versions"]["cosmos_scale"] == __version__
    assert found["written"].endswith("+00:00")
    assert [file["name"] for file in found["files"]] == ["fragments-00000.safetensors", LAST]
    assert found["bytes"] == sum((folder / file["name"]).stat().st_size for file in found["files"]) > BYTES


def test_tables_of_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, run / "checkpoints" / "step-00001200", "--verify")
    for shown in (
        "1,200",
        "9,600",
        "2.400",
        "2 ranks, ZeRO 2",
        "fp32",
        "digest",
        "scenes/3.tar (from step 4 on)",
        LAST,
    ):
        assert shown in text, shown
    assert "every checksum is right" in " ".join(text.split())


def test_a_run_is_listed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy_of(run, tmp_path)
    (root / "step-00000009.tmp").mkdir()
    (root / "step-00000008.broken").mkdir()
    for folder in (tmp_path / "shown", root):
        text = inspect(capsys, folder)
        assert [text.count(f"step-{step:08d} ") for step in (3, 6, 1200)] == [1, 1, 1]
        assert text.count("whole") == 3
        assert "unfinished or being deleted: step-00000009.tmp" in text
        assert "set aside: step-00000008.broken" in text
    assert [one["step"] for one in inspect_json(capsys, root)] == [3, 6, 1200]


def test_damage_inside_a_file_is_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy_of(run, tmp_path)
    path = root / "step-00001200" / LAST
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for arguments in ([root], [root / "step-00001200"]):
        assert f"{path}: is damaged between bytes" in inspect(capsys, *arguments, "--verify", status=1)
    found = inspect_json(capsys, root, "--verify", status=1)
    assert [one["whole"] for one in found] == [True, True, False]
    assert [bool(file["error"]) for file in found[2]["files"]] == [False, True]


@pytest.mark.parametrize("lost", [LAST, MANIFEST])
def test_missing_files_are_seen_without_verify(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    root = copy_of(run, tmp_path)
    (root / "step-00000006" / lost).unlink()
    for folder in (root, root / "step-00000006"):
        text = inspect(capsys, folder, status=1)
        assert "BROKEN" in text
        assert lost in text
    assert inspect(capsys, root / "step-00000003")


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_broken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path) -> Manifest:
        if folder in deleted:
            shutil.rmtree(folder)
        return read_manifest(folder)

    monkeypatch.setattr("cosmos_scale.checkpoint.inspect.read_manifest", read)
    root = copy_of(run, tmp_path)
    deleted = [root / "step-00000003"]
    assert cli.main(["checkpoint", "inspect", str(root), "--json"]) == 0
    captured = capsys.readouterr()
    assert [one["step"] for one in json.loads(captured.out)] == [6, 1200]
    assert captured.err == f"{deleted[0]}: was deleted while it was looked at\n"
    deleted = [root / "step-00000006"]
    said = inspect(capsys, deleted[0], status=2)
    assert "step-00000006: was deleted while it was looked at; rule: look again" in said


def test_what_is_no_checkpoint_is_wrong_use(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}: no checkpoint; rule: " in inspect(capsys, tmp_path, status=2)
    assert "nowhere: no checkpoint" in inspect(capsys, tmp_path / "nowhere", status=2)
    (tmp_path / "cosmos.pt").touch()
    assert ", or a file in it, such as cosmos.pt" in inspect(capsys, tmp_path, status=2)


def test_the_table_of_a_large_model_is_whole_on_80_columns(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"image tower": 86_192_640, "text tower": 63_428_096, "heads": 2_761_728, "log-scales": 2}
    monkeypatch.setattr("cosmos_scale.checkpoint.inspect.parts", lambda _: sizes)
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.split() for line in inspect(capsys, run / "checkpoints" / "step-00001200").splitlines()]
    assert ["part", "parameters", "weights", "moment", "1", "moment", "2", "EMA", "together"] in lines
    assert ["image", "tower", "86,192,640", *["344.8", "MB"] * 4, "1.4", "GB"] in lines
