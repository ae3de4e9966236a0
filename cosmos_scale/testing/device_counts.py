"""What a step asks of a device without a step of other ranks: counted with the step's own code, in any size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import surrogate
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.kernels import adamw_ema
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import LOG_SCALES, CosmosModel
from cosmos_scale.profiling.operators import META, Count, DeviceCounter
from cosmos_scale.profiling.planned_batch import planned_batch
from cosmos_scale.step import train_step
from cosmos_scale.testing.batches import random_batch


@contextmanager
def triton_update_on_cpu() -> Iterator[None]:
    """Let the optimizer call its Triton kernels for tensors on the CPU; a `DeviceCounter` counts them, nothing runs."""
    before = adamw_ema.FUSED_DEVICES
    adamw_ema.FUSED_DEVICES = before | {"cpu"}
    try:
        yield
    finally:
        adamw_ema.FUSED_DEVICES = before


def count_step(config: RunConfig, lengths_KB: Tensor) -> DeviceCounter:
    """Count student, teacher, loss and backward of one rank's step without other ranks; the update is not in it.

    lengths: [K, B] int64 on the CPU, the tokens of each caption: B samples. Phases: "student", "teacher", "loss",
    "backward". Weights have the dtype of config.precision.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    with META:
        student, teacher = CosmosModel(config.model).to(dtype), CosmosModel(config.model).to(dtype)
    student.recompute_blocks(config.train.recompute)
    for model in (student, teacher):
        model.choose_kernels(config.kernels)
        _read_float32(model)
    batch = planned_batch(config, lengths_KB, META)
    loss_of = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
    scales = {name: torch.empty(1, device=META) for name in LOG_SCALES}  # the masters', in float32
    counter = DeviceCounter()
    with torch.no_grad():  # makes tables that later steps find
        loss_of(student(batch)._replace(**scales), teacher.teacher_features(batch, config.data.captions.global_count))
    with counter:
        with counter.phase("student"):
            features = student(batch)
        with counter.phase("teacher"):
            taught = teacher.teacher_features(batch, config.data.captions.global_count)
        with counter.phase("loss"):
            loss = loss_of(features._replace(**scales), taught)
            for scale in scales.values():  # of a step's output, see train_step
                scale.clone()
        with counter.phase("backward"):
            surrogate(features, loss.gradients).backward()
    return counter


def count_update(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, dict[str, Count]], int]:
    """Count by phase and group what the engine does beside the model, on a real step on CPUs; collective.

    The update's Triton kernels, which a CPU cannot run, are counted and left out.

    Returns the counts of "gradients" (the engine's backward less the same model's backward without an engine), "update"
    and "refresh"; and the elements of the model. All that is counted is done for each element. So bytes may be scaled
    to a model of the same depth and another width.
    """
    pair, loss = (
        drawn_pair(config, start_ranks("cpu")),
        CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels),
    )
    student, teacher = pair
    captions = config.data.captions.count
    batch = random_batch(config.model, config.data.views, 1, [(4, config.model.text.context_length)] * captions)
    for _ in range(2):  # DeepSpeed makes some of its buffers in the first step
        train_step(student, teacher, loss, batch, lr=1e-4, momentum=0.99)
        _ = teacher.model
    features = student(batch)
    gradients = loss(student.with_full_scales(features), teacher(batch)).gradients
    counter, plain = DeviceCounter(), DeviceCounter()
    with counter, triton_update_on_cpu():
        with counter.phase("gradients"):
            student.backward(batch, features, gradients)
        with counter.phase("update"):
            student.update(lr=1e-4, momentum=0.99, finite=torch.tensor(True))
        with counter.phase("refresh"):
            teacher.refresh()
            _ = teacher.model  # waits for what a thread may do
    model = CosmosModel(config.model).to(next(student.model.parameters()).dtype)
    _read_float32(model)
    alone = model(batch)
    with plain, plain.phase("gradients"):
        surrogate(alone, gradients).backward()
    pair.close()
    phases = {name: counter.by_group(name) for name in ("gradients", "update", "refresh")}
    for group, count in plain.by_group("gradients").items():
        phases["gradients"][group] = phases["gradients"][group].plus(Count(*(-number for number in count)))
    return phases, sum(parameter.numel() for parameter in model.parameters())


def _read_float32(model: CosmosModel) -> None:
    """Let the norms of a model in low precision read float32 values, as those of students and teachers do."""
    weights = dict(model.named_parameters())
    if any(weight.dtype != torch.float32 for weight in weights.values()):
        model.read_norms({name: torch.empty_like(weight, dtype=torch.float32) for name, weight in weights.items()})
