"""The training program, whose process of Weights & Biases is stopped for ever as the run ends, and is told late."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli import main as program
from cosmos_scale.run import wandb_tracker
from cosmos_scale.run.trackers import KeptRecords

LIMIT = 4  # seconds, of the watchdog
TOLD = 3 * LIMIT  # seconds that the run waits for that process


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    closed = KeptRecords.close

    def close(*given: Any, **keys: Any) -> None:
        for path in Path("/proc/self/task").glob("*/children"):
            for pid in path.read_text().split():
                if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGSTOP)
        closed(*given, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptRecords, "close", close)
        patch.setattr(wandb_tracker, "LONGEST_CLOSE", TOLD)
        return program.main(argv)
