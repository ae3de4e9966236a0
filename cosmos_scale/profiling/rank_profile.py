"""What one rank measures of its steps: made on every rank, and sent to the main rank."""

import socket
from typing import NamedTuple

import torch

from cosmos_scale.profiling.collective_times import CollectiveTimes, collective_calls, summarise
from cosmos_scale.profiling.device_work import TopWork, busy_by_phase, top_work, work_by_kind
from cosmos_scale.profiling.host_waits import HostWait, host_waits
from cosmos_scale.profiling.loader_times import LoaderTimes
from cosmos_scale.profiling.memory_timeline import MemoryTimeline, memory_timeline
from cosmos_scale.profiling.step_clock import StepTimes
from cosmos_scale.profiling.trace import Trace


class TracedSteps(NamedTuple):
    """What the traces of a rank say; milliseconds and calls are of a step.

    steps: how many were traced. busy: how long the GPU works for each phase; empty on a CPU.
    """

    steps: int
    busy: dict[str, float]
    kinds: dict[str, float]
    top: list[TopWork]
    collectives: list[CollectiveTimes]
    memory: MemoryTimeline | None
    waits: list[HostWait]


class GpuMemory(NamedTuple):
    """What torch's allocator says of a GPU after the steps, in bytes. retries: how often it had to empty its cache."""

    peak: int
    reserved: int
    retries: int
    capacity: int


class RankProfile(NamedTuple):
    """All that a rank has measured.

    device: its name. measured: the steps with marks. plain_ms: the steps beside them, without. marks_ms: what
    the marks of a step take of the host. flops, executed: operations that a step needs, and those with what is computed
    again; means. peak_flops: of the device, per second; None where it is not known.
    planned_states: bytes of student, optimizer and teacher that a step finds, by the formula of engine/memory.py.
    """

    host: str
    device: str
    measured: list[StepTimes]
    plain_ms: list[float]
    marks_ms: float
    flops: float
    executed: float
    peak_flops: float | None
    traced: TracedSteps
    loader: LoaderTimes
    gpu_memory: GpuMemory | None
    planned_states: int


def read_traces(trace: Trace, detailed: Trace, *, world_size: int, found: int) -> TracedSteps:
    """Read a trace of some steps, and a detailed one of a step. found: bytes that a step finds on a CPU."""
    steps = len(trace.steps)
    timed, sized = collective_calls(trace), collective_calls(trace if trace.on_gpu else detailed)
    return TracedSteps(
        steps=steps,
        busy=busy_by_phase(trace) if trace.on_gpu else {},
        kinds=work_by_kind(trace),
        top=top_work(trace),
        collectives=summarise(timed, steps, sized, world_size) if world_size > 1 else [],
        memory=memory_timeline(trace, found=found),
        waits=host_waits(detailed),
    )


def read_gpu_memory(device: torch.device) -> GpuMemory | None:
    """Return what torch's allocator says of this process's GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    return GpuMemory(
        peak=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        retries=int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)),
        capacity=torch.cuda.get_device_properties(device).total_memory,
    )


def host_name() -> str:
    """Return this host's name."""
    return socket.gethostname()


def device_name(device: torch.device) -> str:
    """Return the name that the driver gives a GPU, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability().lower()}"
