"""The model with the Triton kernels in Triton's interpreter against the model without: a json line for each case.

A program of its own, for TRITON_INTERPRET. The kernels serve no float32 and no CPU elsewhere; here they are told to.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cosmos_scale.config import ModelConfig
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.kernels import triton_bias, triton_norm
from cosmos_scale.model import transformer
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, build_tiny, tiny_config
from tests.model.models import SMALL, initialised, small_batch

DEEP = SMALL.model_copy(
    update={
        "vision": SMALL.vision.model_copy(update={"layers": 3}),
        "text": SMALL.text.model_copy(update={"layers": 2}),
    }
)
QUICK = DEEP.model_copy(update={"activation": "quick_gelu"})
STEPS, LR = 2, 1e-3
# Stage of ZeRO, recompute, micro-batches.
CASES = ((1, 2, 1), (3, 1, 2))


def features_and_gradients(config: ModelConfig, kernels: Literal["auto", "torch"], recompute: int) -> dict[str, Tensor]:
    """Return the student's features, the teacher's, and the gradient of every parameter."""
    model, batch = initialised(config), small_batch(2)
    model.choose_kernels(kernels)
    model.recompute_blocks(recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # biases and gains that are all 0 or all 1 would hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    features = model(batch)
    named = {name: tensor for name, tensor in features._asdict().items() if not name.endswith("scale")}
    scalar = sum((tensor * torch.randn(tensor.shape, generator=generator)).sum() for tensor in named.values())
    torch.autograd.backward(scalar)
    taught = model.teacher_features(batch, 2)._asdict()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**named, **{f"teacher {name}": tensor for name, tensor in taught.items()}, **gradients}


def compare(config: ModelConfig, recompute: int) -> dict[str, Any]:
    """Return the largest error of any tensor, relative to its largest element, and how many were compared."""
    with_kernels = features_and_gradients(config, "auto", recompute)
    without = features_and_gradients(config, "torch", recompute)
    assert with_kernels.keys() == without.keys()
    errors = {}
    for name, wanted in without.items():
        found, expected = with_kernels[name], wanted
        if name.endswith("in_proj_bias"):  # the true gradient of the keys' third is zero
            found, expected = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (found, wanted))
        errors[name] = ((found - expected).abs().max() / expected.abs().max()).item()
    worst = max(errors, key=lambda name: errors[name])
    case = {"activation": config.activation, "recompute": recompute}
    return {**case, "tensors": len(errors), "worst": worst, "error": errors[worst]}


class Served:
    """Stands for `serves`: says yes, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, tensor: Tensor) -> bool:
        self.asked += 1
        return True


def serve_everywhere() -> Served:
    """Let the kernels serve every tensor of this process."""
    served = Served()
    triton_norm.ELEMENTS = triton_bias.ELEMENTS = 2**15  # the interpreter's time is that of its programs, not of tiles
    vars(transformer)["serves"] = served
    return served


def steps(rank: int, world_size: int, cases: Sequence[tuple[int, int, int]]) -> list[dict[str, list[list[float]]]]:
    """Return losses and gradient norms of steps through the engine, with kernels and without, for each case."""
    served, results = serve_everywhere(), []
    for stage, recompute, micro_batches in cases:
        train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100, "recompute": recompute}
        found = {}
        for kernels in ("auto", "torch"):
            config = tiny_config(zero={"stage": stage}, train=train | {"micro_batches": micro_batches}, kernels=kernels)
            tiny, before = build_tiny(config, start_ranks("cpu")), served.asked
            outputs = [tiny.step(step, lr=LR) for step in range(STEPS)]
            assert (served.asked > before) == (kernels == "auto")
            found[kernels] = [[output.total.item(), output.gradient_norm.item()] for output in outputs]
            tiny.close()
        results.append(found)
    return results


def main() -> int:
    """Compare the model alone, then, with the argument `engine`, steps on two ranks."""
    if "engine" in sys.argv[1:]:
        (found, _) = run_ranks(steps, 2, CASES, timeout=280.0)
        for (stage, recompute, micro_batches), numbers in zip(CASES, found, strict=True):
            case = {"stage": stage, "recompute": recompute, "micro_batches": micro_batches}
            print(json.dumps(case | numbers), flush=True)
        return 0
    served = serve_everywhere()
    for config, recompute in ((DEEP, 0), (DEEP, 1), (DEEP, 2), (QUICK, 2)):
        print(json.dumps(compare(config, recompute)), flush=True)
    assert served.asked
    return 0


if __name__ == "__main__":
    sys.exit(main())
