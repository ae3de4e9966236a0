"""The Triton kernels of the optimizer in Triton's interpreter against float64: prints a json line for each case.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET.
"""

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cosmos_scale.kernels import adamw_ema, triton_adamw_ema

LR, BETAS, EPS, MOMENTUM = 1e-2, (0.9, 0.98), 1e-8, 0.9
CLAMP = (-0.5, 0.75)
UPDATES = 4
ROOM = 5  # elements around each shard, which nothing may touch


class Case(NamedTuple):
    """sizes: of the shards. offset: of each shard's first element in its memory. copy: dtype of the copies, if any."""

    name: str
    sizes: tuple[int, ...]
    offset: int = ROOM
    average_first: bool = True
    weight_decay: float = 0.5
    clamp: tuple[float, float] | None = None
    gradient_factor: float = 1.0
    gradient: torch.dtype = torch.float32
    copy: torch.dtype | None = None


CASES = (
    Case("one flat shard", (1000,), offset=8),
    Case("a shard of whole blocks, the average after the step", (256,), offset=8, average_first=False),
    Case("many shards, odd sizes, none aligned", (1, 0, 63, 64, 65, 1000, 7), copy=torch.float16),
    Case("no weight decay, fp16 gradients", (333, 5), weight_decay=0.0, gradient=torch.float16, copy=torch.float16),
    Case("clamped scales, the average after the step", (2,), average_first=False, clamp=CLAMP, copy=torch.float32),
    Case("clipped gradients", (130, 70), gradient_factor=0.125, copy=torch.float16),
)


class Shards:
    """Shards in the middle of larger tensors, whose rest must stay as it is."""

    def __init__(self, case: Case) -> None:
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.case = case
        self.weights, self.averages = self._drawn(0), self._drawn(1)
        self.first, self.second = self._drawn(None), self._drawn(None)
        self.steps = [torch.zeros(()) for _ in case.sizes]
        copied = () if case.copy is None else case.sizes
        self.weight_copies, self.average_copies = (
            [self._shard(torch.zeros(size, dtype=case.copy)) for size in copied] for _ in range(2)
        )

    def update(self, gradients: Sequence[Tensor], skip: float) -> None:
        """Update by the Triton kernels, which are forced: the tensors are on the CPU."""
        adamw_ema.adamw_ema_(
            *(self.weights, gradients, self.first, self.second, self.averages, self.steps),
            weight_copies=self.weight_copies,
            average_copies=self.average_copies,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=self.case.weight_decay,
            momentum=MOMENTUM,
            average_first=self.case.average_first,
            clamp=self.case.clamp,
            gradient_factor=torch.tensor(self.case.gradient_factor),
            skip=torch.tensor(skip),
        )

    def tensors(self) -> list[Tensor]:
        """Copies of everything that an update may write."""
        lists = (self.weights, self.first, self.second, self.averages, self.weight_copies, self.average_copies)
        return [tensor.clone() for tensors in (*lists, self.steps) for tensor in tensors]

    def stray_writes(self) -> int:
        """How many elements beside the shards were written."""
        return sum(int((memory != before).sum()) for memory, before in self._around())

    def _around(self) -> list[tuple[Tensor, Tensor]]:
        pieces = []
        for memory, shard in self.memory:
            end = self.case.offset + shard.numel()
            for piece in (memory[: self.case.offset], memory[end:]):
                pieces.append((piece, torch.full_like(piece, 7.0)))
        return pieces

    def _drawn(self, seed: int | None) -> list[Tensor]:
        drawn = draw(self.case.sizes, seed) if seed is not None else [torch.zeros(size) for size in self.case.sizes]
        return [self._shard(tensor) for tensor in drawn]

    def _shard(self, values: Tensor) -> Tensor:
        memory = torch.full((self.case.offset + values.numel() + ROOM,), 7.0, dtype=values.dtype)
        shard = memory.narrow(0, self.case.offset, values.numel())
        self.memory.append((memory, shard.copy_(values)))
        return shard


