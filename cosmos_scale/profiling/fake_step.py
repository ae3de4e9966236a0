"""One rank of many does the project's own step, without other ranks and without the work: what it asks for is noted.

Engine, loss, optimizer and train_step are the real ones. Tensors are those of `fake_device.py`, ranks those of
`fake_ranks.py`. Both are for good in a process: `fake_run.py` gives the count a process of its own.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.memory import fullest_share_of_values
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.zero import layout_of
from cosmos_scale.kernels.serving import cpu_stands_for_gpu
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.collectives import Collective
from cosmos_scale.profiling.counts import Counts, Exchange, OperatorCount, PhaseMemory
from cosmos_scale.profiling.fake_device import FakeDevice
from cosmos_scale.profiling.operators import META, group_of
from cosmos_scale.profiling.phased_step import step_in_phases
from cosmos_scale.profiling.planned_batch import planned_batch
from cosmos_scale.profiling.states import elements_of, tensors_by_part

WARM_UP = 3  # steps: DeepSpeed makes some of its buffers in the first, and learns the order of gathers until the third
CPU = torch.device("cpu")


def count_fake_step(config: RunConfig, ranks: Ranks, lengths_KB: Tensor, *, as_gpu: bool) -> Counts:
    """Count a step of one of many ranks. In a process of its own.

    ranks: of `start_fake_ranks`. lengths: [K, B] int64, the tokens of each caption of a rank's B samples; the global
    batch is W times B, whatever the config says. as_gpu: count what a GPU would run; else what a CPU runs.
    """
    started = time.perf_counter()
    samples = lengths_KB.shape[1]
    config = _countable(config, ranks.world_size * samples, as_gpu=as_gpu)
    with META:
        model = CosmosModel(config.model)
    most = fullest_share_of_values(model, config, ranks.world_size) if layout_of(config).sharded else 0
    device = FakeDevice(as_gpu=as_gpu, most=most)
    with ExitStack() as contexts:
        if as_gpu:
            contexts.enter_context(cpu_stands_for_gpu())
        contexts.enter_context(device)
        pair = drawn_pair(config, ranks)
        student, teacher = pair
        loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
        batch = planned_batch(config, lengths_KB, CPU)
        for parameter in student.model.parameters():
            parameter.register_hook(_gradient_hook(device))
        for _ in range(WARM_UP):
            step_in_phases(student, teacher, loss, batch, lambda _: None)
        gc.collect()
        device.allocations.own(batch, "batch")
        for part, tensors in tensors_by_part(student, teacher).items():
            device.allocations.own(tensors, part)
        device.begin()
        step_in_phases(student, teacher, loss, batch, device.enter_phase)
        memory = device.allocations.peaks()
        elements = elements_of(student.model)
    pair.close()
    return Counts(
        world_size=ranks.world_size,
        rank=ranks.rank,
        samples=samples,
        stage=config.zero.stage,
        precision=config.precision,
        recompute=config.train.recompute,
        micro_batches=config.train.micro_batches,
        as_gpu=as_gpu,
        elements=elements,
        exchanges=exchanges_of(device.collectives, _shares_done(device)),
        operators=tuple(
            OperatorCount(phase, group_of(name), name, shape, dtype, *count)
            for (phase, name, shape, dtype), count in device.operators.items()
        ),
        memory=tuple(PhaseMemory(*peak) for peak in memory),
        host_calls=device.calls,
        seconds=time.perf_counter() - started,
    )


def _countable(config: RunConfig, global_batch: int, *, as_gpu: bool) -> RunConfig:
    """Return the config that the process here can run: on CPUs, not compiled, and with attention that it has.

    All of a GPU's back ends of attention keep the same tensors; torch's is there wherever torch is. In fp32 a GPU has
    `sdpa` alone.
    """
    model = config.model.model_copy(update={"compile": False})
    if as_gpu:
        low = config.precision != "fp32" and config.model.attention != "sdpa"
        model = model.model_copy(update={"attention": "torch_varlen" if low else "sdpa"})
    train = config.train.model_copy(update={"global_batch": global_batch})
    return config.model_copy(update={"device": "cpu", "model": model, "train": train})


def _gradient_hook(device: FakeDevice) -> Callable[[Tensor], None]:
    def arrives(gradient: Tensor) -> None:
        device.allocations.own([gradient], "gradients")

    return arrives


def exchanges_of(collectives: Sequence[Collective], done: Sequence[float] = ()) -> tuple[Exchange, ...]:
    """Return collectives, those that are alike together, in the order of their first. done: as in Exchange."""
    calls: dict[tuple[str, str, str, int], list[float]] = {}
    for place, found in enumerate(collectives):
        key = (found.phase, found.kind, str(found.dtype).removeprefix("torch."), found.nbytes)
        calls.setdefault(key, []).append(done[place] if done else 0.0)
    return tuple(Exchange(*key, len(shares), tuple(shares)) for key, shares in calls.items())


def _shares_done(device: FakeDevice) -> list[float]:
    """Return which share of its phase's products each collective follows: 1 where the phase has none."""
    before = zip(device.collectives, device.flops_before, strict=True)
    return [flops / whole if (whole := device.flops.get(found.phase, 0)) else 1.0 for found, flops in before]
