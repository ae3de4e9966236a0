"""What is counted of operators: launches, bytes, matrix products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosmos_scale.profiling.operators import META, Count, DeviceCounter, total


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# float32 of [4, 6] takes 96 bytes, [6, 8] 192, [4, 8] 128.
OPERATORS: dict[str, tuple[Callable[[], object], Count]] = {
    "a product": (lambda: tensor(4, 6) @ tensor(6, 8), Count(1, 96 + 192, 128, 2 * 4 * 6 * 8)),
    "a product with a sum": (
        lambda: torch.addmm(tensor(8), tensor(4, 6), tensor(6, 8)),
        Count(1, 32 + 96 + 192, 128, 2 * 4 * 6 * 8),
    ),
    "a sum": (lambda: tensor(4, 6) + tensor(4, 6), Count(1, 192, 96)),
    "in place": (lambda: tensor(4, 6).add_(tensor(4, 6)), Count(1, 192, 96)),
    "a fill": (lambda: tensor(4, 6).zero_(), Count(1, 0, 96)),
    "a copy to another dtype": (lambda: tensor(4, 6).copy_(tensor(4, 6, dtype=torch.bfloat16)), Count(1, 48, 96)),
    "a product into memory that exists": (
        lambda: torch.mm(tensor(4, 6), tensor(6, 8), out=tensor(4, 8)),
        Count(1, 96 + 192, 128, 2 * 4 * 6 * 8),
    ),
    "expanded": (lambda: tensor(4, 6) * tensor(6).expand(4, 6), Count(1, 96 + 24, 96)),
    "rows of a table": (
        lambda: tensor(1000, 6).index_select(0, tensor(4, dtype=torch.int64)),
        Count(1, 4 * 8 + 96, 96),
    ),
    "several tensors": (lambda: torch._foreach_mul_([tensor(4), tensor(6)], 2.0), Count(1, 40, 40)),
    "views and reserved memory": (lambda: torch.empty_like(tensor(4, 6).t()[1:].unflatten(1, (2, 2))), Count()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_counts_its_bytes(name: str) -> None:
    call, expected = OPERATORS[name]
    with DeviceCounter() as counter:
        call()
    assert total(counter.counts.values()) == expected


def test_phases_keep_apart_what_runs_in_them() -> None:
    weight = tensor(6, 8).requires_grad_()
    counter = DeviceCounter()
    with counter:
        with counter.phase("forward"):
            result = (tensor(4, 6) @ weight).sum()
        with counter.phase("backward"):
            result.backward()
    product = 2 * 4 * 6 * 8
    assert counter.of_phase("forward").flops == counter.of_phase("backward").flops == product
    assert counter.by_group("backward")["products"] == Count(1, 96 + 4, 192, product)  # a sum's gradient: one number
