"""What both runs of a soak share: the demo's data, some samples of it damaged, and the demo's model, or a tiny one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.testing.runs import TINY
from cosmos_scale.testing.shard_files import flip_bytes, open_folder

MIB = 2**20
DAMAGED = 3  # samples
RUN_NAME = "soak"


class Size(NamedTuple):
    """How large a soak is. disk: MiB for the disturbed run. every: steps between checkpoints. watchdog: seconds.

    pause: most seconds between two events.
    """

    scenes: int
    disk: int
    every: int
    watchdog: float
    pause: float


DEMO = Size(scenes=512, disk=1024, every=6, watchdog=15.0, pause=3.0)
QUICK = Size(scenes=160, disk=256, every=10, watchdog=10.0, pause=1.0)


class Setting(NamedTuple):
    """The run's file, its size, and the keys of the damaged samples."""

    file: Path
    size: Size
    damaged: list[str]


def make_setting(out: Path, *, quick: bool, random: Random) -> Setting:
    """Paint scenes, damage some of them, and write the run's file into a folder."""
    size = QUICK if quick else DEMO
    shards = build_scenes(out / "data", train=size.scenes, gallery=8, workers=1).train
    index = open_folder(shards)
    damaged = []
    for number in sorted(random.sample(range(size.scenes), DAMAGED)):
        location = index.locate(number)
        flip_bytes(Path(location.shard), location.entry.image_offset, 64)  # the head of a JPEG
        damaged.append(location.entry.key)
    own: dict[str, Any] = {
        "name": RUN_NAME,
        "resume": "auto",
        "device": "cpu",
        "data": {
            "sources": [{"name": "scenes", "shards": str(shards)}],
            "samples": None,
            "workers": 1,
            "prefetch": 2,
            "max_damaged": 0.1,
        },
        # A rate at which a model of another rounding stays beside the first one, and still learns.
        "optimizer": {"lr": 3e-5, "warmup_steps": 20},
        "train": {"schedule_steps": 100_000, "watchdog_seconds": size.watchdog},
        "eval": [],
        # A look at the output may come late on a busy machine: the disk stays full for some saves.
        "checkpoint": {"every": size.every, "keep_last": 3, "at_start": False, "failures": 10},
        "log": {"every": 1, "progress": False},
    }
    base = out / "tiny.yaml"
    base.write_text(yaml.safe_dump(TINY))
    file = out / f"{RUN_NAME}.yaml"
    file.write_text(yaml.safe_dump({"extends": str(base) if quick else "cosmos:run/demo", **own}))
    return Setting(file, size, damaged)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[str | None]:
    """Mount a small disk in memory at a folder; yields why that cannot be done, or None."""
    folder.mkdir()
    options = f"size={mib}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "soak", folder], capture_output=True, text=True, check=False
    )
    try:
        yield None if mounted.returncode == 0 else mounted.stderr.strip() or f"mount: status {mounted.returncode}"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
