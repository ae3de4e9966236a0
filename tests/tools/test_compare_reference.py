"""The comparison with a checkout, on stand-ins for one: the public code is no part of this project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# A stand-in has the public code's modules and the calls between them; its numbers are the restatement's.
MODEL = """
import torch
from cosmos_scale.testing.published_step import PublishedModel
from cosmos_scale.config import ModelConfig

class CLIP(PublishedModel):
    def __init__(self, embed_dim, vision_cfg, text_cfg, output_dict, cosmos):
        assert output_dict and cosmos and vision_cfg["pool_type"] == "tok"
        for tower in (vision_cfg, text_cfg):
            assert tower["output_all"] and tower["attentional_pool"]
        sizes = [{key: value for key, value in tower.items() if type(value) is int} for tower in (vision_cfg, text_cfg)]
        super().__init__(ModelConfig.model_validate({"embed_dim": embed_dim, "vision": sizes[0], "text": sizes[1]}))
"""
LOSS = """
from cosmos_scale.testing.published_step import PublishedStep

class COSMOSLoss:
    def __call__(self, student, teacher, batch, output_dict):
        step = object.__new__(PublishedStep)
        step.student, step.teacher = student, teacher
        clip, distill = step.losses(batch)
        return {"clip_loss": clip + DEVIATION, "distill_loss": distill}
"""
TRAIN = """
import torch
from cosmos_scale.batch import Batch

def train_one_epoch(student, teacher, data, loss, epoch, optimizer, scaler, scheduler, momenta, distilled, args):
    data["train"].set_epoch(epoch)
    assert data["train"].dataloader.num_batches == 1
    for images, texts in data["train"].dataloader:
        assert args.use_imagecrop_aug and texts.shape[1] == args.num_sampled_captions
        captions = texts.transpose(0, 1)
        batch = Batch(torch.stack(images[:2]), torch.stack(images[2:]), captions, None, None, None)
        optimizer.zero_grad()
        losses = loss(student=student, teacher=teacher, batch=batch, output_dict=True)
        losses["loss"] = sum(losses.values())
        losses["loss"].backward()
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), student.parameters()):
                average.lerp_(weight, 1 - args.momentum_teacher)
        optimizer.step()
"""


def write_checkout(folder: Path, *, deviation: float = 0.0) -> Path:
    for name, text in {
        "open_clip/__init__.py": "",
        "open_clip/model.py": MODEL,
        "open_clip/loss.py": LOSS + f"\nDEVIATION = {deviation}\n",
        "training/__init__.py": "",
        "training/train.py": TRAIN,
    }.items():
        file = folder / "src" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def compare(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPOSITORY / "tools" / "compare_reference.py"), "--reference", str(folder)]
    return subprocess.run(
        [*command, "--model", "tiny", "--threads", "1", *options],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_all_three_sides_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    finished = compare(write_checkout(tmp_path / "public"), "--steps", "1", "--batch", "2", "--json", str(file))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(figures) == ["restatement_time_tiny", "reference_speedup_tiny"]
    assert all(row["value"] > 0 for row in figures.values())
    assert "a tiny model, batch 2" in figures["reference_speedup_tiny"]["note"]


def test_other_losses_exit_with_1(tmp_path: Path) -> None:
    finished = compare(write_checkout(tmp_path / "public", deviation=2e-4), "--steps", "1")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "step 0: the total loss is" in finished.stderr.splitlines()[-1]


def damage_nothing_there(folder: Path) -> None:
    (folder / "src" / "open_clip" / "model.py").unlink()


def damage_import(folder: Path) -> None:
    (folder / "src" / "training" / "train.py").write_text("import no_such_package\n")


def damage_version(folder: Path) -> None:
    (folder / "src" / "open_clip" / "loss.py").write_text("class ClipLoss: ...\n")


def damage_loop(folder: Path) -> None:
    (folder / "src" / "training" / "train.py").write_text("def train_one_epoch(student): ...\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "has no src/open_clip/model.py: not a checkout of the public code"),
        (damage_import, "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        (damage_version, "has no attribute 'COSMOSLoss': another version of the public code?"),
        (damage_loop, "its training loop fails: TypeError: train_one_epoch() takes 1 positional argument"),
    ],
)
def test_a_checkout_that_cannot_be_used_is_one_line(tmp_path: Path, damage: object, message: str) -> None:
    folder = write_checkout(tmp_path / "public")
    assert callable(damage)
    damage(folder)
    finished = compare(folder)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    lines = finished.stderr.splitlines()
    assert "Traceback" not in finished.stderr
    assert lines[-1].startswith("--reference: ")
    assert message in lines[-1]