def draw(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Draw a tensor of each size; equal seeds draw equal tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def gradients_of(case: Case, step: int) -> list[Tensor]:
    """Draw a step's gradients."""
    return [gradient.to(case.gradient) for gradient in draw(case.sizes, 100 + step)]


def exact(case: Case) -> dict[str, list[Tensor]]:
    """Return weights, moments and averages after all updates, by the formulas in float64."""
    weights, averages = ([t.double() for t in draw(case.sizes, seed)] for seed in (0, 1))
    first, second = ([torch.zeros_like(t) for t in weights] for _ in range(2))
    for step in range(1, UPDATES + 1):
        for i, gradient in enumerate(gradients_of(case, step)):
            scaled = gradient.double() * case.gradient_factor
            before = weights[i]
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * scaled
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * scaled**2
            unbiased = first[i] / (1 - BETAS[0] ** step), second[i] / (1 - BETAS[1] ** step)
            weights[i] = before - LR * (unbiased[0] / (unbiased[1].sqrt() + EPS) + case.weight_decay * before)
            averaged = before if case.average_first else weights[i]
            averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * averaged
            if case.clamp is not None:
                weights[i] = weights[i].clamp(*case.clamp)
    return {"weights": weights, "first": first, "second": second, "averages": averages}


def by_torch(case: Case) -> list[Tensor]:
    """Return the weights after all updates by torch's own AdamW."""
    weights = draw(case.sizes, 0)
    first, second = ([torch.zeros_like(t) for t in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]
    for step in range(1, UPDATES + 1):
        gradients = [gradient.float() * case.gradient_factor for gradient in gradients_of(case, step)]
        adamw(
            *(weights, gradients, first, second, [], steps),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=LR,
            weight_decay=case.weight_decay,
            eps=EPS,
            maximize=False,
        )
        if case.clamp is not None:
            weights = [weight.clamp_(*case.clamp) for weight in weights]
    return weights


def found(case: Case) -> dict[str, float]:
    """Return the largest errors by name, and counts that must be 0."""
    shards = Shards(case)
    for step in range(1, UPDATES + 1):
        shards.update(gradients_of(case, step), skip=0.0)
    state = {"weights": shards.weights, "first": shards.first, "second": shards.second, "averages": shards.averages}
    result = {name: _largest(state[name], wanted) for name, wanted in exact(case).items()}
    result["from torch"] = _largest(shards.weights, by_torch(case))
    results = (*shards.weights, *shards.averages) if case.copy is not None else ()
    copies = zip((*shards.weight_copies, *shards.average_copies), results, strict=True)
    result["wrong copies"] = sum(int((copy != whole.to(copy.dtype)).sum()) for copy, whole in copies)
    before = shards.tensors()
    shards.update([torch.full((size,), torch.nan, dtype=case.gradient) for size in case.sizes], skip=1.0)
    result["changed by a skipped update"] = sum(
        not torch.equal(mine, theirs) for mine, theirs in zip(shards.tensors(), before, strict=True)
    )
    result["stray writes"] = shards.stray_writes()
    gradients = gradients_of(case, 1)
    squares = sum((gradient.double().square().sum() for gradient in gradients), torch.zeros((), dtype=torch.float64))
    result["norm"] = ((adamw_ema.squared_norm(gradients) - squares).abs() / squares).item()
    return result


def _largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to numbers above 1."""
    both = zip(found, wanted, strict=True)
    errors = [((a.double() - b.double()).abs() / b.double().abs().clamp(min=1.0)).amax() for a, b in both if len(a)]
    return max(error.item() for error in errors)


def main() -> int:
    """Run all cases with small blocks, since the interpreter is slow."""
    triton_adamw_ema.BLOCKS = triton_adamw_ema.BlockSizes(update=64, norm=32, turns=3)
    adamw_ema.FUSED_DEVICES = frozenset({"cpu"})
    for case in CASES:
        print(json.dumps({"case": case.name, "found": found(case)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
