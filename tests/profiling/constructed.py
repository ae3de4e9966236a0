"""Traces put together by hand in the form that Kineto writes (Chrome's, with its categories and names of details).

No GPU was at hand: the form is that of torch's profiler by its sources and published traces, and not recorded here.
"""

from typing import Any

MAIN, AUTOGRAD, STREAM, COPIES, NCCL = 100, 101, 7, 16, 20
STEP_US = 1000.0
PHASES = {  # from, to, in microseconds of the step
    "data": (0, 50),
    "copy": (50, 60),
    "student": (60, 200),
    "teacher": (200, 300),
    "loss": (300, 340),
    "backward": (340, 700),
    "update": (700, 800),
    "refresh": (800, 850),
    "figures": (850, 990),
}
Event = dict[str, Any]
SCATTER: Event = {
    "Collective name": "_reduce_scatter_base",
    "dtype": "BFloat16",
    "In msg nelems": 4_000_000,
    "Out msg nelems": 500_000,
    "Group size": 8,
}


def host(name: str, category: str, start: float, end: float, tid: int = MAIN, **args: Any) -> Event:
    """Return what the host did: an operator, an annotation, a call of CUDA, or a call of Python."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": tid,
        "ts": start,
        "dur": end - start,
        "args": args,
    }


class GpuTrace:
    """Events of some steps on a GPU; times are microseconds."""

    def __init__(self, steps: int) -> None:
        self.events: list[Event] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0.0, "args": {}}]
        self._correlation = 0
        for step in range(steps):
            base = step * STEP_US
            self.events.append(host("phase:step", "user_annotation", base, base + STEP_US - 1))
            for name, (start, end) in PHASES.items():
                self.events.append(host(f"phase:{name}", "user_annotation", base + start, base + end))

    def kernel(
        self,
        name: str,
        launched: float,
        start: float,
        end: float,
        *,
        stream: int = STREAM,
        tid: int = MAIN,
        category: str = "kernel",
        **details: Any,
    ) -> None:
        """Add a kernel and its launch."""
        self._correlation += 1
        link = {"correlation": self._correlation}
        call = "cudaMemcpyAsync" if category == "gpu_memcpy" else "cudaLaunchKernel"
        self.events.append(host(call, "cuda_runtime", launched, launched + 5, tid, **link))
        self.events.append(host(name, category, start, end, stream, stream=stream, device=0, **link, **details))

    def memory(self, time: float, nbytes: int, address: int, allocated: int, *, device: int = 1) -> None:
        """Add a block taken, or given back where nbytes is negative. allocated: all that is held then."""
        details = {"Total Allocated": allocated, "Total Reserved": 2 * allocated, "Bytes": nbytes, "Addr": address}
        self.events.append(
            {
                "ph": "i",
                "cat": "cpu_instant_event",
                "name": "[memory]",
                "pid": 1,
                "tid": MAIN,
                "ts": time,
                "args": details | {"Device Type": device, "Device Id": 0},
            }
        )


def gpu_step() -> GpuTrace:
    """Return two steps, of which the first only warms up; the numbers of the second are what tests expect.

    The device is behind the host: the student's kernels run while the host is at the teacher.
    """
    trace = GpuTrace(2)
    for base in (0.0, STEP_US):
        trace.kernel(
            "Memcpy HtoD (Pinned -> Device)", base + 52, base + 55, base + 75, stream=COPIES, category="gpu_memcpy"
        )
        trace.kernel("sm90_xmma_gemm_bf16", base + 70, base + 80, base + 280)
        trace.kernel("flash_fwd_kernel", base + 210, base + 280, base + 330)
        trace.kernel("vectorized_elementwise_kernel", base + 310, base + 340, base + 360)
        # The backward is launched by autograd's own thread.
        trace.kernel("sm90_xmma_gemm_bf16", base + 350, base + 400, base + 700, tid=AUTOGRAD)
        trace.kernel(
            "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL",
            base + 360,
            base + 600,
            base + 750,
            stream=NCCL,
            tid=AUTOGRAD,
            **SCATTER,
        )
        trace.kernel("adamw_ema_update_kernel", base + 710, base + 760, base + 800)
        trace.kernel("ncclDevKernel_AllGather_RING_LL", base + 810, base + 790, base + 830, stream=NCCL)
        # Between 340 and 400, a wait of the host for the device, in our code and called through torch's.
        wait = (base + 620, base + 690)
        trace.events.append(host("cudaStreamSynchronize", "cuda_runtime", *wait))
        trace.events.append(
            host(
                "torch/_tensor.py(10): item",
                "python_function",
                wait[0] - 5,
                wait[1] + 5,
                **_frame(2, 1, "cosmos_scale/engine/optimizer.py:77"),
            )
        )
        trace.events.append(
            host(
                "cosmos_scale/engine/optimizer.py(60): update",
                "python_function",
                base + 340,
                base + 700,
                **_frame(1, 0, "cosmos_scale/step.py:58"),
            )
        )
        trace.memory(base + 65, 600, 1, 1600)
        trace.memory(base + 205, 300, 2, 1900)
        trace.memory(base + 290, -300, 2, 1600)
        trace.memory(base + 400, 500, 3, 2100)
        trace.memory(base + 500, -600, 1, 1500)
        trace.memory(base + 690, -500, 3, 1000)
    return trace


def _frame(number: int, parent: int, called_from: str) -> Event:
    return {"Python id": number, "Python parent id": parent, "CallFrom": called_from}
