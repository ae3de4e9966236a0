"""A step whose update Triton's interpreter does, against one whose update torch does: a json line for each stage.

One step, from the same gradients: in the next, weights whose gradient is zero but for rounding would go either way.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET.
"""

import json
import sys

import torch
from torch import Tensor

from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.kernels import adamw_ema
from cosmos_scale.testing.tiny import build_tiny, tiny_config


def after_a_step(stage: int, kernels: str, ranks: Ranks) -> dict[str, Tensor]:
    """Return masters, moments, average, what the teacher's forward reads, the norm and the number of updates."""
    config = tiny_config(
        zero={"stage": stage},
        precision="fp32",
        kernels=kernels,
        train={"global_batch": 2, "schedule_steps": 100},
        optimizer={"warmup_steps": 0, "clip_norm": 1.0},
    )
    tiny = build_tiny(config, ranks, teacher_seed=1)
    output = tiny.step(0, lr=1e-3, momentum=0.9)
    found = {
        f"{kind} {name}": tensor.clone()
        for kind, tensors in tiny.fragments().items()
        for name, tensor in tensors.items()
    }
    with tiny.teacher.whole_model() as model:
        found |= {f"teacher {name}": weight.clone() for name, weight in model.named_parameters()}
    found |= {"norm": output.gradient_norm.clone(), "updates": torch.tensor(float(tiny.student.updates))}
    tiny.close()
    return found


def main() -> int:
    """Compare at every layout of ZeRO."""
    ranks = start_ranks("cpu")
    adamw_ema.FUSED_DEVICES = frozenset({"cpu"})
    for stage in (0, 1, 3):
        by_torch, by_triton = (after_a_step(stage, kernels, ranks) for kernels in ("torch", "auto"))
        differences = {
            name: ((by_triton[name] - tensor).abs() / tensor.abs().clamp(min=1.0)).max().item()
            for name, tensor in by_torch.items()
        }
        worst = max(differences, key=differences.__getitem__)
        updates = by_triton["updates"].item()
        row = {"stage": stage, "worst": worst, "difference": differences[worst], "updates": updates}
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
