"""The rank harness itself: results by rank, and clear, prompt failures."""

import os
import signal
import time

import pytest
import torch
from torch import distributed as dist

from cosmos_scale.testing.ranks import RankError, run_ranks


def _sum_ranks(rank: int, world_size: int, offset: float) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, torch.get_num_threads(), total


def _one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("planted failure")
    dist.barrier()


def _one_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hangs(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()


def test_results_come_back_by_rank() -> None:
    results = run_ranks(_sum_ranks, 3, 0.5)
    assert [(rank, threads) for rank, threads, _ in results] == [(0, 1), (1, 1), (2, 1)]
    assert all(total.item() == 4.5 for _, _, total in results)


def test_failure_names_the_rank_and_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*_one_raises.*ValueError: planted failure"):
        run_ranks(_one_raises, 2)


def test_killed_rank_is_reported() -> None:
    with pytest.raises(RankError, match="rank 1 of 2: ended without a report, exit code -9"):
        run_ranks(_one_is_killed, 2)


def test_time_limit_ends_a_hang() -> None:
    run_ranks(_sum_ranks, 1, 0.0)  # the first launch makes the fork server, which takes seconds
    start = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0\] of 2 did not report"):
        run_ranks(_hangs, 2, timeout=5.0)
    assert time.monotonic() - start < 20.0  # the limit, with room for a busy machine
