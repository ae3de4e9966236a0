"""The report's rows of the project's kernels: each moves the bytes from which its rate is computed."""

from pathlib import Path

import torch
from torch import Tensor

from cosmos_scale.profiling.operators import META, DeviceCounter, total
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton
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


def test_the_errors_of_the_kernels_are_found_by_the_report_as_by_the_tests(tmp_path: Path) -> None:
    """In Triton's interpreter, small; and a kernel that is wrong has a large error."""
    code = f"""
import json
from pathlib import Path
from cosmos_scale.kernels import pointwise
from tools.gpu_stages import kernel_errors
from tools.gpu_stages.recorder import Recorder
kernel_errors.ROWS, kernel_errors.WIDTH, kernel_errors.HEADS = 7, 72, 3
recorder = Recorder(Path({str(tmp_path)!r}), "kernels", device="cpu", tiny=True, began=0.0)
checks = (kernel_errors._norm, kernel_errors._gelu, kernel_errors._stack)
errors = [check(recorder) for check in checks]
right = pointwise.gelu
pointwise.gelu = lambda x, bias: right(x, bias) * 1.01
print(json.dumps([errors, kernel_errors._gelu(recorder)]))
"""
    ((errors, wrong),) = json_lines("-c", code, interpret=True)
    limit = tolerance("pointwise, relative", torch.float32)
    assert max(errors) <= limit < wrong
