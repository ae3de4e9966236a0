"""The published implementation's numbers on this device: in float32 within the tolerances, in bf16 how far."""

from pathlib import Path

import torch

from tools.check_golden import GROUPS, STUDENT_FEATURES, Golden
from tools.gpu_stages.recorder import Recorder

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "cosmos_tiny.safetensors"


def check(recorder: Recorder) -> None:
    """Write a row for each group of numbers, and on a GPU one for the features in bf16."""
    golden = Golden(FILE, "cuda" if recorder.on_gpu else "cpu")
    for name, group in GROUPS.items():
        worst = max(group.check(golden, 1), key=lambda difference: difference.value)
        recorder.write(group=name, worst=worst.value, of=worst.name, ok=worst.value <= group.tolerance)
    if recorder.on_gpu:
        student = golden.model("student.").to(torch.bfloat16)
        with torch.no_grad():
            features = student(golden.batch(0))
        differences = {
            field: (getattr(features, field).float().cpu() - golden.tensor(f"step0.student.{name}")).abs().max().item()
            for field, name in STUDENT_FEATURES.items()
        }
        recorder.write(group="features in bf16", worst=max(differences.values()), by_feature=differences)
