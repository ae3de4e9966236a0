"""The start of the ranks: once in a process, whatever the device is called."""

import logging
import warnings

import pytest
import torch.distributed as dist

from cosmos_scale.engine.messages import limit_messages
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.testing.ranks import run_ranks


def start_twice(rank: int, world_size: int) -> tuple[bool, int]:
    """Whether a second call returns the same ranks, and how many groups there are."""
    first = start_ranks("auto")
    groups = len(dist.distributed_c10d._world.pg_map)
    return start_ranks("cpu") is first, len(dist.distributed_c10d._world.pg_map) - groups


def test_ranks_start_once_in_a_process() -> None:
    assert run_ranks(start_twice, 1) == [(True, 0)]


@pytest.mark.parametrize(
    ("level", "rank", "shown"), [("error", "0", False), ("warning", "0", True), ("info", "1", False)]
)
def test_libraries_warn_where_asked_on_rank_0_alone(
    level: str, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "kept")
    loggers = [logging.getLogger(name) for name in ("torch", "DeepSpeed")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            limit_messages(level)
            warnings.warn_explicit("of torch", UserWarning, "ddp.py", 1, module="torch.nn.parallel")
            warnings.warn_explicit("of others", UserWarning, "other.py", 1, module="torchy")
        assert [logger.isEnabledFor(logging.WARNING) for logger in loggers] == [shown] * 2
    finally:
        for logger, kept in zip(loggers, before, strict=True):
            logger.setLevel(kept)
    assert [str(warning.message) for warning in found] == ["of torch"] * shown + ["of others"]
