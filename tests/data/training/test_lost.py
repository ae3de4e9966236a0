"""Lost shards: substitutes from one step on, the same at any world size and after a restart; a record; a limit."""

import json
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.lost import LostShards, check_shards
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.run.lookahead import Lookahead
from cosmos_scale.run.stop_request import StopRequest
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.shard_files import open_folder, shards_config, write_shards

COUNTS = [5, 7, 3, 6]  # 21 samples: five batches of 4, one over
NAMES = [f"test/{shard:05d}.tar" for shard in range(4)]
AT_ONCE = {"retries": 0, "backoff_s": 0.0}
SHARES = ("global_crops", "local_crops", "captions", "caption_lengths")  # [_, B, ...]


def config_of(folder: Path, **data: Any) -> RunConfig:
    return shards_config(folder, **{"max_damaged": 0.5, "remote": AT_ONCE, **data})


def make(folder: Path, config: RunConfig, rank: int = 0, world_size: int = 1, **options: Any) -> TrainLoader:
    return TrainLoader(config, open_folder(folder), Tokenizer(16), rank, world_size, **options)


def take(loader: TrainLoader, start: int, count: int) -> tuple[list[Batch], dict[int, dict[str, str]]]:
    """Take batches as one rank alone does: (the batches, what was lost at which step)."""
    taken: list[Batch] = []
    lost: dict[int, dict[str, str]] = {}
    while len(taken) < count:
        step = start + len(taken)
        with closing(loader.batches(step)) as batches:
            try:
                taken += islice(batches, count - len(taken))
            except ShardsToGiveUp as loss:
                # Batches that were yielded before the error stay: `+=` adds one after the other.
                lost[start + len(taken)] = loss.shards
                loader.lose([loss.shards], start + len(taken))
    return taken, lost


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", COUNTS)


def shard_of(sample: int) -> int:
    return [shard for shard, count in enumerate(COUNTS) for _ in range(count)][sample]


def test_samples_of_lost_shards_by_step(shards: Path) -> None:
    lost = LostShards(open_folder(shards), {NAMES[2]: 3})
    lost.add([NAMES[0], NAMES[2]], 5)
    assert lost.steps == {NAMES[2]: 3, NAMES[0]: 5}  # a shard keeps its first step
    for sample in range(21):
        shard = shard_of(sample)
        assert lost.shard_of(sample) == NAMES[shard]
        assert [lost.holds(sample, step) for step in (2, 3, 4, 5)] == [False, shard == 2, shard == 2, shard in (0, 2)]
    assert lost.samples([NAMES[1]]) == 7
    assert lost.share() == (3 + 5) / 21


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_shard_is_replaced_from_the_step_that_needs_it(shards: Path, workers: int) -> None:
    sound, _ = take(make(shards, config_of(shards)), 0, 12)
    (shards / "00001.tar").unlink()
    found = list(active_children())
    loader = make(shards, config_of(shards, workers=workers))
    batches, lost = take(loader, 0, 12)
    assert active_children() == found  # the workers of each start are gone
    needed = [[shard_of(sample) == 1 for sample in batch.sample_ids.tolist()] for batch in sound]
    first = next(step for step, needs in enumerate(needed) if any(needs))
    assert {step: list(shards) for step, shards in lost.items()} == {first: [NAMES[1]]}
    assert loader.lost_shards == {NAMES[1]: first}
    for batch, original, needs in zip(batches, sound, needed, strict=True):
        replaced = torch.tensor(needs)
        assert batch.substituted.item() == sum(needs)
        assert torch.equal(batch.sample_ids != original.sample_ids, replaced)
        assert all(shard_of(sample) != 1 for sample in batch.sample_ids.tolist())
        for name in SHARES:
            assert torch.equal(getattr(batch, name)[:, ~replaced], getattr(original, name)[:, ~replaced]), name


def test_all_world_sizes_and_restarts_see_the_same_substitutes(shards: Path) -> None:
    (shards / "00003.tar").unlink()
    loader = make(shards, config_of(shards))
    whole, _ = take(loader, 0, 10)
    lost = loader.lost_shards
    (first,) = lost.values()
    for world_size, start in ((1, first + 2), (2, first), (2, first + 3), (4, first + 1)):
        ranks = [make(shards, config_of(shards), rank, world_size, lost_shards=lost) for rank in range(world_size)]
        parts = [take(rank, start, 10 - start) for rank in ranks]
        assert all(not lost_again for _, lost_again in parts)
        for expected, *shares in zip(whole[start:], *(batches for batches, _ in parts), strict=True):
            assert torch.equal(torch.cat([share.sample_ids for share in shares]), expected.sample_ids)
            for name in SHARES:
                joined = torch.cat([getattr(share, name) for share in shares], 1)
                assert torch.equal(joined, getattr(expected, name)), name


def test_steps_before_the_loss_stay_as_they_were(shards: Path) -> None:
    whole, _ = take(make(shards, config_of(shards)), 0, 10)
    replayed, _ = take(make(shards, config_of(shards), lost_shards={NAMES[1]: 5}), 0, 10)
    for step, (batch, expected) in enumerate(zip(replayed, whole, strict=True)):
        lost = sum(shard_of(sample) == 1 for sample in expected.sample_ids.tolist())
        assert batch.substituted.item() == (lost if step >= 5 else 0)
        assert torch.equal(batch.sample_ids, expected.sample_ids) == (batch.substituted.item() == 0)


