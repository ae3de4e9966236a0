"""A rank that cannot begin: the ranks of other hosts hear why, whatever the cause on its own host."""

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from cosmos_scale.cli.as_rank import ThisRank, as_rank
from cosmos_scale.engine.meeting import meet
from cosmos_scale.engine.rank_variables import RankVariables
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.errors import UserError
from cosmos_scale.run import supervisor

SECONDS = 20.0  # for what takes one at most


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("train.epochs: 0; rule: at least 1"), "train.epochs: 0; rule: at least 1"),
        (MemoryError(), os.strerror(errno.ENOMEM)),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a"), f"/runs/a: {os.strerror(errno.ENOSPC)}"),
    ],
    ids=["key", "memory", "disk"],
)
def test_other_hosts_hear_why_a_rank_does_not_come(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    port = free_port()
    variables = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(supervisor, "is_child_of_deepspeed", lambda: True)

    def work(rank: ThisRank) -> int:
        raise error

    def first() -> str:
        with pytest.raises(UserError) as refusal:
            meet(RankVariables(0, 2, 0, "127.0.0.1", port), SECONDS)
        return str(refusal.value)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first)
        with pytest.raises(type(error)):
            as_rank("train", work)
        assert waiting.result(2 * SECONDS).startswith(f"rank 1 on host {socket.gethostname()}: {said}")
