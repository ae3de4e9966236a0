"""Garbage collection where processes are forked: none begins in a child before the parent's garbage is set apart."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosmos_scale.data.jobs import map_jobs
from cosmos_scale.testing.shard_files import shards_config, write_shards
from tests.data.training.test_loader import make, take

_early: list[Path] = []  # where a child notes a collection that begins too early; empty: no test asks


def _note_early_collections() -> None:
    """In a child, just forked: collect often, and note a collection that begins before the garbage is set apart."""
    if not _early:
        return
    parents = gc.get_freeze_count()

    def note(phase: str, _: object) -> None:
        if phase == "start" and gc.get_freeze_count() == parents:
            (_early[0] / str(os.getpid())).touch()

    gc.callbacks.append(note)
    gc.set_threshold(50)


os.register_at_fork(after_in_child=_note_early_collections)


@pytest.fixture
def noted(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "early"
    folder.mkdir()
    _early.append(folder)
    yield folder
    _early.clear()


def load(folder: Path) -> None:
    shards = write_shards(folder / "shards", [5, 7])
    take(make(shards, shards_config(shards, workers=2, prefetch=2)), 0, 4)


def do_jobs(folder: Path) -> None:
    assert list(map_jobs(abs, range(-4, 0), 2)) == [4, 3, 2, 1]


@pytest.mark.parametrize("work", [load, do_jobs])
def test_no_child_collects_its_parents_garbage(work: Callable[[Path], None], noted: Path, tmp_path: Path) -> None:
    work(tmp_path)
    assert list(noted.iterdir()) == []
    assert gc.isenabled()
