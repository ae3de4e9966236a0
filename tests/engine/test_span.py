"""The time between two points of the program: on a GPU by events, which are read after the device has passed them.

A simulated device stands for the GPU: it passes what was recorded in order, and only when a test lets it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.span import Span
from cosmos_scale.run.progress import PendingStep
from cosmos_scale.step import StepOutput


class Device:
    """A stream of work, each piece with a length in seconds, and of events between them."""

    def __init__(self) -> None:
        self.queue: list[float | Event] = []
        self.now = 0.0

    def work(self, seconds: float) -> None:
        """Launch a piece of work; the host does not wait."""
        self.queue.append(seconds)

    def go_on(self) -> None:
        """Do the next piece of work, or pass the next event."""
        following = self.queue.pop(0)
        if isinstance(following, Event):
            following.passed = self.now
        else:
            self.now += following


class Event:
    """Stands for torch.cuda.Event. A real one refuses `elapsed_time` before it is passed, and so does this."""

    device = Device()

    def __init__(self, enable_timing: bool = False) -> None:
        self.is_timed = enable_timing
        self.passed: float | None = None

    def record(self) -> None:
        """Put the event behind all work launched so far."""
        self.device.queue.append(self)

    def query(self) -> bool:
        """Tell whether the device has passed the event."""
        return self.passed is not None

    def elapsed_time(self, later: "Event") -> float:
        """Return milliseconds between two events."""
        if self.passed is None or later.passed is None or not (self.is_timed and later.is_timed):
            raise RuntimeError("device not ready")
        return 1000.0 * (later.passed - self.passed)

    def synchronize(self) -> None:
        """A wait of the host."""
        raise AssertionError("the host waits for the device")


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = property(lambda self: True)


class PollingContact:
    """Lets the device go on until what is waited for is there, as time does."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Wait without blocking the device's stream."""
        while not is_done():
            self._device.go_on()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(Event, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return device


def step(device: Device, loss: float, forward_seconds: float) -> PendingStep:
    """Launch a step: its forward, the rest, and the copy of its figures."""
    forward = Span(on_gpu=True)
    device.work(forward_seconds)
    forward.end()
    device.work(1.0)
    figure = torch.tensor(loss).as_subclass(OnGpu)
    output = StepOutput(
        total=figure,
        clip=figure,
        distill=figure,
        finite=torch.tensor(True),
        features_finite=torch.tensor(True),
        logit_scale=torch.zeros(1),
        distill_logit_scale=torch.zeros(1),
        gradient_norm=torch.tensor(1.0),
        substituted=torch.tensor(0),
        forward=forward,
    )
    return PendingStep(1, output, None)


def test_the_time_of_a_step_is_read_without_waiting_for_the_newest(device: Device) -> None:
    contact = cast(Contact, PollingContact(device))
    first, newest = step(device, 2.0, 0.25), step(device, 3.0, 0.5)
    with pytest.raises(RuntimeError, match="not ready"):
        first.forward_seconds()
    assert first.read(contact).loss == 2.0
    assert first.forward_seconds() == pytest.approx(0.25)
    assert device.now == 1.25, "the device has done the first step alone"
    assert newest.read(contact).loss == 3.0
    assert newest.forward_seconds() == pytest.approx(0.5)


def test_without_a_gpu_the_host_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no GPU has been used, tensors may say that they lie on one: then steps are counted, not run."""
    times = iter((10.0, 10.5, 20.0, 20.25))
    monkeypatch.setattr("cosmos_scale.engine.span.time", SimpleNamespace(perf_counter=lambda: next(times)))
    for on_gpu, length in ((False, 0.5), (True, 0.25)):
        assert torch.cuda.is_initialized() is False
        span = Span(on_gpu=on_gpu)
        span.end()
        assert span.seconds() == length


@pytest.mark.gpu
def test_on_a_gpu_a_span_lies_between_spans_inside_and_around_it() -> None:
    """Nothing waits while it is recorded; the device works for about 20 ms."""
    outer: Any
    outer, inner = ([torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2))
    torch.cuda.init()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outer[0].record()
        span = Span(on_gpu=True)
        inner[0].record()
        torch.cuda._sleep(30_000_000)
        inner[1].record()
        span.end()
        outer[1].record()
        assert not outer[1].query(), "the device is still at work"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outer[1].synchronize()
    lengths = [start.elapsed_time(end) / 1000.0 for start, end in (inner, outer)]
    # A timestamp has a resolution of half a microsecond.
    assert lengths[0] - 1e-6 <= span.seconds() <= lengths[1] + 1e-6
    assert lengths[0] > 0
