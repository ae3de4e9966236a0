"""An error of one rank is raised by all, with the rank, and with its host where there are several."""

import os
import socket
from unittest.mock import Mock

import pytest

from cosmos_scale.engine import ranks
from cosmos_scale.errors import UserError


@pytest.mark.parametrize(
    ("world_size", "of_this_host", "where"),
    [(1, "1", ""), (2, "2", " (rank 1)"), (2, "1", f" (rank 1 on host {socket.gethostname()})")],
)
def test_the_rank_and_its_host_are_named(
    monkeypatch: pytest.MonkeyPatch, world_size: int, of_this_host: str, where: str
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setitem(os.environ, name, of_this_host)
    monkeypatch.setattr(ranks, "from_all", lambda text, _: [text])
    with pytest.raises(UserError) as raised:
        ranks.raise_together(Mock(rank=1, world_size=world_size), UserError("a shard is cut short"))
    assert str(raised.value) == f"a shard is cut short{where}"
