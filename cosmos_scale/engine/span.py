"""How long the device works between two points of the program, read later so that the host never waits for it."""

import time

import torch


class Span:
    """The time from this object's making to its `end`, on the current stream of a GPU or on the host."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if on_gpu and torch.cuda.is_initialized():  # not where tensors only stand for a GPU's
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._start = self._end = time.perf_counter()

    def end(self) -> None:
        """End the span here."""
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Return the length in seconds; on a GPU only after the device has passed the end."""
        if self._events is None:
            return self._end - self._start
        start, end = self._events
        return float(start.elapsed_time(end)) / 1000.0
