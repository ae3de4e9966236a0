"""Batches in one block of shared memory: only a handle goes through a worker's queue; the pixels are not copied."""

import pickle
from contextlib import closing
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode.blocks import ALIGNMENT, Field, TensorBlock, block_bytes
from cosmos_scale.data.decode.pictures import batch_fields
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.lost import LostShards
from cosmos_scale.data.training.worker import Loaded, StepBatches
from cosmos_scale.errors import UserError
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import open_folder, shards_config, write_shards

MOST_SENT = 2048  # bytes a batch: a handle, six shapes and the names of classes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [9, 8])


@pytest.mark.parametrize("shared", [False, True])
def test_tensors_of_a_block_are_apart_and_aligned(shared: bool) -> None:
    fields = [
        Field((3, 5), torch.uint8),
        Field((0, 4), torch.float32),
        Field((), torch.int64),
        Field((7,), torch.int32),
    ]
    block = TensorBlock.empty(fields, shared=shared)
    assert block.memory.is_shared() == shared
    assert block.memory.nbytes == block_bytes(fields) == 3 * ALIGNMENT
    for number, tensor in enumerate(block.tensors()):
        tensor.fill_(number)
    for number, (tensor, field) in enumerate(zip(block.tensors(), fields, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == tuple(field)
        assert (tensor.data_ptr() - block.memory.data_ptr()) % ALIGNMENT == 0
        assert (tensor == number).all()


def test_a_batch_of_the_published_sizes_is_a_byte_a_level() -> None:
    config = RunConfig.model_validate({"data": {"sources": [{"name": "a", "shards": "b"}]}})
    samples = 64
    pixels = samples * 3 * (2 * 224**2 + 6 * 96**2)
    captions = samples * config.data.captions.count * (4 * config.model.text.context_length + 8)
    nbytes = block_bytes(batch_fields(config, samples))
    assert pixels + captions < nbytes < pixels + captions + 1024  # sample ids, the count, and what alignment adds
    assert nbytes / 1e6 == pytest.approx(30.0, abs=0.1)


def test_copied_tensors_equal_the_originals() -> None:
    tensors = [torch.arange(24.0).view(2, 3, 4).transpose(0, 2), torch.tensor(7), torch.empty(0, 2)]
    for copy, original in zip(TensorBlock.of(tensors, shared=True).tensors(), tensors, strict=True):
        assert copy.is_shared()
        assert (copy.shape, copy.dtype) == (original.shape, original.dtype)
        assert torch.equal(copy, original)


def steps(config: RunConfig, shards: Path, *, shared: bool) -> StepBatches:
    index = open_folder(shards)
    return StepBatches(
        config,
        index,
        Tokenizer(config.model.text.context_length),
        LostShards(index, {}),
        rank=0,
        samples_per_rank=config.train.global_batch,
        steps_per_epoch=4,
        shared=shared,
    )


def test_a_batch_leaves_its_worker_as_a_handle(shards: Path) -> None:
    config = shards_config(shards, views={"local_crops": 1, "local_size": 64})
    loaded = steps(config, shards, shared=True)[0]
    assert loaded.block is not None
    made = loaded.block.tensors()
    where = [tensor.data_ptr() for tensor in made]
    sent = bytes(ForkingPickler.dumps(loaded))
    # The pixels are neither sent nor copied.
    assert len(sent) < MOST_SENT < loaded.block.memory.nbytes
    assert [tensor.data_ptr() for tensor in loaded.block.tensors()] == where
    received: Loaded = pickle.loads(sent)
    assert received.block is not None
    for mine, theirs in zip(made, received.block.tensors(), strict=True):
        assert torch.equal(mine, theirs)
        mine.zero_()
        assert not theirs.any()  # both see the same memory


def test_a_batch_larger_by_pixels_sends_no_more(shards: Path) -> None:
    sent = []
    for side in (8, 80):
        loaded = steps(shards_config(shards, views={"local_crops": 6, "local_size": side}), shards, shared=True)[0]
        sent.append(len(bytes(ForkingPickler.dumps(loaded))))
    assert sent[1] - sent[0] < 16  # the digits of the shapes


def test_a_loaders_batch_is_one_shared_block(shards: Path) -> None:
    config = shards_config(shards, workers=1)
    loader = TrainLoader(config, open_folder(shards), Tokenizer(16), 0, 1)
    with closing(loader.batches(0)) as batches:
        for batch in islice(batches, 3):
            storages = {tensor.untyped_storage().data_ptr() for tensor in batch}
            assert len(storages) == 1
            assert all(tensor.is_shared() for tensor in batch)


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(shards: Path) -> None:
    for workers in (0, 1):
        loader = TrainLoader(shards_config(shards, workers=workers), open_folder(shards), Tokenizer(16), 0, 1)
        with closing(loader.batches(0)) as batches:
            batch: Batch = next(batches)
            assert all(tensor.is_pinned() for tensor in batch)


def test_more_prefetching_than_shared_memory_is_refused(shards: Path) -> None:
    config = shards_config(shards, workers=1, prefetch=1000, views={"local_size": 8192})
    with (
        closing(TrainLoader(config, open_folder(shards), Tokenizer(16), 0, 1).batches(0)) as batches,
        pytest.raises(UserError, match=r"^data\.prefetch: 1,000 batches .* /dev/shm has .*--shm-size\)$"),
    ):
        next(batches)
