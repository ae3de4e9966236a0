"""Steps that are counted without the work, and the same steps really done: what a test and a benchmark compare."""

from collections.abc import Sequence
from functools import partial

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.profiling.collectives import CollectiveCounter
from cosmos_scale.profiling.counts import Counts, Exchange
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.fake_step import count_fake_step, exchanges_of
from cosmos_scale.profiling.phased_step import step_in_phases
from cosmos_scale.profiling.planned_batch import planned_lengths
from cosmos_scale.step import train_step
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.batches import random_batch, with_levels


def fake_counts(
    rank: int, _: int, configs: Sequence[RunConfig], world_size: int, samples: int, as_gpu: bool = False
) -> list[Counts]:
    """Return the counts of a step of each run, of the first of so many ranks. In a process of its own."""
    ranks = start_fake_ranks(world_size)
    return [count_fake_step(config, ranks, planned_lengths(config, samples), as_gpu=as_gpu) for config in configs]


def real_exchanges(
    rank: int, world_size: int, configs: Sequence[RunConfig], samples: int
) -> list[tuple[Exchange, ...]]:
    """Return the collectives of the fourth step of each run, of one of several gloo ranks."""
    ranks, found = start_ranks("cpu"), []
    for config in configs:
        pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
        batch = _batch(config, samples)
        for _ in range(3):
            train_step(*pair, loss, batch, lr=1e-4, momentum=0.99)
        counter = CollectiveCounter()
        with counter:
            step_in_phases(*pair, loss, batch, counter.enter_phase)
            _ = pair.teacher.model  # waits for the refresh
        pair.close()
        found.append(exchanges_of(counter.seen))
    return found


def real_and_counted_peaks(rank: int, _: int, configs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """Return what a step of each run needs beside what is held before it: by torch's allocator, and counted.

    configs: for one process; all samples of the batch are its own.
    """
    found, ranks = [], start_ranks("cpu")
    for config in configs:
        batch = _batch(config, config.train.global_batch)
        pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
        step = partial(train_step, *pair, loss, batch, lr=1e-4, momentum=0.99)
        for _step in range(2):
            step()
        real = peak_bytes(step)
        pair.close()
        counts = count_fake_step(config, ranks, batch.caption_lengths, as_gpu=False)
        found.append((real, counts.peak.peak - sum(counts.memory[-1].left.values())))
    return found


def _batch(config: RunConfig, samples: int) -> Batch:
    lengths = [(4, config.model.text.context_length // 2)] * config.data.captions.count
    return with_levels(random_batch(config.model, config.data.views, samples, lengths))
