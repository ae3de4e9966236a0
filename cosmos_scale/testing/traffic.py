"""What a step moves between ranks, counted in one process that plays one of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import surrogate
from cosmos_scale.engine.optimizer import build_optimizer
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.zero import layout_of
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.collectives import Collective, CollectiveCounter
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.operators import META, Count, DeviceCounter
from cosmos_scale.profiling.planned_batch import planned_batch
from cosmos_scale.testing.batches import random_batch

NEARLY_OVER = 0.05  # of the backward's operations are left


def count_traffic(rank: int, _: int, config: RunConfig, world_size: int) -> tuple[list[Collective], int]:
    """Return the collectives of a step of one sample a rank, and the model's elements. In a process of its own.

    config: of a model that a CPU can train; train.global_batch is `world_size`.
    """
    ranks = start_fake_ranks(world_size)
    pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
    student, teacher = pair
    lengths = [(4, config.model.text.context_length)] * config.data.captions.count
    batch = random_batch(config.model, config.data.views, 1, lengths)
    counter = CollectiveCounter()

    def step() -> None:
        with counter.phase("student"):
            features = student(batch)
        with counter.phase("teacher"):
            taught = teacher(batch)
        with counter.phase("loss"):
            found = loss(student.with_full_scales(features), taught)
        with counter.phase("backward"):
            student.backward(batch, features, found.gradients)
        with counter.phase("update"):
            student.update(lr=1e-4, momentum=0.99, finite=torch.tensor(True))
        with counter.phase("refresh"):
            teacher.refresh()
            _ = teacher.model  # waits for what a thread may do

    for _ in range(2):  # stage 3 learns the order of its gathers in the first steps
        step()
    counter.seen.clear()
    with counter:
        step()
    return counter.seen, sum(parameter.numel() for parameter in CosmosModel(config.model).parameters())


def exposed_share(config: RunConfig, lengths_KB: Tensor, world_size: int) -> float:
    """Return the share of gradients whose bucket is full only when the backward's products are nearly over.

    lengths: [K, B] int64 on the CPU, the tokens of each caption. The model and the backward are on "meta", in the size
    of the config. At stages 1 and 2.
    """
    with META:
        model = CosmosModel(config.model)
    model.choose_kernels(config.kernels)
    counter = DeviceCounter()
    arrivals: dict[int, int] = {}

    def arrived(parameter: Tensor) -> None:
        arrivals[id(parameter)] = counter.of_phase("backward").flops

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(arrived)
    features = model(planned_batch(config, lengths_KB, META))
    with counter, counter.phase("backward"):
        surrogate(features, features).backward()
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
    groups = layout_of(config).optimizer_groups(optimizer.param_groups, model, world_size)
    elements = late = 0
    for group in groups:
        size = sum(parameter.numel() for parameter in group["params"])
        # The scales have their gradients from the loss.
        full = max(arrivals.get(id(parameter), 0) for parameter in group["params"])
        elements += size
        late += size if full > (1.0 - NEARLY_OVER) * counter.of_phase("backward").flops else 0
    return late / elements


def count_losses(
    rank: int, _: int, config: RunConfig, world_sizes: Sequence[int]
) -> list[tuple[list[Collective], dict[str, Count]]]:
    """Return the loss's collectives, and what it asks of a device by group, for each world size; tensors are "meta".

    config: train.global_batch is a rank's share.
    """
    found = []
    for world_size in world_sizes:
        start_fake_ranks(world_size)
        loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
        features, taught = _meta_features(config)
        loss(features, taught)  # makes what it keeps from step to step
        collectives, operators = CollectiveCounter(), DeviceCounter()
        with operators, collectives, collectives.phase("loss"):
            loss(features, taught)
        found.append((collectives.seen, operators.by_group()))
    return found


def _meta_features(config: RunConfig) -> tuple[Features, TeacherFeatures]:
    """Return features of a rank's share, without values, in compute precision; the scales are float32."""
    views, captions, width = config.data.views, config.data.captions, config.model.embed_dim
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]

    def of(count: int) -> Tensor:
        return torch.empty(count, config.train.global_batch, width, dtype=dtype, device=META)

    crops = views.global_crops + views.local_crops
    scales = [torch.empty(1, device=META) for _ in range(2)]
    features = Features(of(crops), of(captions.count), of(crops), of(captions.count), *scales)
    return features, TeacherFeatures(of(views.global_crops), of(captions.global_count))
