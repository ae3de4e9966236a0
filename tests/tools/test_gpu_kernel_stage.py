"""The report's rows of the project's kernels: each moves the bytes from which its rate is computed."""

import torch
from torch import Tensor

from cosmos_scale.testing.device_counts import META, DeviceCounter, total
from tests.kernels.programs import needs_triton
from tools.gpu_stages.kernels import _own_pointwise

pytestmark = needs_triton


def test_each_call_moves_the_bytes_of_its_row() -> None:
    tokens, width = 8192, 768

    def drawn(*shape: int) -> Tensor:
        return torch.empty(shape, device=META, dtype=torch.bfloat16)

    x, wide = drawn(tokens, width).requires_grad_(), drawn(tokens, 4 * width).requires_grad_()
    gain = drawn(width).requires_grad_()
    calls = _own_pointwise(x, wide, drawn(tokens, width), drawn(tokens, 4 * width), gain)
    assert len(calls) == 4
    for name, (call, times) in calls.items():
        with DeviceCounter() as counter:
            call()
        moved = total(counter.counts.values()).nbytes / (2 * tokens * width)
        # Partial sums come to it: less with the 39,424 tokens of a step.
        assert times <= moved < 1.12 * times, (name, moved)
