"""Parts of shards on a file system of fsspec's whose reads can be ended, as those of s3, gs and abfs."""

import asyncio
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from cosmos_scale.data.shards.store import FilesystemStore, Missing, NoParts, Transient

DATA = bytes(range(256))


class DrippingFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """One file, `a.tar`, whose parts take `delay` seconds; ended counts the reads that were ended before."""

    protocol = "drips"
    delay, ended = 0.0, 0
    failure: Exception | None = None

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(DATA), "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        try:
            await asyncio.sleep(type(self).delay)
        except asyncio.CancelledError:
            DrippingFileSystem.ended += 1
            raise
        if (failure := type(self).failure) is not None:
            raise failure
        return DATA[start:end]


@pytest.fixture
def drips(monkeypatch: pytest.MonkeyPatch) -> type[DrippingFileSystem]:
    fsspec.register_implementation("drips", DrippingFileSystem, clobber=True)
    for name, value in (("delay", 0.0), ("ended", 0), ("failure", None)):
        monkeypatch.setattr(DrippingFileSystem, name, value)
    return DrippingFileSystem


def test_a_part_has_the_bytes_of_its_place(drips: type[DrippingFileSystem]) -> None:
    for speed in (0.0, 1000.0):
        assert FilesystemStore(5.0, speed).read("drips://a.tar", 7, 100, len(DATA)) == DATA[7:107]


def test_a_part_that_drips_is_ended_and_told(drips: type[DrippingFileSystem]) -> None:
    drips.delay = 60.0
    said = r"^100 bytes did not come within 0\.3 s; rule: data\.remote\.timeout_s, 0\.2 s, and .*, 1000 bytes/s$"
    with pytest.raises(Transient, match=said):
        FilesystemStore(0.2, 1000.0).read("drips://a.tar", 7, 100, len(DATA))
    assert drips.ended == 1


def test_without_a_lowest_speed_a_part_may_take_its_time(drips: type[DrippingFileSystem]) -> None:
    drips.delay = 0.2
    assert FilesystemStore(0.01, 0.0).read("drips://a.tar", 7, 100, len(DATA)) == DATA[7:107]


def test_errors_are_those_of_the_file_system(drips: type[DrippingFileSystem]) -> None:
    """A time-out of the file system's own connection is no slow answer."""
    store = FilesystemStore(5.0, 1000.0)
    failures: list[tuple[Exception, type[Exception], str]] = [
        (FileNotFoundError("a.tar"), Missing, "not found"),
        (asyncio.TimeoutError("connection"), Transient, "^(FSTimeoutError|connection)"),
        (NotImplementedError(), NoParts, "^$"),
        (OSError("reset by peer"), Transient, "reset by peer"),
    ]
    for failure, kind, said in failures:
        drips.failure = failure
        with pytest.raises(kind, match=said):
            store.read("drips://a.tar", 0, 10, len(DATA))
