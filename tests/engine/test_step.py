"""A training step in one process: the average, the scales' bound, clipping, skipped steps, host waits."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_scale.batch import Features
from cosmos_scale.engine.optimizer import SCALE_RANGE
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, Tiny, build_tiny, tiny_batch, tiny_config, whole

STAGES = [0, 1, 2, 3]
STAGES_AND_PRECISIONS = [(stage, precision) for precision in ("fp32", "bf16") for stage in STAGES]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks("cpu")


@contextmanager
def running(ranks: Ranks, stage: int, precision: str = "fp32", teacher_seed: int = 0, **changes: Any) -> Iterator[Tiny]:
    config = tiny_config(zero={"stage": stage}, precision=precision, **changes)
    tiny = build_tiny(config, ranks, teacher_seed=teacher_seed)
    yield tiny
    tiny.close()


WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Operations(TorchDispatchMode):
    """The names of all operations that Python or the backward calls; not of those inside an operation's CPU code."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.waits = 0  # of the host for the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        self.names.add(name)
        self.waits += name in WAITING
        return func(*args, **(kwargs or {}))


def flat(tiny: Tiny, kind: str) -> dict[str, Tensor]:
    return whole([tiny.fragments()], kind)


@pytest.mark.parametrize("order", ["before_step", "after_step"])
@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_teacher_is_the_average_of_the_students_masters(ranks: Ranks, stage: int, precision: str, order: str) -> None:
    with running(ranks, stage, precision, teacher_seed=1, ema={"order": order}) as tiny:
        expected = {name: tensor.double() for name, tensor in flat(tiny, "ema").items()}
        start = {name: tensor.clone() for name, tensor in expected.items()}
        for step in range(4):
            before = flat(tiny, "weight")
            tiny.step(step, momentum=0.9)
            source = before if order == "before_step" else flat(tiny, "weight")
            expected = {name: 0.9 * tensor + 0.1 * source[name].double() for name, tensor in expected.items()}
        moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
        assert moved > 0.01
        for name, average in flat(tiny, "ema").items():
            # Four fp32 interpolations of values around 1 against float64.
            torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=1e-6)
        with tiny.teacher.whole_model() as model:
            teacher = dict(model.named_parameters())
            for name, average in flat(tiny, "ema").items():
                assert torch.equal(teacher[name].flatten(), average.to(teacher[name].dtype)), name


@pytest.mark.parametrize("stage", [0, 1])
def test_fp32_numbers_are_held_once(ranks: Ranks, stage: int) -> None:
    """Weights, both moments and the average; masters and teacher are no copies, and the gradient is gone."""
    gc.collect()
    others = _storages()
    with running(ranks, stage) as tiny:
        tiny.step(0)
        gc.collect()
        held = sum(nbytes for place, nbytes in _storages().items() if place not in others)
        weights = sum(parameter.nbytes for parameter in tiny.student.model.parameters())
        # A tenth of a copy for tensors of another kind: padding of shards, the caches of layouts.
        assert 4 * weights <= held <= 4.1 * weights


def _storages() -> dict[int, int]:
    """The bytes of each piece of memory that some tensor lies in, by address."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_one_process_reduces_no_gradients(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stage 0 DeepSpeed would copy all of them into a buffer and back."""
    with running(ranks, 0) as tiny:
        tiny.step(0)
        batch = tiny_batch(1)
        features = tiny.student(batch)
        gradients = Features(*(torch.ones_like(feature) for feature in features))
        with Operations() as operations:
            tiny.student.backward(batch, features, gradients)
        assert "aten::native_layer_norm_backward" in operations.names
        assert not {"c10d::allreduce_", "aten::copy_"} & operations.names


def test_first_step_moves_no_teacher_in_the_published_order(ranks: Ranks) -> None:
    with running(ranks, 1) as tiny:
        before = flat(tiny, "ema")
        tiny.step(0)
        # a + 0.1 (w - a) with a equal to w is a itself.
        assert all(torch.equal(average, before[name]) for name, average in flat(tiny, "ema").items())


