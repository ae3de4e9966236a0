"""Batches on their way to a GPU: what the host asks of a GPU's streams, written down by stand-ins for both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.run.copy_stream import CopyStream
from cosmos_scale.testing.tiny import tiny_batch

GPU = torch.device("cuda", 0)


class Stream:
    """A stream that writes down what waits in it."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    def wait_stream(self, other: "Stream") -> None:
        self.asked.append(f"{self.name} waits for {other.name}")


class Pinned:
    """A tensor that writes down where it is copied, and for which stream its copy is kept."""

    def __init__(self, name: str, device: torch.device, asked: list[str]) -> None:
        self.name, self.device, self.asked = name, device, asked

    def to(self, device: torch.device, non_blocking: bool = False) -> "Pinned":
        if self.device == device:
            return self
        assert non_blocking
        self.asked.append(f"copy {self.name}")
        return Pinned(self.name, device, self.asked)

    def record_stream(self, stream: Stream) -> None:
        assert self.device == GPU
        self.asked.append(f"keep {self.name} for {stream.name}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the GPU; any other call to it fails here, a wait of the host included."""
    asked: list[str] = []

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        asked.append(f"in {stream.name}")
        yield
        asked.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", asked))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps", asked))
    return asked


def pinned_batch(asked: list[str], **devices: torch.device) -> Batch:
    tensors: list[Any] = [Pinned(name, devices.get(name, torch.device("cpu")), asked) for name in Batch._fields]
    return Batch(*tensors)


def test_a_batch_is_copied_beside_the_steps_and_awaited_by_the_next(asked: list[str]) -> None:
    batch = pinned_batch(asked)
    brought = CopyStream(GPU).bring(batch)
    names = ("global_crops", "local_crops", "captions")
    assert asked == [
        "in copies",
        *(f"copy {name}" for name in names),
        "out of copies",
        "steps waits for copies",
        *(f"keep {name} for steps" for name in names),
    ]
    for name, tensor, source in zip(Batch._fields, brought, batch, strict=True):
        assert (tensor is source) == (name not in names)  # lengths, ids and the count stay on the host


def test_crops_that_dali_made_on_the_device_are_not_copied(asked: list[str]) -> None:
    batch = pinned_batch(asked, global_crops=GPU, local_crops=GPU)
    brought = CopyStream(GPU).bring(batch)
    assert [line for line in asked if line.startswith(("copy", "keep"))] == ["copy captions", "keep captions for steps"]
    assert brought.global_crops is batch.global_crops


def test_on_a_cpu_a_batch_stays_where_it_is() -> None:
    batch = tiny_batch(0)
    assert all(mine is theirs for mine, theirs in zip(CopyStream(torch.device("cpu")).bring(batch), batch, strict=True))


@pytest.mark.gpu
def test_copies_hold_what_was_sent_while_steps_run() -> None:
    """Batch after batch, each read only after much other work, and dropped before the work is done."""
    copies = CopyStream(torch.device("cuda"))
    busy = torch.randn(2048, 2048, device="cuda")
    sums, expected = [], []
    for step in range(12):
        batch = tiny_batch(step)._replace(captions=torch.full((4, 256, 77), step, dtype=torch.int32))
        brought = copies.bring(Batch(*(tensor.pin_memory() for tensor in batch)))
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(brought.captions.sum() + 0 * busy[0, 0].long())
        expected.append(int(batch.captions.sum()))
    assert [int(total) for total in sums] == expected
