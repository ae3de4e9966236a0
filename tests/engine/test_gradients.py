"""Gradients averaged over the ranks in buckets, against float64; what a step sends, at up to 1,024 ranks."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_scale.engine.gradients import MOST_IN_FLIGHT, GradientBuckets, cut_groups
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import build_tiny, tiny_batch, tiny_config

SHAPES = [(5, 7), (3,), (2, 2, 2), (11,), (1,), (4, 3)]
GROUPS = [[0, 1], [2, 3, 4], [5]]
UNUSED, UNUSED_ON_THE_LAST_RANK, USED_TWICE = 1, 3, 2
UPDATES = 3


class Case(NamedTuple):
    """How gradients are made and travel."""

    precision: str
    traffic: str
    micro_batches: int
    accumulates_whole: bool


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    *(Case(precision, "fp32", count, whole) for precision in DTYPES for count in (1, 3) for whole in (True, False)),
    *(Case(precision, "bf16", count, whole) for precision in ("fp32", "bf16") for count in (1, 2) for whole in (True,)),
    Case("bf16", "bf16", 2, False),
]


def slope(rank: int, update: int, micro_batch: int, number: int) -> Tensor:
    """The gradient that a rank gives a parameter in a micro-batch: float32."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * update + 10 * micro_batch + number)
    return torch.randn(SHAPES[number], generator=generator)


def used(number: int, rank: int, world_size: int) -> int:
    """How often the model of a rank uses a parameter."""
    if number == UNUSED or (number == UNUSED_ON_THE_LAST_RANK and rank == world_size - 1):
        return 0
    return 2 if number == USED_TWICE else 1


def run_cases(rank: int, world_size: int) -> dict[Case, list[list[Tensor]]]:
    """The shards of some updates of every case."""
    ranks = start_ranks("cpu")
    sizes = [-(-sum(torch.Size(SHAPES[n]).numel() for n in group) // world_size) * world_size for group in GROUPS]
    results: dict[Case, list[list[Tensor]]] = {}
    for case in CASES:
        dtype = DTYPES[case.precision]
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
        groups = [[parameters[number] for number in group] for group in GROUPS]
        buckets = GradientBuckets(
            groups, sizes, ranks, traffic=DTYPES[case.traffic], accumulates_whole=case.accumulates_whole
        )
        results[case] = []
        for update in range(UPDATES):
            for micro_batch in range(case.micro_batches):
                terms = [
                    (parameter.float() * slope(rank, update, micro_batch, number).to(dtype).float()).sum()
                    for number, parameter in enumerate(parameters)
                    for _ in range(used(number, rank, world_size))
                ]
                with buckets.taken(last=micro_batch == case.micro_batches - 1) as shards:
                    torch.stack(terms).sum().backward()
                assert all(parameter.grad is None for parameter in parameters)
            results[case].append(shards)
    return results


@functools.cache
def results_of(world_size: int) -> list[dict[Case, list[list[Tensor]]]]:
    return run_ranks(run_cases, world_size)


def average(case: Case, world_size: int, update: int, group: list[int]) -> Tensor:
    """The same in float64, flat: the mean over ranks of the sum over micro-batches."""
    flats = []
    for number in group:
        total = torch.zeros(SHAPES[number], dtype=torch.float64)
        for rank in range(world_size):
            for micro_batch in range(case.micro_batches):
                gradient = slope(rank, update, micro_batch, number).to(DTYPES[case.precision]).double()
                # The sum of two uses is autograd's: it is rounded to the parameter's dtype, here without a loss.
                total += used(number, rank, world_size) * gradient
        flats.append(total.flatten() / world_size)
    return torch.cat(flats)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_are_the_average_in_float64(world_size: int, case: Case) -> None:
    results = results_of(world_size)
    # float32: sums of up to nine values around 1. bfloat16 on the way: 8 bits for each gradient and partial sum.
    tolerance = 2**-7 * case.micro_batches if case.traffic == "bf16" and world_size > 1 else 1e-6
    for update in range(UPDATES):
        for place, group in enumerate(GROUPS):
            shards = [result[case][update][place] for result in results]
            assert {shard.dtype for shard in shards} == {torch.float32}
            whole, expected = torch.cat(shards).double(), average(case, world_size, update, group)
            padding = whole[expected.numel() :]
            assert torch.equal(padding, torch.zeros_like(padding))
            torch.testing.assert_close(whole[: expected.numel()], expected, atol=tolerance, rtol=tolerance)


def test_float32_traffic_is_needed_for_that() -> None:
    """The bfloat16 gradients of the test above do lose digits in bfloat16 traffic."""
    case = Case("bf16", "bf16", 1, True)
    results = results_of(3)
    whole = torch.cat([result[case][0][0] for result in results])[:35].double()
    assert (whole - average(case, 3, 0, [0])).abs().max() > 1e-4


def test_a_gradient_after_its_bucket_left_is_told() -> None:
    parameters = [nn.Parameter(torch.zeros(3))]
    buckets = GradientBuckets([parameters], [4], start_ranks("cpu"), traffic=torch.float32, accumulates_whole=True)

    def backward_twice() -> None:
        with buckets.taken(last=True):
            parameters[0].sum().backward()
            parameters[0].sum().backward()

    with pytest.raises(AssertionError, match=r"another gradient for a parameter of \(3,\)"):
        backward_twice()


def test_groups_are_cut_where_they_are_full() -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 3, 9, 1, 1)]
    groups = [{"params": parameters[:4], "lr": 1.0}, {"params": parameters[4:], "lr": 2.0}]
    cut = cut_groups(groups, 5)
    assert [[parameter.numel() for parameter in group["params"]] for group in cut] == [[3, 3], [9], [1], [1]]
    assert [group["lr"] for group in cut] == [1.0, 1.0, 1.0, 2.0]