def test_substitutes_come_from_other_windows_where_a_shard_fills_its_own(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [40, 1100, 1100])
    (shards / "00001.tar").unlink()
    config = config_of(shards, window=16, views={"local_crops": 0}, captions={"count": 1, "global_count": 1})
    loader = make(shards, config, lost_shards={NAMES[1]: 0})
    for start in range(0, 560, 35):  # 2,240 samples, 560 steps
        (batch,), lost = take(loader, start, 1)
        assert not lost
        assert all(not 40 <= sample < 1140 for sample in batch.sample_ids.tolist())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def no_table(path: Path) -> None:
    path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((")


def other_table(path: Path) -> None:
    np.save(path, np.zeros(7))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "No such file or directory"),
        (cut, "damaged"),
        (no_table, "damaged"),
        (other_table, "no table of samples"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_whose_table_is_lost_is_lost(
    shards: Path, workers: int, damage: Callable[[Path], None], reason: str
) -> None:
    table = shards / "00001.index.npy"
    damage(table)
    loader = make(shards, config_of(shards, workers=workers))
    batches, lost = take(loader, 0, 6)
    assert [loss for losses in lost.values() for loss in losses.items()] == [
        (NAMES[1], f"its index {table} cannot be read: {reason}; run `cosmos-scale data index`")
    ]
    assert all(shard_of(sample) != 1 for batch in batches for sample in batch.sample_ids.tolist())


def check(folder: Path, lost: dict[str, int] | None = None, *, resumed: bool, **data: Any) -> None:
    check_shards(open_folder(folder), config_of(folder, **data), lost or {}, resumed=resumed)


def test_before_a_run_a_missing_table_was_never_there(shards: Path) -> None:
    (shards / "00001.index.npy").unlink()
    with pytest.raises(UserError, match=r"00001\.index\.npy: index cannot be read: No such file or directory; run "):
        check(shards, resumed=False)
    check(shards, {NAMES[1]: 0}, resumed=False)


def test_a_resumed_run_may_miss_what_it_may_lose(shards: Path) -> None:
    (shards / "00001.tar").unlink()
    (shards / "00003.tar").unlink()  # both shards hold 13 of 21 samples
    for limit in (0.62, 1.0):
        check(shards, resumed=True, max_damaged=limit)
    for limit, lost in ((0.61, {}), (0.61, {NAMES[1]: 3}), (0.74, {NAMES[0]: 3, NAMES[1]: 3}), (0.0, {})):
        with pytest.raises(UserError, match=r"^shard test/0000[13]\.tar is missing: No such file .* allows$") as error:
            check(shards, lost, resumed=True, max_damaged=limit)
        assert f"{len({NAMES[1], NAMES[3]} - set(lost))} missing shards" in str(error.value)
    check(shards, {NAMES[1]: 0, NAMES[3]: 0}, resumed=True, max_damaged=0.0)


def test_a_lost_shard_leaves_one_record(shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "damaged.jsonl"
    (shards / "00001.tar").unlink()
    for _ in range(2):  # the second time replays the first: still one record
        _, lost = take(make(shards, config_of(shards), damaged_log=log), 0, 6)
    ((step, reasons),) = lost.items()
    other = make(shards, config_of(shards), 1, 2, damaged_log=log)  # the first rank has written the record
    other.lose([reasons, {}], step)
    take(other, step, 2)
    (record,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert record.pop("reason") == f"lost: {reasons[NAMES[1]]}"
    assert record == {
        "step": step, "epoch": 0, "sample": None, "source": "test", "shard": str(shards / "00001.tar"), "key": None,
        "rank": 0,
    }  # fmt: skip


def test_past_the_limit_the_run_stops_in_one_line(shards: Path) -> None:
    (shards / "00001.tar").unlink()
    with pytest.raises(UserError) as error:
        take(make(shards, config_of(shards, max_damaged=0.3)), 0, 6)
    assert str(error.value).startswith(f"shard {NAMES[1]} is lost: ")
    assert "1 lost shard holds 33.33% of all samples, more than data.max_damaged 0.3 allows" in str(error.value)
    assert "\n" not in str(error.value)


def look_ahead(rank: int, world_size: int, folders: list[Path], steps: int) -> dict[str, Any]:
    """Take batches with the ranks' agreement, each rank reading from its own folder of the same shards."""
    config, said = config_of(folders[rank]), list[str]()
    loader = make(folders[rank], config, rank, world_size)
    ahead = Lookahead(
        loader, start_ranks("cpu"), StopRequest(None), said.append, first=0, last=steps, unsaved=bool, enter=str
    )
    taken = [{name: getattr(batch, name).clone() for name in (*SHARES, "sample_ids")} for batch, _, _ in ahead]
    assert len(taken) == steps
    return {"batches": taken, "lost": loader.lost_shards, "said": said}


def test_what_one_rank_cannot_read_all_replace(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", COUNTS)
    (other / "00001.tar").unlink()
    ranks = run_ranks(look_ahead, 2, [shards, other], 12)
    assert ranks[0]["lost"] == ranks[1]["lost"]
    assert list(ranks[0]["lost"]) == [NAMES[1]]
    assert ranks[0]["said"] == ranks[1]["said"]
    (line,) = ranks[0]["said"]
    assert line.startswith(f"shard {NAMES[1]} is lost: ")
    assert "(rank 1); from step" in line
    # At world size 1 a rank that is told of the loss, and reads shards that are all there, gets the same batches.
    alone, _ = take(make(shards, config_of(shards), lost_shards=ranks[0]["lost"]), 0, 12)
    for expected, *shares in zip(alone, ranks[0]["batches"], ranks[1]["batches"], strict=True):
        assert torch.equal(torch.cat([share["sample_ids"] for share in shares]), expected.sample_ids)
        for name in SHARES:
            assert torch.equal(torch.cat([share[name] for share in shares], 1), getattr(expected, name)), name
