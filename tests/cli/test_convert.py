"""`cosmos-scale convert` as a user meets it: what it prints, and what it refuses in one line, with nothing written."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosmos_scale.cli import main as cli
from cosmos_scale.config import ModelConfig
from tests.checkpoint.edit import replace_tensors
from tests.checkpoint.interchange.made import SIZES, state_of, towers
from tests.checkpoint.interchange.runs import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    save_run(folder)
    return folder


def failure(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    assert cli.main(["convert", "--checkpoint", *map(str, arguments), str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not out.exists()
    return captured.err


def test_it_says_what_was_written_and_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--checkpoint", str(run), "--to"]
    assert cli.main([*arguments, "openclip", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "student, 3,771,649 parameters" in text
    assert "left out" in text
    assert cli.main([*arguments, "cosmos", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "student and teacher, 3,817,858 parameters each" in text
    assert "left out" not in text
    assert cli.main([*arguments, "openclip", "--which", "teacher", "--json", str(tmp_path / "c")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "checkpoint": str(run / "checkpoints" / "step-00000009"),
        "kind": "checkpoint of step 9 of the run tiny",
        "models": ["teacher"],
        "to": "openclip",
        "folder": str(tmp_path / "c"),
        "parameters": 3_771_649,
        "heads_left_out": True,
        "assumed": [],
        "files": ["open_clip_model.safetensors", "open_clip_config.json"],
    }


def test_what_is_there_is_replaced_with_force_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "--checkpoint", str(run), "--to"]
    assert cli.main([*command, "openclip", str(tmp_path / "out")]) == 0
    assert cli.main([*command, "cosmos", str(tmp_path / "out")]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "cosmos", "--force", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "cosmos.pt"]


def test_a_checkpoint_is_not_replaced_by_its_own_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    assert cli.main(["convert", "--checkpoint", str(run), "--to", "cosmos", str(out)]) == 0
    link.symlink_to(out / "cosmos.pt")
    before = (out / "cosmos.pt").read_bytes()
    for checkpoint in (out / "cosmos.pt", link):
        assert cli.main(["convert", "--checkpoint", str(checkpoint), "--to", "hf", "--force", str(out)]) == 2
        said = f"{out}: its files are the checkpoint {checkpoint}, and would be replaced; rule: name another folder\n"
        assert capsys.readouterr().err.endswith(said)
    assert (out / "cosmos.pt").read_bytes() == before
    (out / "mine.pt").write_bytes(before)  # a file that no export wrote stays
    assert cli.main(["convert", "--checkpoint", str(out / "mine.pt"), "--to", "hf", "--force", str(out)]) == 0
    assert (out / "mine.pt").read_bytes() == before
    assert cli.main(["convert", "--checkpoint", str(out), "--to", "openclip", "--force", str(out)]) == 2
    assert (out / "model.safetensors").exists()


def test_folders_that_are_no_utf8_are_read_and_written(run: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"th\xe9")
    checkpoint.symlink_to(run)
    assert cli.main(["convert", "--checkpoint", str(checkpoint), "--to", "openclip", str(out)]) == 0
    assert "caf\\udce9" in (out / "README.md").read_text(encoding="utf-8")


def test_a_folder_is_no_file_in_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "--checkpoint", str(run), "--to", "cosmos", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    said = failure(capsys, tmp_path / "again", tmp_path / "out", "--to", "hf")
    assert "none there; rule: name a step-* folder, or a run with one, or a file in it, such as cosmos.pt" in said


def test_what_a_format_cannot_hold_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    changes: dict[str, dict[str, object]] = {
        "vision.head_width: 32; rule: must be 64": {"vision": {**SIZES.vision.model_dump(), "head_width": 32}},
        "text.heads: 2; rule: must be 1": {"text": {**SIZES.text.model_dump(), "heads": 2}},
        "pooler_heads: 4; rule: must be 8": {"pooler_heads": 4},
        "text_padding: mask; rule: must be attend": {"text_padding": "mask"},
        "activation: quick_gelu; rule: must be gelu": {"activation": "quick_gelu"},
    }
    for number, (said, change) in enumerate(changes.items()):
        save_run(tmp_path / str(number), ModelConfig.model_validate({**SIZES.model_dump(), **change}))
        assert f"model.{said} for a COSMOS file" in failure(capsys, out, tmp_path / str(number), "--to", "cosmos")
    few: dict[str, object] = {"text": {**SIZES.text.model_dump(), "vocab_size": 512}}
    save_file(
        towers(state_of(1, ModelConfig.model_validate({**SIZES.model_dump(), **few}))), tmp_path / "few.safetensors"
    )
    assert "vocab_size: 512; rule: must be at least 49408" in failure(
        capsys, out, tmp_path / "few.safetensors", "--to", "hf"
    )
    save_file(towers(state_of(1)), tmp_path / "towers.safetensors")
    said = failure(capsys, out, tmp_path / "towers.safetensors", "--to", "cosmos")
    assert "has no cross-modality heads, which a COSMOS file holds" in said


def test_what_cannot_be_read_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "none there" in failure(capsys, out, tmp_path, "--to", "hf")
    said = failure(capsys, out, run, "--to", "hf", "--activation", "quick_gelu")
    assert "--activation: quick_gelu; rule: is for files that do not say it" in said
    checkpoint = save_run(tmp_path / "nan")
    replace_tensors(checkpoint, "fragments-00000.safetensors", {"ln_final.bias|ema": torch.full((64,), torch.nan)})
    said = failure(capsys, out, tmp_path / "nan", "--to", "hf", "--which", "teacher")
    assert "64 of 64 numbers of ln_final.bias are not finite" in said
