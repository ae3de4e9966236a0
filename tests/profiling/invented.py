"""Measurements that are invented, so that what follows from them is known."""

from typing import Any

from cosmos_scale.config import RunConfig
from cosmos_scale.profiling.collective_times import CollectiveTimes
from cosmos_scale.profiling.device_work import TopWork
from cosmos_scale.profiling.findings import findings
from cosmos_scale.profiling.host_waits import HostWait
from cosmos_scale.profiling.loader_times import LoaderTimes
from cosmos_scale.profiling.memory_timeline import BEFORE, MemoryTimeline
from cosmos_scale.profiling.profile_record import profile_record
from cosmos_scale.profiling.rank_profile import GpuMemory, RankProfile, TracedSteps
from cosmos_scale.profiling.step_clock import StepTimes

GIB = 2**30
PHASES = {
    "data": 2.0,
    "copy": 1.0,
    "ranks": 0.5,
    "student": 20.0,
    "teacher": 10.0,
    "loss": 5.0,
    "backward": 50.0,
    "backward/reduction": 8.0,
    "update": 4.0,
    "refresh": 1.0,
    "figures": 6.0,
    "rest": 0.5,
}


def times(**changed: float) -> StepTimes:
    """Return a step, with some phases changed."""
    phases = PHASES | changed
    whole = sum(ms for key, ms in phases.items() if "/" not in key)
    return StepTimes(whole, phases, dict(phases))


def rank_profile(*, on_gpu: bool = True, **changed: float) -> RankProfile:
    """Return what a rank measures in five steps, with some phases changed."""
    measured = [times(**{"student": (20.0 + 0.1 * number)} | changed) for number in range(5)]
    busy = {"student": 18.0, "teacher": 10.0, "loss": 5.0, "backward": 49.0, "update": 4.0, "refresh": 1.0}
    traced = TracedSteps(
        steps=3,
        busy=busy if on_gpu else {},
        kinds={"matmul": 60.0, "element-wise": 20.0},
        top=[TopWork("sm90_xmma_gemm_bf16", "backward", 30.0, 24.0, 0.3)],
        collectives=[
            CollectiveTimes("backward", "reduce_scatter", 9.0, 67.7, 0.85, 70.0, 7.0),
            CollectiveTimes("loss", "all_gather", 1.0, 0.05, 5.0, 0.01, 5.0),
            CollectiveTimes("student", "all_gather", 12.0, 20.0, 0.5, 35.0, 4.0),
            CollectiveTimes("update", "all_gather", 200.0, 0.01, 0.05, 0.2, 9.0),
        ],
        memory=MemoryTimeline(
            peak=30 * GIB,
            peak_ms=40.0,
            peak_phase="teacher",
            owners={"student": 20 * GIB, BEFORE: 10 * GIB},
            largest=GIB,
            points=[(0.0, 10 * GIB), (40.0, 30 * GIB)],
            step_ms=120.0,
            phases=[("student", 0.0, 20.0)],
            known=True,
        ),
        waits=[HostWait("cosmos_scale/engine/optimizer.py:77", "cudaStreamSynchronize", "update", 1.0, 0.3)],
    )
    return RankProfile(
        host="a",
        device="NVIDIA H100 80GB HBM3",
        measured=measured,
        marks_ms=0.5,
        plain_ms=[step.host_ms / 1.01 for step in measured],
        flops=3e13,
        executed=4e13,
        peak_flops=1e15,
        traced=traced,
        loader=LoaderTimes(5.0, {"decode": 4.0, "rest": 1.0}),
        gpu_memory=GpuMemory(29 * GIB, 32 * GIB, 0, 80 * GIB) if on_gpu else None,
        planned_states=9 * GIB,
    )


def record_of(ranks: list[RankProfile], workers: int = 4, **sections: Any) -> dict[str, Any]:
    """Return the profile of some ranks, as it is written."""
    config = RunConfig.model_validate({"precision": "bf16", "train": {"global_batch": 64 * len(ranks)}, **sections})
    record = profile_record(config, ranks, warm_up=10, workers=workers)
    return record | {"findings": findings(record), "compared": None}
