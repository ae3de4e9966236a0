"""The published implementation's numbers on this device, in float32 and in bf16."""

from pathlib import Path

import torch

from cosmos_scale.engine.accumulate import surrogate
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.testing.tolerances import tolerance
from tools.check_golden import GROUPS, STUDENT_FEATURES, Golden
from tools.gpu_stages.recorder import Recorder

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "cosmos_tiny.safetensors"


def check(recorder: Recorder) -> None:
    """Write a row for each group of numbers in float32, and for each kind in bf16, where our kernels serve."""
    golden = Golden(FILE, "cuda" if recorder.on_gpu else "cpu")
    for name, group in GROUPS.items():
        worst = max(group.check(golden, 1), key=lambda difference: difference.value)
        recorder.write(group=name, worst=worst.value, of=worst.name, ok=worst.value <= group.tolerance)
    for kind, differences in bf16_differences(golden).items():
        largest, name = max((value, name) for name, value in differences.items())
        recorder.write(
            group=f"{kind} in bf16",
            worst=largest,
            of=name,
            ok=largest <= tolerance(f"golden {kind}", torch.bfloat16),
        )


def bf16_differences(golden: Golden) -> dict[str, dict[str, float]]:
    """Return by kind how far a step in bf16 is from the published numbers, which are of float32.

    Of features and losses the largest difference, of gradients the norm of all differences over the norm of all.
    """
    student, teacher = (golden.model(f"{name}.").to(torch.bfloat16) for name in ("student", "teacher"))
    features = student(golden.batch(0))
    taught = teacher.teacher_features(golden.batch(0), golden.global_captions())
    loss = CosmosLoss("true")(features, taught)
    surrogate(features, loss.gradients).backward()
    exact = golden.trajectory()
    losses = {"distill_loss": loss.distill, "clip_loss": loss.clip, "total_loss": loss.total}
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    distance = norm = 0.0
    for name, gradient in found.items():
        wanted = golden.tensor(f"step0.grad.{name}").float()
        ours = torch.zeros_like(wanted) if gradient is None else gradient.float().cpu().view(wanted.shape)
        distance, norm = distance + (ours - wanted).square().sum().item(), norm + wanted.square().sum().item()
    return {
        "features": {
            name: (getattr(features, field).detach().float().cpu() - golden.tensor(f"step0.student.{name}"))
            .abs()
            .max()
            .item()
            for field, name in STUDENT_FEATURES.items()
        },
        "losses": {name: abs(value.item() - exact[name][0].item()) for name, value in losses.items()},
        "gradients": {"all": (distance / norm) ** 0.5},
    }
