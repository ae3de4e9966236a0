"""Traces read: work by phase, exposed collectives, memory, waits. They are constructed, not recorded on a GPU."""

from typing import Any

import pytest

from cosmos_scale.profiling.collective_times import bus_factor, collective_calls, summarise
from cosmos_scale.profiling.device_work import busy_by_phase, top_work, work_by_kind
from cosmos_scale.profiling.host_waits import HostWait, host_waits
from cosmos_scale.profiling.memory_timeline import BEFORE, memory_timeline
from cosmos_scale.profiling.trace import Trace, overlap, union
from tests.profiling.constructed import AUTOGRAD, MAIN, STEP_US, gpu_step, host


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(gpu_step().events, skip=1)


def test_kernels_belong_to_the_phase_that_launched_them(trace: Trace) -> None:
    assert [(kernel.name, kernel.phase, kernel.step) for kernel in trace.kernels if kernel.lane == 7] == [
        ("sm90_xmma_gemm_bf16", "student", 0),
        ("flash_fwd_kernel", "teacher", 0),
        ("vectorized_elementwise_kernel", "loss", 0),
        ("sm90_xmma_gemm_bf16", "backward", 0),  # launched in another thread
        ("adamw_ema_update_kernel", "update", 0),
    ]


def test_each_moment_of_the_device_counts_once(trace: Trace) -> None:
    busy = busy_by_phase(trace)
    # The copy runs in 55-75, before all. The scatter's last 50 us and the gather's last 30 us are hidden by nothing.
    expected = {
        "copy": 20,
        "student": 200,
        "teacher": 50,
        "loss": 20,
        "backward": 300 + 50,
        "update": 40,
        "refresh": 30,
    }
    assert busy == pytest.approx({name: us / 1e3 for name, us in expected.items()})
    assert sum(busy.values()) <= STEP_US / 1e3


def test_work_is_summed_by_kind_and_by_name(trace: Trace) -> None:
    kinds = {"matmul": 0.5, "collectives": 0.19, "element-wise": 0.06, "attention": 0.05, "copies": 0.02}
    assert work_by_kind(trace) == pytest.approx(kinds)
    first = top_work(trace)[0]
    assert (first.name, first.phase, first.calls) == ("sm90_xmma_gemm_bf16", "backward", 1.0)
    assert first.ms == pytest.approx(0.3)


def test_nccl_kernels_say_their_bytes(trace: Trace) -> None:
    calls = collective_calls(trace)
    scatter, gather = summarise(calls, 1, calls, 8)
    assert (scatter.phase, scatter.kind, scatter.calls) == ("backward", "reduce_scatter", 1)
    assert scatter.mbytes == 8.0  # of the whole tensor: 4,000,000 elements of 2 bytes
    assert scatter.ms == pytest.approx(0.15)
    assert scatter.bus_gbs == pytest.approx(8.0 / 0.15 * 7 / 8)
    assert scatter.exposed_ms == pytest.approx(0.05)
    assert (gather.phase, gather.kind, gather.mbytes, gather.bus_gbs) == ("refresh", "all_gather", None, None)
    assert gather.exposed_ms == pytest.approx(0.03)  # the update hides 10 us


@pytest.mark.parametrize(("kind", "factor"), [("all_reduce", 1.5), ("all_gather", 0.75), ("broadcast", 1.0)])
def test_bus_bandwidth_counts_as_nccl_tests_do(kind: str, factor: float) -> None:
    assert bus_factor(kind, 4) == factor


def test_the_peak_of_memory_has_a_moment_and_owners(trace: Trace) -> None:
    line = memory_timeline(trace, found=0)
    assert line is not None
    assert (line.peak, line.peak_phase, line.known) == (2100, "backward", True)
    assert line.peak_ms == pytest.approx(0.4)
    assert line.owners == {BEFORE: 1000, "student": 600, "backward": 500}
    assert line.largest == 600
    assert line.phases[2][0] == "student"
    assert line.phases[2][1:] == pytest.approx((0.06, 0.2))
    assert max(line.points, key=lambda point: point[1]) == pytest.approx((0.4, 2100))


