"""How many bytes the project's kernels move, beside the same by other libraries' operators; counted without a GPU.

Each is called on tensors without memory, and the bytes of its operands are added up: see
cosmos_scale/profiling/operators.py.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/kernel_bytes.py`

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.kernels import adamw_ema, pointwise
from cosmos_scale.profiling.operators import META, DeviceCounter, total

TOKENS, WIDTH = 39_424, 768  # of the student's crops at 64 samples, ViT-B/16
ELEMENTS = 152_382_466


def moved(call: Callable[[], object]) -> int:
    """Return the bytes that a call reads and writes."""
    with DeviceCounter() as counter:
        call()
    return total(counter.by_group().values()).nbytes


def norm_passes(*, own: bool) -> float:
    """Return how often an addition and its norm read or write a token's row, forward and backward, with the bias sum.

    own: by the project's kernel, else by torch's operators, where the preceding product has added the bias.
    """
    x, update, of_total, of_normed = (torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device=META) for _ in range(4))
    gain, shift, bias = (torch.empty(WIDTH, dtype=torch.bfloat16, device=META) for _ in range(3))
    inputs = [tensor.requires_grad_() for tensor in (x, update, gain, shift)]

    def call() -> None:
        if own:
            outputs = pointwise.add_norm(x, update, bias.requires_grad_(), gain, shift, 1e-5)
            torch.autograd.grad(outputs, [*inputs, bias], (of_total, of_normed))
            return
        both = x + update
        normed = functional.layer_norm(both, (WIDTH,), gain, shift)
        _, by_update, _, _ = torch.autograd.grad((both, normed), inputs, (of_total, of_normed))
        by_update.sum(0)

    return moved(call) / (x.numel() * x.element_size())


def update_bytes(*, own: bool, gradient: torch.dtype) -> float:
    """Return the bytes an element that AdamW, the average, and the weights of student and teacher in bf16 take.

    own: by the project's kernel in one pass, else by a fused AdamW, which is apex's FusedAdam by its operands, an
    average and two copies.
    """
    weights, first, second, average = (torch.empty(ELEMENTS, device=META) for _ in range(4))
    gradients = torch.empty(ELEMENTS, dtype=gradient, device=META)
    copies = [torch.empty(ELEMENTS, dtype=torch.bfloat16, device=META) for _ in range(2)]
    steps: list[Tensor] = [torch.empty((), device=META)]
    betas = (0.9, 0.98)

    def own_call() -> None:
        adamw_ema.adamw_ema_(
            *([weights], [gradients], [first], [second], [average], steps),
            weight_copies=copies[:1],
            average_copies=copies[1:],
            lr=1e-4,
            betas=betas,
            eps=1e-8,
            weight_decay=0.5,
            momentum=0.99,
            average_first=True,
            skip=torch.empty((), device=META),
            triton=True,
        )

    def others() -> None:
        torch._fused_adamw_(
            *([weights], [gradients], [first], [second], [], steps),
            lr=1e-4,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.5,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        torch._foreach_lerp_([average], [weights], 0.01)
        copies[0].copy_(weights)
        copies[1].copy_(average)

    if own:
        return moved(own_call) / ELEMENTS
    # Its schema lets torch's operator write gradients, for where it unscales them: it does not here.
    return (moved(others) - gradients.nbytes) / ELEMENTS


def figures() -> list[Figure]:
    """Count all."""
    rows = "times a token's row; addition and norm, forward and backward with the bias sum"
    found = [
        Figure("norm_passes", norm_passes(own=True), "passes", f"{rows}, by one kernel each"),
        Figure("norm_passes_torch", norm_passes(own=False), "passes", f"{rows}, by torch's operators"),
    ]
    state = update_bytes(own=True, gradient=torch.bfloat16) - 3 * torch.bfloat16.itemsize
    found.append(Figure("update_bytes_state", state, "bytes/element", "weight, moments and average, read and written"))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        note = f"AdamW, average, both copies in bf16; gradients in {name}"
        found.append(Figure(f"update_bytes_{name}", update_bytes(own=True, gradient=dtype), "bytes/element", note))
    note += "; a fused AdamW and further passes"
    separate = update_bytes(own=False, gradient=torch.float32)
    return [*found, Figure("update_bytes_float32_separate", separate, "bytes/element", note)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("kernel_bytes", (__doc__ or "").partition("\n")[0], ("", "--json bytes.json"))
    arguments = parser.parse_args(argv)
    report("Bytes of kernels", figures(), arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
