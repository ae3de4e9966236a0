"""Training batches: the same at any number of workers and ranks and after a restart; damage costs one sample."""

import gc
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.training.loader import TrainLoader, default_workers
from cosmos_scale.data.training.lost import check_shards
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.model.tokenizer import END_OF_TEXT, Tokenizer
from cosmos_scale.testing.shard_files import (
    flip_bytes,
    open_folder,
    picture,
    sample,
    shards_config,
    write_shard,
    write_shards,
)


def make(folder: Path, config: RunConfig, rank: int = 0, world_size: int = 1, log: Path | None = None) -> TrainLoader:
    tokenizer = Tokenizer(config.model.text.context_length)
    return TrainLoader(config, open_folder(folder), tokenizer, rank, world_size, log)


def take(loader: TrainLoader, start: int, count: int) -> list[Batch]:
    with closing(loader.batches(start)) as batches:
        return list(islice(batches, count))


def assert_equal(a: Batch, b: Batch) -> None:
    for name, left, right in zip(Batch._fields, a, b, strict=True):
        assert torch.equal(left, right), name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 7, 3, 6])  # 21 samples: five batches of 4, one over


def test_a_batch_is_its_samples_plans_and_captions(shards: Path) -> None:
    config = shards_config(shards)
    index, tokenizer = open_folder(shards), Tokenizer(16)
    for epoch in range(2):
        seen = []
        for batch in take(make(shards, config), 5 * epoch, 5):
            assert [tuple(tensor.shape) for tensor in batch] == [
                (2, 4, 3, 16, 16), (1, 4, 3, 8, 8), (3, 4, 16), (3, 4), (4,), (),
            ]  # fmt: skip
            assert [tensor.dtype for tensor in batch] == [
                torch.uint8, torch.uint8, torch.int32, torch.int64, torch.int64, torch.int64,
            ]  # fmt: skip
            assert batch.substituted.item() == 0
            for b, number in enumerate(batch.sample_ids.tolist()):
                key = SampleKey(config.seed, epoch, number)
                pixels = decode_rgbx(picture(number), config.data.max_pixels)
                views = Views.empty(config.data.views, 16)
                execute(pixels, plan_views(config.data.views, 16, key, *pixels.shape[:2]), *views)
                texts = draw_captions(config.data.captions, json.loads(sample(number)["json"]), key)
                assert torch.equal(batch.global_crops[:, b], views.global_crops)
                assert torch.equal(batch.local_crops[:, b], views.local_crops)
                assert torch.equal(batch.captions[:, b], tokenizer(texts))
                ends = [ids.index(END_OF_TEXT) + 1 for ids in tokenizer(texts).tolist()]
                assert batch.caption_lengths[:, b].tolist() == ends
                assert index.locate(number).entry.key == f"{number:06d}"
                seen.append(number)
        assert len(set(seen)) == 20


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_leave_no_trace(shards: Path, workers: int) -> None:
    config = shards_config(shards)
    whole = take(make(shards, config), 0, 12)  # more than two epochs
    with_workers = shards_config(shards, workers=workers, prefetch=2)
    for start in (0, 3, 7):  # step 7 lies in the middle of the second epoch
        for left, right in zip(take(make(shards, with_workers), start, 12 - start), whole[start:], strict=True):
            assert_equal(left, right)


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_the_global_batch_is_the_same_at_every_world_size(shards: Path, last_batch: str) -> None:
    config = shards_config(shards, last_batch=last_batch)
    alone = make(shards, config)
    assert alone.steps_per_epoch == (5 if last_batch == "drop" else 6)
    whole = take(alone, 2, 6)
    for world_size in (2, 4):
        ranks = [take(make(shards, config, rank, world_size), 2, 6) for rank in range(world_size)]
        for step, expected in enumerate(whole):
            parts = [rank[step] for rank in ranks]
            assert torch.equal(torch.cat([part.sample_ids for part in parts]), expected.sample_ids)
            for field, dim in (("global_crops", 1), ("local_crops", 1), ("captions", 1), ("caption_lengths", 1)):
                joined = torch.cat([getattr(part, field) for part in parts], dim)
                assert torch.equal(joined, getattr(expected, field)), field


def test_a_padded_epoch_visits_every_sample_and_then_its_first_ones(shards: Path) -> None:
    batches = take(make(shards, shards_config(shards, last_batch="pad")), 0, 6)
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert sorted(ids[:21]) == list(range(21))
    assert ids[21:] == ids[:3]


