"""One pass over the samples of a config's sources by worker processes: what each process opens once."""

import time
from functools import lru_cache
from typing import NamedTuple

from cosmos_scale.config import DataConfig
from cosmos_scale.data.shards.index import MergedIndex, open_sources


class Pass(NamedTuple):
    """One pass over samples. number: tells the pass from other passes of the same process, later ones included."""

    data: DataConfig
    number: int


def begin_pass(data: DataConfig) -> Pass:
    """Return a new pass, which is handed to every job."""
    return Pass(data, time.monotonic_ns())


@lru_cache(maxsize=1)
def opened_index(pass_: Pass) -> MergedIndex:
    """Return the index of the pass's sources, opened once a process: a pass has many jobs."""
    return open_sources(pass_.data.sources, pass_.data.remote)
