"""Hosts that are not there, for tests of the look at hosts: a program `ssh` that tells facts as a file has them.

Only the facts are made up; files, ports and clocks are this machine's.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_scale.config.load import load_config
from cosmos_scale.launch.look import Looker
from cosmos_scale.launch.wire import Message

SOUND: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.9", "deepspeed": "0.19.8"},
    "sources": "0123",
    "addresses": ["127.0.0.1"],
    "ssh": ["127.0.0.1", "1", "127.0.0.1", "22"],
    "errors": {},
    "index": "4567",
    "gpus": ["NVIDIA H100"] * 8,
    "driver": "580.1",
    "shared_memory": 2**36,
}


class FakeLooker(Looker):
    """Answers with the facts of a file, and with a clock that is so many seconds ahead as the fact `clock` says."""

    def __init__(self, changes: dict[str, Any]) -> None:
        super().__init__()
        self._changes = changes

    def _facts(self, asked: Message) -> Message:
        config = load_config(Path(asked["file"]), [*asked["overrides"], *self._changes.get("overrides", [])])
        self._write_token((config.output / config.name).absolute(), asked["token"])
        return SOUND | {"config": config.model_dump(mode="json")} | self._changes

    def _answer(self, message: Message) -> None:
        if "time" in message and "clock" in self._changes:
            self._answers.send({"time": time.time() + self._changes["clock"]})
        else:
            super()._answer(message)


def write_ssh(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a program `ssh` that knows the hosts of `facts`, each with what differs from SOUND; return its folder."""
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(facts))
    ssh = folder / "ssh"
    # ssh OPTIONS -- HOST COMMAND
    ssh.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\n'
        f'exec {sys.executable} -m tests.launch.fake_ssh {folder}/facts.json "$2"\n'
    )
    ssh.chmod(0o755)
    return folder


if __name__ == "__main__":
    known = json.loads(Path(sys.argv[1]).read_text())
    if sys.argv[2] not in known:
        sys.exit(f"ssh: connect to host {sys.argv[2]} port 22: No route to host")
    FakeLooker(known[sys.argv[2]]).run()
