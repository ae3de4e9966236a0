"""Steps recorded by torch's profiler, with their phases as annotations."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cosmos_scale.files import read_regular
from cosmos_scale.phases import listening
from cosmos_scale.profiling.trace import PREFIX, STEP, Trace

GLOO_SECONDS = 0.1  # in which gloo's threads have ended their records, after a wait has returned


class _Annotations:
    """Writes phases into the trace."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Annotate what runs inside."""
        return record_function(PREFIX + name)


class Recording(NamedTuple):
    """Steps that were recorded. file: the trace as torch writes it, JSON."""

    trace: Trace
    file: bytes


def record_steps(
    take: Callable[[], object],
    settle: Callable[[], object],
    steps: int,
    *,
    on_gpu: bool,
    detailed: bool = False,
    skip: int = 1,
) -> Recording:
    """Take `skip + steps` steps, and return the trace of the last ones; the first ones warm the profiler up.

    settle: waits for all that steps have begun. torch's profiler breaks, and the process with it, where a collective of
    gloo begins in one recording and ends outside of it. detailed: with shapes and Python's stack, in which steps are
    far slower; else with memory.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    _settle(settle, on_gpu=on_gpu)
    with profile(
        activities=activities, record_shapes=detailed, with_stack=detailed, profile_memory=not detailed
    ) as profiler:
        for _ in range(skip + steps):
            with listening(_Annotations()), record_function(PREFIX + STEP):
                take()
        _settle(settle, on_gpu=on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        written = read_regular(file)
    return Recording(Trace(json.loads(written)["traceEvents"], skip=skip), written)


def _settle(settle: Callable[[], object], *, on_gpu: bool) -> None:
    settle()
    if on_gpu:
        torch.cuda.synchronize()
    else:
        time.sleep(GLOO_SECONDS)
