"""The Triton kernels of the optimizer: right in Triton's interpreter, and few launches and bytes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cosmos_scale.kernels import adamw_ema
from cosmos_scale.profiling.operators import DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton

pytestmark = needs_triton

MEASURED = ("weights", "first", "second", "averages", "from torch", "norm")
EXACT = ("wrong copies", "changed by a skipped update", "stray writes")
SIZES = (1, 2048, 5000, 33)


def test_the_interpreted_kernels_equal_float64_at_odd_sizes() -> None:
    rows = json_lines("-m", "tests.kernels.interpret_adamw_ema", interpret=True)
    assert len(rows) == 6
    for row in rows:
        found = row["found"]
        assert found.keys() == {*MEASURED, *EXACT}
        for name in MEASURED:
            assert found[name] <= tolerance(f"adamw_ema {name}", torch.float32), (row["case"], name)
        assert [found[name] for name in EXACT] == [0, 0, 0], row["case"]


@pytest.mark.parametrize("shards", [1, 200])
def test_an_update_is_one_launch_for_all_shards_and_moves_40_bytes_an_element(shards: int) -> None:
    elements = 1000
    lists = [_empty([elements] * shards, torch.float32, "meta") for _ in range(4)]
    gradients, *copies = (_empty([elements] * shards, torch.bfloat16, "meta") for _ in range(3))
    found = {}
    for triton in (True, False):
        with DeviceCounter() as counter:
            _update(lists, gradients, copies, triton=triton)
        found[triton] = {name: count for (_, name), count in counter.counts.items()}
    count = found[True]["adamw_ema_update"]
    # Beside the elements: the steps, and what all elements share.
    assert (count.launches, count.nbytes) == (1, (38 * elements + 8) * shards + 24)
    assert set(found[True]) - {"adamw_ema_update"} == {"adamw_ema_numbers", "zeros"}  # zeros: the steps of this test
    assert "adamw_ema_update" not in found[False]


def test_the_norm_reads_the_gradients_once() -> None:
    gradients = _empty([100_000] * 3, torch.bfloat16, "meta")
    with DeviceCounter() as counter:
        adamw_ema.squared_norm(gradients)
    counts = {name: count for (_, name), count in counter.counts.items()}
    assert (counts["gradient_squares"].launches, counts["gradient_squares"].read) == (1, 2 * 300_000)
    assert sum(count.launches for count in counts.values()) == 2


def test_shards_of_other_sizes_are_refused() -> None:
    from cosmos_scale.kernels import shard_table

    with pytest.raises(ValueError, match=r"\[3\] and \[2\] elements must agree"):
        shard_table.table_of(([torch.zeros(2)], [torch.zeros(3)]), 64)
    with pytest.raises(ValueError, match="contiguous"):
        shard_table.table_of(([torch.zeros(4, 4).T],), 64)


@pytest.mark.gpu
@pytest.mark.parametrize("average_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernels_equal_torch(average_first: bool, dtype: torch.dtype) -> None:
    results = []
    for triton in (True, False):
        torch.manual_seed(0)
        lists = [[torch.rand(size, device="cuda") for size in SIZES] for _ in range(4)]
        copies = [_empty(SIZES, torch.bfloat16, "cuda") for _ in range(2)]
        gradients = [torch.randn(size, device="cuda", dtype=dtype) for size in SIZES]
        steps = _update(lists, gradients, copies, triton=triton, average_first=average_first)
        norm = adamw_ema.squared_norm(gradients, triton=triton)
        before = [tensor.clone() for tensors in lists for tensor in tensors]
        torch.cuda.set_sync_debug_mode("error")
        try:
            broken = [torch.full_like(gradient, torch.nan) for gradient in gradients]
            _update(lists, broken, copies, triton=triton, average_first=average_first, skip=torch.ones_like(norm))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = [tensor for tensors in lists for tensor in tensors]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))
        results.append([*after, *steps, norm])
        for copy, whole in zip((*copies[0], *copies[1]), (*lists[0], *lists[3]), strict=True):
            assert torch.equal(copy, whole.to(copy.dtype))
    limit = tolerance("adamw_ema on a GPU from torch", torch.float32)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit / 10)


def _empty(sizes: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype, device=device) for size in sizes]


def _update(
    lists: Sequence[list[Tensor]],
    gradients: list[Tensor],
    copies: Sequence[list[Tensor]],
    *,
    triton: bool,
    average_first: bool = True,
    skip: Tensor | None = None,
) -> list[Tensor]:
    """Update weights, moments and averages, whose lists these are; return the steps."""
    weights, first, second, averages = lists
    steps = [torch.zeros((), device=weights[0].device) for _ in weights]
    adamw_ema.adamw_ema_(
        *(weights, gradients, first, second, averages, steps),
        weight_copies=copies[0],
        average_copies=copies[1],
        lr=1e-3,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.5,
        momentum=0.99,
        average_first=average_first,
        skip=torch.zeros((), device=weights[0].device) if skip is None else skip,
        triton=triton,
    )
    return steps
