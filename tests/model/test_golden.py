"""Numbers of the published implementation, and the tool that compares with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos_scale.errors import UserError
from tools.check_golden import GROUPS, Golden, main

FILE = Path(__file__).parents[1] / "golden" / "cosmos_tiny.safetensors"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(FILE)


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("group", GROUPS)
def test_group_matches_the_published_numbers(group: str, zero_stage: int, golden: Golden) -> None:
    differences = GROUPS[group].check(golden, zero_stage)
    worst = max(differences, key=lambda difference: difference.value)
    assert worst.value <= GROUPS[group].tolerance, worst


def test_gradients_cover_every_parameter(golden: Golden) -> None:
    names = {difference.name for difference in GROUPS["gradients"].check(golden, 1)}
    assert names == set(golden.state_dict("step0.grad.")) == set(golden.state_dict("student."))


def changed_file(path: Path, tensors: dict[str, Tensor | None], header: dict[str, str] | None = None) -> Path:
    """Write the golden file with some tensors and header values replaced, or left out where None."""
    with safe_open(FILE, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
        metadata = file.metadata() | (header or {})
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata)
    return path


def test_tool_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "tools.check_golden", str(FILE)]
    result = subprocess.run(command, cwd=FILE.parents[2], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert all(group in result.stdout for group in GROUPS)


@pytest.mark.parametrize(
    ("name", "change", "failing"),
    [
        # Each change is some ten times the tolerance of the group that must notice it.
        ("step0.student.image_features", 1e-4, {"features"}),
        ("step0.student.txt_crossmodal_features", 1e-4, {"features"}),
        ("step0.teacher.text_features", 1e-4, {"features"}),
        ("trajectory", 1e-4, {"losses", "trajectory"}),
        ("final.student.visual.proj", 1e-3, {"final_student"}),
        ("final.teacher.positional_embedding", 1e-3, {"final_teacher"}),
        ("step0.grad.visual.conv1.weight", 1e-3, {"gradients"}),
        ("step0.grad.logit_scale", 1e-3, {"gradients"}),
        ("step0.student.text_features", torch.nan, {"features"}),
        ("trajectory", torch.nan, {"losses", "trajectory"}),
        ("step0.grad.visual.proj", torch.nan, {"gradients"}),
        ("step0.grad.logit_scale", torch.inf, {"gradients"}),
        ("final.student.visual.proj", torch.nan, {"final_student"}),
        ("final.teacher.visual.proj", torch.nan, {"final_teacher"}),
    ],
)
def test_tool_notices_a_changed_number(
    name: str, change: float, failing: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = Golden(FILE).tensor(name).clone()
    changed.view(-1)[: max(1, changed.numel() // 2)] += change
    path = changed_file(tmp_path / "changed.safetensors", {name: changed})
    assert main([str(path)]) == 1
    output = capsys.readouterr()
    lines = [line.split() for line in output.out.splitlines() if "PAST TOLERANCE" in line]
    assert {line[0] for line in lines} == failing
    assert output.err == f"past tolerance: {path}\n"


@pytest.mark.parametrize(("third", "noticed"), [(0, True), (1, False), (2, True)])
def test_only_the_key_third_of_attention_biases_is_left_out(
    third: int, noticed: bool, golden: Golden, tmp_path: Path
) -> None:
    name = "final.student.transformer.resblocks.0.attn.in_proj_bias"
    changed = golden.tensor(name).clone()
    changed.chunk(3)[third].add_(1e-2)
    assert main([str(changed_file(tmp_path / "changed.safetensors", {name: changed}))]) == int(noticed)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return files that cannot be used, and what the error must name."""
    text = folder / "text.safetensors"
    text.write_text("not tensors at all, but long enough to have a header")
    with safe_open(FILE, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    captions = Golden(FILE).tensor("step0.captions")
    half = torch.zeros(2, 3, 3, 48, 48)[:, :2].contiguous()
    return {
        "absent": (folder / "absent.safetensors", "no such file"),
        "text": (text, "not a safetensors file"),
        "no tensor": (changed_file(folder / "1", {"step0.teacher.image_features": None}), "teacher.image_features"),
        "no weight": (changed_file(folder / "2", {"student.visual.proj": None}), "visual.proj"),
        "no json": (changed_file(folder / "3", {}, {"config": "{"}), "sizes do not make a model"),
        "no key": (changed_file(folder / "4", {}, {"config": "{}"}), "sizes do not make a model"),
        "bad size": (changed_file(folder / "5", {}, {"config": json.dumps(config | {"vw": 65})}), "width"),
        "other size": (changed_file(folder / "6", {}, {"config": json.dumps(config | {"vl": 3})}), "resblocks.2"),
        "bad number": (changed_file(folder / "10", {}, {"warmup": "two"}), "hyper-parameters do not make a run"),
        "bad rule": (changed_file(folder / "11", {}, {"warmup": "10"}), "warmup_steps"),
        "no column": (changed_file(folder / "7", {}, {"trajectory_columns": "a,b,c,d"}), "clip_loss"),
        "big id": (changed_file(folder / "9", {"step0.captions": torch.full((8, 3, 77), 64)}), "step0.captions"),
        "flat trajectory": (changed_file(folder / "12", {"trajectory": torch.zeros(6)}), "trajectory: shape (6,)"),
        "no trajectory": (changed_file(folder / "13", {"trajectory": torch.zeros(0, 4)}), "trajectory: shape (0, 4)"),
        "float ids": (changed_file(folder / "14", {"step0.captions": captions.float()}), "must be integers"),
        "later float ids": (changed_file(folder / "15", {"step1.captions": captions.float()}), "step1.captions"),
        "short captions": (
            changed_file(folder / "16", {"step0.captions": captions[:, :, :9].clone()}),
            "(any, any, 77)",
        ),
        "4-D crops": (changed_file(folder / "17", {"step0.global_crops": half[:, 0].clone()}), "(any, any, 3, 48, 48)"),
        "4-D local": (changed_file(folder / "18", {"step0.local_crops": half[:, 0].clone()}), "step0.local_crops"),
        "0-D features": (changed_file(folder / "19", {"step0.teacher.text_features": torch.zeros(())}), "shape ()"),
        "0-D weight": (changed_file(folder / "20", {"student.positional_embedding": torch.zeros(())}), "shape ()"),
        "few captions": (changed_file(folder / "21", {"step0.captions": captions[:1].clone()}), "step0"),
        "batches differ": (changed_file(folder / "8", {"step0.global_crops": half}), "step0"),
    }


def test_tool_names_what_is_wrong_with_a_file_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case, (path, word) in broken_files(tmp_path).items():
        assert main([str(path)]) == 2, case
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert str(path) in error, error
        assert word in error, error
        assert "pydantic" not in error, error


def test_a_file_without_header_is_refused(tmp_path: Path) -> None:
    save_file({"student.positional_embedding": torch.zeros(2, 2)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="lacks 'config'"):
        Golden(tmp_path / "bare.safetensors").model_config()
