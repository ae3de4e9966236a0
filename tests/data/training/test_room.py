"""Whether ready batches fit the host, before any loader process starts."""

import errno
import multiprocessing
import os
import resource

import pytest

from cosmos_scale.data.training.room import ReadyBatches
from cosmos_scale.errors import UserError


def test_a_batch_larger_than_a_file_may_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(to: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (to, resource.RLIM_INFINITY))

    batches = ReadyBatches(ranks=1, workers=2, prefetch=1, nbytes=3 << 20)
    limited(1 << 20)
    with pytest.raises(UserError, match=r"of 3\.0 MiB in shared memory, but files may have 1\.0 MiB; .*\(ulimit -f "):
        batches.check_shared_memory()
    batches._replace(workers=0).check_shared_memory()
    for fits in (3 << 20, resource.RLIM_INFINITY):
        limited(fits)
        batches.check_shared_memory()


def test_shared_memory_that_cannot_be_written_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(context: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    batches = ReadyBatches(ranks=1, workers=2, prefetch=1, nbytes=3 << 20)
    batches.check_shared_memory()
    monkeypatch.setattr(type(multiprocessing.get_context("fork")), "Lock", refused)
    with pytest.raises(UserError, match=r"^/dev/shm: cannot be written to: Read-only file system; rule: loader .*: 0$"):
        batches.check_shared_memory()
    batches._replace(workers=0).check_shared_memory()