def test_what_comes_last_in_the_backward_is_cut_by_itself() -> None:
    """In a group that is cut: others first, then a small part, then parts as always; a small rest joins a part."""
    sizes = (3, 40, 40, 1, 8, 70, 90, 5)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    last = [parameters[place] for place in (0, 4, 5, 6, 7)]
    cut = cut_groups([{"params": parameters[:1]}, {"params": parameters}], 80, last)
    found = [[parameter.numel() for parameter in group["params"]] for group in cut]
    assert found == [[3], [40, 40, 1], [3, 8], [70, 90, 5]]


Seen = tuple[str, str, int, torch.dtype]


class Collectives(TorchDispatchMode):
    """The collectives that are called inside, in order: phase, name, elements and dtype of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "backward"
        self.seen: list[Seen] = []
        self.before_last_product = 0  # of those seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.numel())
            name = func.name().removeprefix("c10d::").partition(".")[0]
            self.seen.append((self.phase, name, largest.numel(), largest.dtype))
        elif func.name() == "aten::mm" and self.phase == "backward":
            self.before_last_product = len(self.seen)
        return func(*args, **(kwargs or {}))


TRAFFIC = [(1, "fp32"), (2, "fp32"), (1, "bf16")]  # stage, gradient_dtype


def record_steps(rank: int, world_size: int, ranks: int) -> list[tuple[list[Seen], int, list[int]]]:
    """The collectives of a step's backward and update on the first of some ranks, and the sizes of the flat groups.

    Beside the collectives: how many of them were called before the backward's last product.
    """
    fake = start_fake_ranks(ranks)
    loss, share = CosmosLoss("true"), tiny_batch(0, 1)
    found = []
    for stage, dtype in TRAFFIC:
        train = {"global_batch": ranks, "schedule_steps": 100}
        student, teacher = pair = drawn_pair(
            tiny_config(zero={"stage": stage, "gradient_dtype": dtype}, train=train), fake
        )
        for _ in range(2):  # the first backward finds the order in which buckets fill up
            features = student(share)
            output = loss(student.with_full_scales(features), teacher(share))
            with Collectives() as collectives:
                student.backward(share, features, output.gradients)
                collectives.phase = "update"
                student.update(lr=1e-4, momentum=0.99, finite=output.finite)
            teacher.refresh()
            _ = teacher.model
        sizes = [master.numel() * ranks for (master,) in student.layout.masters]
        found.append((collectives.seen, collectives.before_last_product, sizes))
        pair.close()
    return found


@functools.cache
def recorded(ranks: int) -> dict[tuple[int, str], tuple[list[Seen], int, list[int]]]:
    (found,) = run_ranks(record_steps, 1, ranks)
    return dict(zip(TRAFFIC, found, strict=True))


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("ranks", [8, 1024])
def test_a_step_sends_each_gradient_once(ranks: int, traffic: tuple[int, str]) -> None:
    """A reduce-scatter a bucket, of which a ring moves half as much as of an all-reduce, and most in the backward."""
    seen, before_last_product, sizes = recorded(ranks)[traffic]
    scattered = [(size, kind) for phase, name, size, kind in seen if "reduce_scatter" in name and phase != "update"]
    assert sorted(size for size, _ in scattered) == sorted(sizes)
    assert {kind for _, kind in scattered} == {DTYPES[traffic[1]]}
    assert MOST_IN_FLIGHT < len(sizes) <= 12
    # The rest of the collectives: the norm; the weights, a group at a time; the scales.
    others = [(phase, name) for phase, name, *_ in seen if "reduce_scatter" not in name]
    assert [phase for phase, _ in others] == ["update"] * (1 + len(sizes) + 1)
    assert max(size for _, name, size, _ in seen if name.startswith("allreduce")) == 1
    early = sum(size for _, _, size, _ in seen[:before_last_product])
    assert 0.5 * sum(sizes) <= early < sum(sizes)


def train_with(rank: int, world_size: int) -> dict[tuple[int, str], list[float]]:
    """Losses of four steps at every stage and dtype of the traffic."""
    ranks = start_ranks("cpu")
    losses = {}
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            zero, optimizer = {"stage": stage, "gradient_dtype": dtype}, {"warmup_steps": 0}
            tiny = build_tiny(tiny_config(zero=zero, optimizer=optimizer), ranks)
            losses[stage, dtype] = [tiny.step(step).total.item() for step in range(4)]
            tiny.close()
    return losses


def test_every_stage_trains_with_either_traffic() -> None:
    results = run_ranks(train_with, 2)
    assert results[0] == results[1]
    exact = results[0][0, "fp32"]
    for (stage, dtype), losses in results[0].items():
        # 8 bits of a gradient; Adam divides by its size: a weight moves by up to 2^-8 of the learning rate less.
        assert losses == pytest.approx(exact, abs=1e-5 if dtype == "fp32" else 2e-2), (stage, dtype)
        assert (losses == results[0][stage, "fp32"]) == (dtype == "fp32"), "the key changes nothing"


def test_one_process_keeps_three_groups() -> None:
    tiny = build_tiny(tiny_config(), start_ranks("cpu"))
    assert len(tiny.student.layout.masters) == 3
    tiny.close()