@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_low_precision_keeps_full_masters(ranks: Ranks, stage: int, precision: str) -> None:
    with running(ranks, stage) as reference, running(ranks, stage, precision) as tiny:
        # DeepSpeed makes its masters from the low-precision copy; ours start from the float32 weights.
        expected = flat(reference, "weight")
        assert all(torch.equal(weight, expected[name]) for name, weight in flat(tiny, "weight").items())
        tiny.step(0)
        masters = flat(tiny, "weight")
        with tiny.student.whole_model() as model:
            for name, copy in model.named_parameters():
                assert torch.equal(copy.flatten(), masters[name].to(copy.dtype)), name


@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_scales_stay_at_their_bound(ranks: Ranks, stage: int, precision: str) -> None:
    with running(ranks, stage, precision) as tiny:
        tiny.step(0)
        scales = [fragment for fragment in tiny.student.fragments if fragment.name.endswith("logit_scale")]
        assert len(scales) == 2
        bounds = {}
        for fragment in scales:  # to the bound that its first gradient pushes against
            bounds[fragment.name] = SCALE_RANGE[1] if fragment.exp_avg.item() < 0 else SCALE_RANGE[0]
            fragment.weight.fill_(bounds[fragment.name])
        tiny.student.publish()
        for step in range(1, 4):
            tiny.step(step, lr=0.05)
            for fragment in scales:
                assert fragment.weight.item() == pytest.approx(bounds[fragment.name], abs=1e-7)
                assert SCALE_RANGE[0] <= fragment.ema.item() <= math.log(100) + 1e-6
        with tiny.student.whole_model() as model:
            parameters = dict(model.named_parameters())
            for name, bound in bounds.items():
                assert parameters[name].item() == torch.tensor(bound).to(parameters[name].dtype).item()


@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_clipping_scales_the_gradient_and_reports_its_norm(ranks: Ranks, stage: int, precision: str) -> None:
    with running(ranks, stage, precision, optimizer={"warmup_steps": 0}) as tiny:
        norm, gradient = tiny.step(0).gradient_norm.item(), flat(tiny, "exp_avg")
    clip = norm / 10
    with running(ranks, stage, precision, optimizer={"warmup_steps": 0, "clip_norm": clip}) as tiny:
        # DeepSpeed adds 1e-6 to the norm before it divides.
        assert tiny.step(0).gradient_norm.item() == pytest.approx(norm, rel=1e-4)
        for name, clipped in flat(tiny, "exp_avg").items():
            torch.testing.assert_close(clipped * 10, gradient[name], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
def test_a_gradient_that_is_not_finite_changes_nothing(
    ranks: Ranks, stage: int, precision: str, clip_norm: float | None
) -> None:
    with running(ranks, stage, precision, optimizer={"warmup_steps": 0, "clip_norm": clip_norm}) as tiny:
        tiny.step(0)
        before = tiny.fragments()
        weight = tiny.student.model.visual.proj
        hook = weight.register_hook(lambda gradient: gradient + torch.inf)
        output = tiny.step(1)
        hook.remove()
        assert bool(output.total.isfinite())
        assert not bool(output.finite)
        assert tiny.student.updates == 1
        for key, tensors in tiny.fragments().items():
            for kind, tensor in tensors.items():
                assert torch.equal(tensor, before[key][kind]), (key, kind)
        assert bool(tiny.step(2).finite)
        assert tiny.student.updates == 2


@pytest.mark.parametrize("stage", STAGES)
def test_loss_reads_the_scales_in_full_precision(ranks: Ranks, stage: int) -> None:
    with running(ranks, stage, "bf16") as tiny:
        for step in range(3):
            scales = [fragment for fragment in tiny.student.fragments if fragment.name.endswith("logit_scale")]
            masters = {fragment.name: fragment.weight.item() for fragment in scales}
            output = tiny.step(step, lr=1e-4)  # moves the scale by less than bf16's spacing of 2^-6
            assert output.logit_scale.item() == masters["logit_scale"]
            assert output.distill_logit_scale.item() == masters["distill_logit_scale"]
        assert masters["logit_scale"] != torch.tensor(masters["logit_scale"]).bfloat16().item()


UNAWAITED = [
    *((stage, precision, {}) for precision in ("fp32", "bf16") for stage in STAGES),
    *((stage, "fp32", {"clip_norm": 1.0}) for stage in STAGES),
    *((stage, "fp32", {"micro_batches": 2, "recompute": 1}) for stage in STAGES),
]


@pytest.mark.parametrize(("stage", "precision", "changes"), UNAWAITED, ids=str)
def test_in_a_step_nothing_waits_for_the_host(
    ranks: Ranks, stage: int, precision: str, changes: dict[str, Any]
) -> None:
    """Not tested: offloading, whose states are the host's, and fp16, whose loss scaler is DeepSpeed's."""
    optimizer = {"warmup_steps": 0, "clip_norm": changes.get("clip_norm")}
    train: dict[str, Any] = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100}
    train |= {key: value for key, value in changes.items() if key != "clip_norm"}
    with running(ranks, stage, precision, optimizer=optimizer, train=train) as tiny:
        for step in range(2 if stage == 3 else 1):  # DeepSpeed sets up some of its buffers, and its order at stage 3
            tiny.step(step)
        batch = tiny_batch(2)
        with Operations() as operations:
            tiny.step(2, batch=batch)
        assert {"aten::addmm", "aten::_fused_adamw_"} <= operations.names
        assert operations.waits == 0


