"""What every stage shares: the device, the size, results written line by line, and times."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from cosmos_scale.profiling.chips import peak_flops

# The device first waits so many cycles, 1 to 3 ms, in which the host launches what is timed: the time of a short kernel
# would else be that of its launch.
AHEAD_CYCLES = 3_000_000
LINE_WIDTH = 400  # characters of a printed result; the file has all of it


class Recorder:
    """Where a stage writes. A row has the stage's name, the seconds since the report began, and the stage's values.

    tiny: whether sizes are those of a rehearsal, which say nothing about speed. began: `time.time()` of the report.
    """

    def __init__(self, out: Path, stage: str, *, device: Literal["cpu", "cuda"], tiny: bool, began: float) -> None:
        self.out = out
        self.stage = stage
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.tiny = tiny
        self._began = began

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: bfloat16 on a GPU, float32 on a CPU, which is slow in anything else."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def write(self, **values: Any) -> None:
        """Append a row to `report.jsonl`, so that it stays if the process dies, and print it."""
        row = {"stage": self.stage, "seconds": round(time.time() - self._began, 1), **values}
        line = json.dumps(row, default=str)
        with (self.out / "report.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line if len(line) <= LINE_WIDTH else f"{line[:LINE_WIDTH]} ...", flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Return the median time of a call on the device; the host launches the call's kernels before."""
        for _ in range(1 if self.tiny else warm):
            call()
        self.wait()
        times = []
        for _ in range(2 if self.tiny else repeats):
            if self.on_gpu:
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(AHEAD_CYCLES)
                before.record()
                call()
                after.record()
                after.synchronize()
                times.append(float(before.elapsed_time(after)))
            else:
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak(self) -> float | None:
        """Return the device's peak operations a second in bf16; None where it is not known."""
        return peak_flops(self.device, "bf16")


def failure(error: BaseException) -> str:
    """Return an error in a line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`."""
    return float((ours.float() - exact).norm() / exact.norm())
