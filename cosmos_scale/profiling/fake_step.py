"""One rank of many does the project's own step, without other ranks and without the work: what it asks for is noted.

Engine, loss, optimizer and train_step are the real ones. Tensors are those of `fake_device.py`, ranks those of
`fake_ranks.py`. Both are for good in a process: `fake_run.py` gives the count a process of its own.
"""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cosmos_scale.batch import Batch, Features, TeacherFeatures
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.student import Student, Update
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.kernels.serving import cpu_stands_for_gpu
from cosmos_scale.loss import CosmosLoss, LossOutput
from cosmos_scale.profiling.collectives import Collective
from cosmos_scale.profiling.counts import Counts, Exchange, OperatorCount, PhaseMemory
from cosmos_scale.profiling.fake_device import FakeDevice
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.operators import group_of
from cosmos_scale.profiling.planned_batch import planned_batch
from cosmos_scale.profiling.states import tensors_by_part
from cosmos_scale.step import train_step

WARM_UP = 3  # steps: DeepSpeed makes some of its buffers in the first, and learns the order of gathers until the third
CPU = torch.device("cpu")


def count_fake_step(config: RunConfig, world_size: int, lengths_KB: Tensor, *, as_gpu: bool, rank: int = 0) -> Counts:
    """Count a step of one of so many ranks. In a process of its own.

    lengths: [K, B] int64, the tokens of each caption: B is the number of samples of a rank, and the global batch's
    share of it. as_gpu: count what a GPU would run; else what a CPU runs.
    """
    started = time.perf_counter()
    samples = lengths_KB.shape[1]
    config = _on_cpu(config, world_size * samples)
    ranks = start_fake_ranks(world_size, rank)
    device = FakeDevice(as_gpu=as_gpu)
    with ExitStack() as contexts:
        if as_gpu:
            contexts.enter_context(cpu_stands_for_gpu())
        contexts.enter_context(device)
        student, teacher = drawn_pair(config, ranks)
        loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
        batch = planned_batch(config, lengths_KB, CPU)
        for parameter in student.model.parameters():
            parameter.register_hook(_gradient_hook(device))
        for _ in range(WARM_UP):
            _step(student, teacher, loss, batch, lambda _: None)
        gc.collect()
        device.allocations.own(batch, "batch")
        for part, tensors in tensors_by_part(student, teacher).items():
            device.allocations.own(tensors, part)
        device.begin()
        _step(student, teacher, loss, batch, device.enter_phase)
        memory = device.allocations.peaks()
    return Counts(
        world_size=world_size,
        rank=rank,
        samples=samples,
        stage=config.zero.stage,
        precision=config.precision,
        recompute=config.train.recompute,
        micro_batches=config.train.micro_batches,
        as_gpu=as_gpu,
        elements=sum(getattr(weight, "ds_numel", weight.numel()) for weight in student.model.parameters()),
        exchanges=_exchanges(device.collectives),
        operators=tuple(
            OperatorCount(phase, group_of(name), name, shape, dtype, *count)
            for (phase, name, shape, dtype), count in device.operators.items()
        ),
        memory=tuple(PhaseMemory(*peak) for peak in memory),
        host_calls=device.calls,
        seconds=time.perf_counter() - started,
    )


def _on_cpu(config: RunConfig, global_batch: int) -> RunConfig:
    train = config.train.model_copy(update={"global_batch": global_batch})
    return config.model_copy(update={"device": "cpu", "train": train})


def _gradient_hook(device: FakeDevice) -> Callable[[Tensor], None]:
    def arrives(gradient: Tensor) -> None:
        device.allocations.own([gradient], "gradients")

    return arrives


def _step(
    student: Student, teacher: Teacher, loss: CosmosLoss, batch: Batch, enter_phase: Callable[[str], None]
) -> None:
    """Do the project's step; say as each of its phases begins."""
    phased_student: Any = _PhasedStudent(student, enter_phase)
    phased_teacher: Any = _PhasedTeacher(teacher, enter_phase)
    phased_loss: Any = _PhasedLoss(loss, enter_phase)
    train_step(phased_student, phased_teacher, phased_loss, batch, lr=1e-4, momentum=0.99)


class _PhasedStudent:
    """A student that says as a phase of its begins."""

    def __init__(self, student: Student, enter_phase: Callable[[str], None]) -> None:
        self._student, self._enter_phase = student, enter_phase
        self.with_full_scales = student.with_full_scales

    def __call__(self, batch: Batch) -> Features:
        self._enter_phase("student")
        return self._student(batch)

    def backward(self, batch: Batch, features: Features, gradients: Features) -> None:
        self._enter_phase("backward")
        self._student.backward(batch, features, gradients)

    def update(self, *, lr: float, momentum: float, finite: Tensor) -> Update:
        self._enter_phase("update")
        return self._student.update(lr=lr, momentum=momentum, finite=finite)


class _PhasedTeacher:
    """A teacher that says as a phase of its begins."""

    def __init__(self, teacher: Teacher, enter_phase: Callable[[str], None]) -> None:
        self._teacher, self._enter_phase = teacher, enter_phase

    def __call__(self, batch: Batch) -> TeacherFeatures:
        self._enter_phase("teacher")
        return self._teacher(batch)

    def refresh(self) -> None:
        self._enter_phase("refresh")
        self._teacher.refresh()


class _PhasedLoss:
    """A loss that says as its phase begins."""

    def __init__(self, loss: CosmosLoss, enter_phase: Callable[[str], None]) -> None:
        self._loss, self._enter_phase = loss, enter_phase

    def __call__(self, features: Features, teacher: TeacherFeatures) -> LossOutput:
        self._enter_phase("loss")
        return self._loss(features, teacher)


def _exchanges(collectives: list[Collective]) -> tuple[Exchange, ...]:
    """Return collectives, those that are alike together, in the order of their first."""
    calls: dict[tuple[str, str, str, int], int] = {}
    for found in collectives:
        key = (found.phase, found.kind, str(found.dtype).removeprefix("torch."), found.nbytes)
        calls[key] = calls.get(key, 0) + 1
    return tuple(Exchange(*key, count) for key, count in calls.items())