def test_memory_of_a_cpu_begins_with_the_formula() -> None:
    built = gpu_step()
    for event in built.events:
        if event["name"] == "[memory]":
            event["args"]["Device Type"] = 0
    line = memory_timeline(Trace(built.events, skip=1), found=5000)
    assert line is not None
    assert (line.peak, line.owners[BEFORE], line.known) == (6100, 5000, False)


def test_a_step_of_a_cpu_finds_what_the_steps_before_it_left() -> None:
    """A block that is taken before the step, and given back in it, counts until then."""
    taken = {"Device Type": 0, "Addr": 7, "Total Allocated": 0}
    events = [
        host("phase:step", "user_annotation", 0, 100),
        {"name": "[memory]", "ts": 50.0, "args": {**taken, "Bytes": 300}},
        host("phase:step", "user_annotation", 200, 300),
        {"name": "[memory]", "ts": 220.0, "args": {**taken, "Bytes": 40, "Addr": 8}},
        {"name": "[memory]", "ts": 240.0, "args": {**taken, "Bytes": -300}},
    ]
    line = memory_timeline(Trace(events, skip=1), found=1000)
    assert line is not None
    assert (line.peak, line.owners[BEFORE], line.points[-1][1]) == (1340, 1300, 1040)


def test_host_waits_have_our_file_and_line(trace: Trace) -> None:
    (wait,) = host_waits(trace)
    assert wait == HostWait("cosmos_scale/engine/optimizer.py:77", "cudaStreamSynchronize", "backward", 1.0, 0.07)


def test_gloo_is_matched_with_the_calls_in_their_order() -> None:
    step = host("phase:step", "user_annotation", 0, 1000)
    shape: dict[str, Any] = {"Input Dims": [[100], [200], [], []], "Input type": ["float", "float", "", "Scalar"]}
    events = [
        step,
        host("phase:backward", "user_annotation", 100, 600),
        host("phase:refresh", "user_annotation", 600, 700),
        host("c10d::_reduce_scatter_base_", "cpu_op", 200, 210, **shape),
        host("c10d::_reduce_scatter_base_", "cpu_op", 300, 310, **shape),
        host("c10d::_allgather_base_", "cpu_op", 650, 660, **shape),
        host("aten::mm", "cpu_op", 220, 420),
        # A hook of the engine waits in it: nothing is computed there.
        host("torch::autograd::AccumulateGrad", "cpu_op", 425, 500),
        # gloo makes a reduce_scatter of an all_reduce; the gather is still under way where the trace ends.
        host("gloo:all_reduce", "user_annotation", 205, 290, AUTOGRAD + 1),
        host("gloo:all_reduce", "user_annotation", 400, 450, AUTOGRAD + 1),
    ]
    trace = Trace(events)
    scatter, gather = summarise(collective_calls(trace), 1, collective_calls(trace), 2)
    assert (scatter.phase, scatter.kind, scatter.calls, scatter.mbytes) == ("backward", "reduce_scatter", 2, 0.0008)
    assert scatter.ms == pytest.approx((0.085 + 0.05) / 2)
    assert scatter.exposed_ms == pytest.approx(0.015 + 0.03)  # 205-220, 420-450
    assert (gather.phase, gather.calls, gather.ms, gather.exposed_ms) == ("refresh", 1, None, None)


def test_a_part_of_a_phase_belongs_to_the_phase() -> None:
    events = [
        host("phase:step", "user_annotation", 0, 100),
        host("phase:teacher", "user_annotation", 10, 90),
        host("phase:refresh", "user_annotation", 20, 30),
        host("phase:decode", "user_annotation", 40, 50),  # a part of a sample's making
    ]
    trace = Trace(events)
    places = {5: "rest", 15: "teacher", 25: "refresh", 35: "teacher", 45: "teacher", 95: "rest"}
    assert {time: trace.phase_at(time) for time in places} == places
    assert trace.main_thread == MAIN


def test_stretches_are_joined_and_compared() -> None:
    assert union([(3, 4), (0, 2), (1, 3), (9, 10)]) == [(0, 4), (9, 10)]
    assert union([(0, 1), (2, 3)], bridged=1.0) == [(0, 3)]
    assert overlap((2, 9.5), [(0, 4), (5, 6), (9, 10)]) == 2 + 1 + 0.5
