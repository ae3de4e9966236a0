"""Loader processes over weighted sources: the order's visits at every world size, worker count and restart."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import shards_config, write_shards

GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """9 samples two and a half times, 16 once and a fifth of 20: 42 visits, padded to four batches of 12."""
    root = tmp_path_factory.mktemp("sources")
    sources = [
        {"name": name, "shards": str(write_shards(root / name, counts)), "weight": weight}
        for name, counts, weight in (("a", [4, 5], 2.5), ("b", [7, 3, 6], 1.0), ("c", [12, 8], 0.2))
    ]
    return shards_config(root, global_batch=GLOBAL_BATCH, sources=sources, last_batch="pad", window=16)


def batches(config: RunConfig, world_size: int, start: int, count: int) -> list[Batch]:
    """Global batches: the ranks' shares, one after the other."""
    index, tokenizer = open_sources(config.data.sources), Tokenizer(16)
    shares: list[list[Batch]] = []
    for rank in range(world_size):
        loader = TrainLoader(config, index, tokenizer, rank, world_size)
        with closing(loader.batches(start)) as own:
            shares.append(list(islice(own, count)))
    return [joined(ranks) for ranks in zip(*shares, strict=True)]


def joined(shares: tuple[Batch, ...]) -> Batch:
    along = {"sample_ids": 0, "substituted": None}
    fields = {}
    for name in Batch._fields:
        tensors = [getattr(share, name) for share in shares]
        where = along.get(name, 1)
        fields[name] = torch.stack(tensors).sum() if where is None else torch.cat(tensors, dim=where)
    return Batch(**fields)


def assert_equal(ours: Batch, theirs: Batch) -> None:
    for name, left, right in zip(Batch._fields, ours, theirs, strict=True):
        assert torch.equal(left, right), name


@pytest.fixture(scope="module")
def reference(config: RunConfig) -> list[Batch]:
    """Two epochs on one rank that loads in the training process."""
    return batches(config, 1, 0, 8)


def test_the_loader_makes_the_visits_of_the_order(config: RunConfig, reference: list[Batch]) -> None:
    index = open_sources(config.data.sources)
    assert (len(index), index.epoch_samples) == (45, 22 + 16 + 4)
    assert TrainLoader(config, index, Tokenizer(16), 0, 1).steps_per_epoch == 4
    order = EpochOrder(index.source_shards(), config.seed, config.data.window)
    for step, batch in enumerate(reference):
        epoch, epoch_step = divmod(step, 4)
        positions = range(epoch_step * GLOBAL_BATCH, (epoch_step + 1) * GLOBAL_BATCH)
        assert batch.sample_ids.tolist() == [order.sample(epoch, position) for position in positions]
        assert batch.substituted == 0


def test_repeats_of_a_sample_are_different_crops_and_captions(reference: list[Batch]) -> None:
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for sample, visit in visits(reference[:4]):
        seen.setdefault(sample, []).append(visit)
    assert {len(of_sample) for sample, of_sample in seen.items() if sample < 9} == {2, 3}
    assert {len(of_sample) for sample, of_sample in seen.items() if sample >= 9} == {1}
    for of_sample in seen.values():
        for place, (crops, captions) in enumerate(of_sample):
            for other_crops, other_captions in of_sample[:place]:
                assert not torch.equal(crops, other_crops)
                assert not torch.equal(captions, other_captions)


def visits(epoch: list[Batch]) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Each visit of an epoch once, without padding: its sample, crops and captions."""
    left = 42
    for batch in epoch:
        for b, sample in enumerate(batch.sample_ids.tolist()[:left]):
            yield sample, (batch.global_crops[:, b], batch.captions[:, b])
        left -= min(left, GLOBAL_BATCH)


@pytest.mark.parametrize(
    ("world_size", "workers", "start"), [(1, 2, 0), (1, 2, 3), (2, 1, 5), (3, 2, 1), (4, 0, 6), (6, 0, 2)]
)
def test_world_sizes_workers_and_restarts_change_nothing(
    config: RunConfig, reference: list[Batch], world_size: int, workers: int, start: int
) -> None:
    changed = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers, "prefetch": 1})})
    for ours, theirs in zip(batches(changed, world_size, start, 8 - start), reference[start:], strict=True):
        assert_equal(ours, theirs)
