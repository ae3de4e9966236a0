"""Both decoders under the same loader: the same samples, captions and lost shards, and views as close as can be."""

import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import shards_config, write_shards

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which has no wheel for this machine")

# Grey levels, mean over a batch's values. DALI's resize rounds in another way than torch's (0.2 on photos), and colour
# in floating point keeps the fractions that 8-bit steps cut off (1.6).
MOST_DIFFERENCE = 1.6


def take(config: RunConfig, start: int, count: int, **options: Any) -> list[Batch]:
    loader = TrainLoader(config, open_sources(config.data.sources), Tokenizer(16), 0, 1, **options)
    with closing(loader.batches(start)) as batches:
        return list(islice(batches, count))


def assert_alike(torch_batches: list[Batch], dali_batches: list[Batch]) -> None:
    for expected, made in zip(torch_batches, dali_batches, strict=True):
        for name in ("captions", "caption_lengths", "sample_ids", "substituted"):
            assert torch.equal(getattr(made, name), getattr(expected, name)), name
        for name in ("global_crops", "local_crops"):
            left, right = getattr(made, name), getattr(expected, name)
            assert (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
            difference = (left.float() - right.float()).abs().mean()
            assert difference < MOST_DIFFERENCE, name
            assert right.float().std() > 20 * difference  # views of unlike samples would be far apart


@pytest.mark.parametrize("workers", [0, 1])
def test_both_decoders_make_the_same_batches(scenes: SceneShards, workers: int) -> None:
    sections: dict[str, Any] = {"views": {"local_crops": 2, "local_size": 16}, "workers": workers}
    config = shards_config(scenes.train, global_batch=8, **sections)
    expected = take(config, 3, 5)
    config = shards_config(scenes.train, global_batch=8, decoder="dali", **sections)
    assert_alike(expected, take(config, 3, 5))
    assert_alike(expected[2:4], take(config, 5, 2))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_lost_shard_is_told_at_the_step_that_needs_it(tmp_path: Path, prefetch: int) -> None:
    folder = write_shards(tmp_path, [12, 12])
    at_once = {"retries": 0, "backoff_s": 0.0}
    taken = []
    (folder / "00001.tar").unlink()
    for decoder in ("torch", "dali"):
        config = shards_config(folder, decoder=decoder, window=12, remote=at_once, dali={"prefetch": prefetch})
        loader = TrainLoader(config, open_sources(config.data.sources), Tokenizer(16), 0, 1)
        ids: list[list[int]] = []
        with closing(loader.batches(0)) as batches, pytest.raises(ShardsToGiveUp) as loss:
            ids.extend(batch.sample_ids.tolist() for batch in batches)
        assert list(loss.value.shards) == ["test/00001.tar"]
        taken.append(ids)
    assert taken[0] == taken[1]
    assert len(taken[0]) > 0


def test_without_dali_the_loader_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nvidia

    monkeypatch.delattr(nvidia, "dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    config = shards_config(write_shards(tmp_path, [4]), decoder="dali")
    with pytest.raises(UserError, match=r"^data\.decoder: dali needs NVIDIA DALI .*pip install") as error:
        take(config, 0, 1)
    assert "\n" not in str(error.value)