def test_a_waiting_host_would_be_noticed() -> None:
    with Operations() as operations:
        float(torch.ones(2).sum())
    assert "aten::_local_scalar_dense" in operations.names


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_skips_on_overflow_but_moves_the_teacher(
    ranks: Ranks, stage: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    # torch computes in fp16 on any CPU, slowly; DeepSpeed only wants those that are fast at it.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100, "micro_batches": micro_batches}
    with running(ranks, stage, "fp16", teacher_seed=1, train=train) as tiny:
        overflowing = {"cur_scale": 2.0**40}
        tiny.student.layout.set_loss_scaler(overflowing)
        before, average = flat(tiny, "weight"), flat(tiny, "ema")
        output = tiny.step(0, momentum=0.9)
        assert bool(output.finite)
        assert tiny.student.updates == 0
        assert tiny.student.layout.loss_scaler()["cur_scale"] <= 2.0**40
        for name, weight in flat(tiny, "weight").items():
            assert torch.equal(weight, before[name]), name
            moved = 0.9 * average[name].double() + 0.1 * before[name].double()
            torch.testing.assert_close(flat(tiny, "ema")[name].double(), moved, atol=1e-6, rtol=1e-6)
        tiny.student.layout.set_loss_scaler({"cur_scale": 1024.0})
        losses = [tiny.step(0).total.item() for _ in range(5)]
        assert tiny.student.updates == 5
        assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_steps_give_the_same_bits(ranks: Ranks, stage: int) -> None:
    states = []
    for _ in range(2):
        with running(ranks, stage) as tiny:
            for step in range(3):
                tiny.step(step)
            states.append(tiny.fragments())
    for key, tensors in states[0].items():
        for kind, tensor in tensors.items():
            assert torch.equal(tensor, states[1][key][kind]), (key, kind)


def test_bf16_follows_fp32(ranks: Ranks) -> None:
    with running(ranks, 1) as exact, running(ranks, 1, "bf16") as low:
        for step in range(6):
            reference, output = exact.step(step), low.step(step)
            # bf16 has 8 bits: features differ by up to 2^-8, logits by the scale 14 times that.
            assert output.total.item() == pytest.approx(reference.total.item(), abs=0.03)


def test_learning_lowers_the_loss(ranks: Ranks) -> None:
    with running(ranks, 1) as tiny:
        losses = [tiny.step(0, batch=tiny_batch(0)).total.item() for _ in range(8)]
        assert losses[-1] < losses[0] - 0.5
