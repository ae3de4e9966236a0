"""Steps recorded by torch's profiler, with their phases as annotations."""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cosmos_scale.phases import listening
from cosmos_scale.profiling.trace import PREFIX, STEP, Trace


class _Annotations:
    """Writes phases into the trace."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Annotate what runs inside."""
        return record_function(PREFIX + name)


def record_steps(
    take: Callable[[], object],
    steps: int,
    *,
    on_gpu: bool,
    detailed: bool = False,
    skip: int = 1,
    keep: Path | None = None,
) -> Trace:
    """Take `skip + steps` steps, and return the trace of the last ones; the first ones warm the profiler up.

    detailed: with shapes and Python's stack, in which steps are far slower; else with memory. keep: the file,
    *.json.gz, in which the trace is left.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize()
    with profile(
        activities=activities, record_shapes=detailed, with_stack=detailed, profile_memory=not detailed
    ) as profiler:
        for _ in range(skip + steps):
            with listening(_Annotations()), record_function(PREFIX + STEP):
                take()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        if keep is not None:
            with file.open("rb") as plain, gzip.open(keep, "wb", compresslevel=5) as packed:
                shutil.copyfileobj(plain, packed)
        events: list[dict[str, Any]] = json.loads(file.read_bytes())["traceEvents"]
    return Trace(events, skip=skip)