def test_loading_leaves_the_global_random_numbers_alone(shards: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(make(shards, shards_config(shards, workers=1)), 0, 2)
    assert torch.equal(torch.rand(3), expected)


def damage(folder: Path, numbers: set[int]) -> None:
    """Flip the first bytes of some pictures in place, so that the index and its sizes still fit."""
    for path in sorted(folder.glob("*.tar")):
        for entry in scan_shard(path).entries:
            if int(entry.key) in numbers:
                flip_bytes(path, entry.image_offset, 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_costs_one_sample(tmp_path: Path, workers: int) -> None:
    sound = take(make(write_shards(tmp_path / "sound", [9, 8]), shards_config(tmp_path / "sound")), 0, 8)
    folder = write_shards(tmp_path / "shards", [9, 8])
    broken = {2, 5, 11}
    damage(folder, broken)
    log = tmp_path / "run" / "damaged.jsonl"
    config = shards_config(folder, workers=workers)
    batches = take(make(folder, config, log=log), 0, 8)
    expected_log = []
    for step, (batch, original) in enumerate(zip(batches, sound, strict=True)):
        hit = torch.tensor([number in broken for number in original.sample_ids.tolist()])
        assert batch.substituted.item() == hit.sum().item()
        assert torch.equal(batch.sample_ids[~hit], original.sample_ids[~hit])
        assert torch.equal(batch.global_crops[:, ~hit], original.global_crops[:, ~hit])
        assert not broken & set(batch.sample_ids.tolist())
        expected_log += [(step, number) for number in original.sample_ids[hit].tolist()]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # A substitute may be damaged itself, and is then logged too.
    assert set(expected_log) <= {(line["step"], line["sample"]) for line in lines}
    for line in lines:
        assert line["sample"] in broken
        assert (line["key"], line["rank"], line["source"]) == (f"{line['sample']:06d}", 0, "test")
        assert line["shard"] == str(folder / ("00000.tar" if line["sample"] < 9 else "00001.tar"))
        assert line["reason"] == "the picture is not a JPEG, PNG or WebP"
    again = take(make(folder, config, 1, 2), 3, 5)  # another world size, after a restart: the same substitutes
    for left, right in zip(again, batches[3:], strict=True):
        assert torch.equal(left.sample_ids, right.sample_ids[2:])


def test_a_resumed_run_lists_damage_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [9, 7])
    damage(folder, {2, 5, 11})
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    take(make(folder, shards_config(folder), log=whole), 0, 8)
    for start in (0, 0, 2, 5):  # every launch but the last replays some of the three steps before
        take(make(folder, shards_config(folder), log=resumed), start, 3)
    expected = whole.read_text().splitlines()
    assert len({json.loads(line)["step"] for line in expected}) > 2
    assert sorted(resumed.read_text().splitlines()) == sorted(expected)
    with resumed.open("a") as log:
        log.write("{\n[1]\n")  # torn
    replayed = [take(make(folder, shards_config(folder), rank, 2, resumed), 4, 4) for rank in range(2)]
    assert sum(int(batch.substituted) for batches in replayed for batch in batches) > 0
    assert sorted(resumed.read_text().splitlines()[:-2]) == sorted(expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_much_damage_stops_with_one_line(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, [12])
    damage(folder, {3})
    log = tmp_path / "damaged.jsonl"
    loader = make(folder, shards_config(folder, workers=workers, max_damaged=0.0), log=log)
    with pytest.raises(UserError, match=r"^1 of \d+ samples is damaged, more than data\.max_damaged 0") as error:
        take(loader, 0, 3)
    assert "000003 in " in str(error.value)
    assert str(log) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(log.read_text().splitlines()) == 1


def test_a_few_damaged_samples_at_the_start_are_no_verdict(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [12])
    damage(folder, {3})
    loader = make(folder, shards_config(folder, max_damaged=0.002))  # 2 in the first 1,000
    with pytest.raises(UserError, match=r"^3 of 3\d samples"):
        take(loader, 0, 20)


@pytest.mark.parametrize(
    ("document", "sampling", "reason"),
    [
        ([1, 2], "textcrop", "list"),
        ({"raw_caption": 7}, "textcrop", "raw_caption"),
        ({"raw_caption": []}, "textcrop", "no caption text"),
        ({"url": "x"}, "textcrop", "raw_caption"),
        ({"url": "x"}, "raw_pixelprose", "original_caption"),
    ],
)
def test_captions_of_the_wrong_shape_stop_with_one_line(
    tmp_path: Path, document: Any, sampling: str, reason: str
) -> None:
    members = [sample(number) for number in range(4)]
    write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    data = json.dumps(document).encode()
    # The same offsets, so that the index still fits.
    padded = data + b" " * (len(members[0]["json"]) - len(data))
    write_shard(tmp_path / "0.tar", [{**member, "json": padded} for member in members])
    loader = make(tmp_path, shards_config(tmp_path, captions={"count": 3, "sampling": sampling}))
    with pytest.raises(UserError, match=r"21 damaged samples in a row; the last is \d+ in .*0\.tar: ") as error:
        take(loader, 0, 1)
    assert reason in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_or_changed_shard_reaches_the_training_process(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, [6, 6])
    config = shards_config(folder, workers=workers, remote={"retries": 1, "backoff_s": 0.01}, max_damaged=0.5)
    loader = make(folder, config)
    write_shard(folder / "00001.tar", [sample(0)])
    with pytest.raises(ShardsToGiveUp) as changed:
        take(loader, 0, 3)
    assert changed.value.shards["test/00001.tar"].startswith(f"has {(folder / '00001.tar').stat().st_size} bytes, but")
    with pytest.raises(UserError, match=rf"^{folder}/00001\.tar: has \d+ bytes, but its index was made when"):
        check_shards(open_folder(folder), config, {}, resumed=False)
    (folder / "00001.tar").unlink()
    loader = make(folder, config)  # a new loader: the reader of the first has given the shard up
    with pytest.raises(ShardsToGiveUp) as loss:  # not a UserError: the shard was there when the run began
        take(loader, 0, 3)
    assert loss.value.shards == {"test/00001.tar": "No such file or directory"}
    with pytest.raises(UserError, match=r"00001\.tar: shard of source test cannot be opened: No such file"):
        check_shards(open_folder(folder), config, {}, resumed=False)
    loader.lose([loss.value.shards], 0)
    check_shards(open_folder(folder), config, loader.lost_shards, resumed=False)  # known to be lost


class Finalised:
    """Refers to itself, so that it ends when garbage is collected; it then says in which process."""

    def __init__(self, said: Path) -> None:
        self.said, self.itself = said, self

    def __del__(self) -> None:
        self.said.write_text(str(os.getpid()))


def test_loader_processes_leave_the_training_processs_garbage_alone(shards: Path, tmp_path: Path) -> None:
    tokenizer, said = Tokenizer(16), tmp_path / "said"

    def tokenize_and_collect(texts: Sequence[str]) -> torch.Tensor:
        gc.collect()
        return tokenizer(texts)

    gc.disable()  # the object must not be collected here before the fork
    try:
        Finalised(said)
        take(TrainLoader(shards_config(shards, workers=1), open_folder(shards), tokenize_and_collect, 0, 1), 0, 2)
        assert not said.exists()
        gc.collect()
    finally:
        gc.enable()
    assert said.read_text() == str(os.getpid())


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_a_killed_worker_is_an_error_not_a_hang(shards: Path) -> None:
    before = set(children())
    with closing(make(shards, shards_config(shards, workers=1)).batches(0)) as batches:
        next(batches)
        (worker,) = set(children()) - before
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(UserError, match=r"^a loader process died .*lower data\.workers \(1\)"):
            list(islice(batches, 50))  # batches that were ready are still handed out


def test_too_few_open_files_are_told_so_that_the_steps_done_are_saved(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.utils.data raises a RuntimeError of its own, and with a traceback the run would lose its steps."""

    class Results:
        def __next__(self) -> None:
            raise RuntimeError("Too many open files. Communication with the workers is no longer possible.")

    for workers in (0, 1):
        loader = make(shards, shards_config(shards, workers=workers))
        monkeypatch.setattr(loader, "_start_workers", lambda step: Results())
        with pytest.raises(UserError, match=rf"^loader: Too many open files; allow .* data\.workers \({workers}\)"):
            next(loader.batches(0))


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (
            RuntimeError("a mistake of ours"),
            RuntimeError,
            r"^Caught RuntimeError [\s\S]*Traceback[\s\S]*a mistake of ours",
        ),
        (OSError("a mistake of ours"), OSError, r"^Caught OSError [\s\S]*Traceback[\s\S]*a mistake of ours"),
        (
            RuntimeError("unable to allocate shared memory(shm)"),
            UserError,
            r"^a loader process died \(RuntimeError: unable to allocate shared memory\(shm\)\); if memory ran out, ",
        ),
    ],
)
def test_a_workers_own_exception_keeps_its_traceback(
    shards: Path, error: Exception, raised: type[Exception], text: str
) -> None:
    def fail(texts: Sequence[str]) -> torch.Tensor:
        raise error

    loader = TrainLoader(shards_config(shards, workers=1), open_folder(shards), fail, 0, 1)
    with pytest.raises(raised, match=text):
        take(loader, 0, 1)


@contextmanager
def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def test_default_workers_share_the_hosts_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_scale.data.training.loader.usable_cores", lambda: 32)
    with environment(monkeypatch):
        for device, workers in (("cpu", [8, 7, 3, 0, 0]), ("cuda", [8, 7, 3, 1, 1])):
            assert [default_workers(ranks, torch.device(device)) for ranks in (1, 4, 8, 32, 64)] == workers
    with environment(monkeypatch, LOCAL_SIZE="8"):  # of 128 ranks, 8 run here
        assert default_workers(128, torch.device("cpu")) == 3


def test_a_world_size_that_does_not_divide_the_batch_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="global_batch"):
        make(shards, shards_config(shards), 0, 3)


def test_more_batch_than_data_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch is 32, but the data has 21 samples"):
        make(shards, shards_config(shards, global_batch=32))
    batch = take(make(shards, shards_config(shards, global_batch=32, last_batch="pad")), 0, 1)[0]
    assert np.bincount(batch.sample_ids).tolist().count(2) == 32 - 21
