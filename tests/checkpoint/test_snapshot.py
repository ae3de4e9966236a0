"""The copy in memory that checkpoints are written from: how many buffers and copies, and the files' bytes."""

import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Size

from cosmos_scale.checkpoint.files import write_tensors
from cosmos_scale.checkpoint.snapshot import Snapshot
from cosmos_scale.checkpoint.state import KINDS
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.fragments import Fragment
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.test_state import fragments, keep, state

SIZES = (35, 13, 1, 20)


def of_flat_shards() -> list[Fragment]:
    """Fragments that are views of two flat shards a kind: two that follow each other, and two with padding between."""
    generator = torch.Generator().manual_seed(0)
    shards = [{kind: torch.randn(size, generator=generator) for kind in KINDS} for size in (48, 40)]
    places = ((0, 0), (0, 35), (1, 0), (1, 20))
    return [
        Fragment(
            name=str(number),
            shape=Size([size]),
            start=0,
            owned=True,
            **{kind: flat[place : place + size] for kind, flat in shards[shard].items()},
        )
        for number, ((shard, place), size) in enumerate(zip(places, SIZES, strict=True))
    ]


def test_neighbours_in_memory_are_copied_at_once() -> None:
    parts = of_flat_shards()
    snapshot = Snapshot(parts, on_gpu=False)
    assert {kind: buffer.numel() for kind, buffer in snapshot.buffers.items()} == dict.fromkeys(KINDS, sum(SIZES))
    assert [len(target) for target, _ in snapshot.copies] == [48, 1, 20] * len(KINDS)
    snapshot.take()
    for part in parts:
        for kind, tensor in part.tensors().items():
            assert torch.equal(snapshot.tensors[f"{part.name}|{kind}"], tensor)
    # The memory of the first copy serves the second.
    before = {name: tensor.data_ptr() for name, tensor in snapshot.tensors.items()}
    parts[0].weight.fill_(7.0)
    assert not torch.equal(snapshot.tensors["0|weight"], parts[0].weight)
    snapshot.take()
    assert torch.equal(snapshot.tensors["0|weight"], parts[0].weight)
    assert {name: tensor.data_ptr() for name, tensor in snapshot.tensors.items()} == before


def test_a_rank_that_saves_nothing_takes_no_memory() -> None:
    snapshot = Snapshot([], on_gpu=False)
    snapshot.take()
    assert snapshot.tensors == {}
    assert sum(buffer.nbytes for buffer in snapshot.buffers.values()) == 0


class FakeCuda:
    """Stands for CUDA's streams, events and locked memory; notes what is asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.locked: dict[int, int] = {}
        self.device = torch.device("cpu")

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, "side"))
        patch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(self, "current"))
        patch.setattr(torch.cuda, "stream", self.inside)
        patch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the host waits"))

    def inside(self, stream: "FakeStream") -> AbstractContextManager[None]:
        self.said.append(f"copies on {stream.name}")
        return nullcontext()

    def cudaHostRegister(self, place: int, nbytes: int, flags: int) -> int:  # noqa: N802 (CUDA's name)
        self.locked[place] = nbytes
        return 0

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802 (CUDA's name)
        del self.locked[place]
        return 0


class FakeStream:
    """A stream by its name."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name, self.device = cuda, name, cuda.device

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.said.append(f"{self.name} waits for the event")


class FakeEvent:
    """An event that notes who waits for it."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: FakeStream) -> None:
        self.cuda.said.append(f"event on {stream.name}")

    def synchronize(self) -> None:
        self.cuda.said.append("the host waits for the event")


def test_a_gpu_copies_into_one_locked_buffer_a_kind_beside_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.patch(monkeypatch)
    parts = of_flat_shards()
    snapshot = Snapshot(parts, on_gpu=True)
    assert list(cuda.locked.values()) == [4 * sum(SIZES)] * len(KINDS)  # no byte more than the data
    snapshot.take()
    assert cuda.said == [
        "side waits for current",
        "copies on side",
        "event on side",
        "current waits for the event",
    ]
    snapshot.wait()
    assert cuda.said[-1] == "the host waits for the event"
    assert torch.equal(snapshot.tensors["2|ema"], parts[2].ema)
    snapshot.free()
    assert cuda.locked == {}


def test_memory_that_cannot_be_locked_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda()
    cuda.patch(monkeypatch)
    monkeypatch.setattr(cuda, "cudaHostRegister", lambda *_: 2)
    snapshot = Snapshot(of_flat_shards(), on_gpu=True)
    snapshot.take()
    snapshot.free()  # what was never locked is not unlocked: that would be an error
    assert len(caplog.messages) == len(KINDS)
    assert "276 bytes cannot be locked in memory" in caplog.messages[0]


def save_and_leave(rank: int, world_size: int, root: Path) -> list[bool]:
    """Save twice, and write the same file from the fragments themselves; whether buffers outlive the writer."""
    group = dist.group.WORLD
    assert group is not None
    own = fragments(rank, world_size)
    with CheckpointWriter(root, own, group, keep(9)) as writer:
        writer.save(state(3))
        writer.save(state(6))
        alive: list[Any] = [weakref.ref(buffer) for buffer in writer._snapshot.buffers.values()]
    write_tensors(
        root / f"expected-{rank}", {f"{part.name}|{kind}": part.tensors()[kind] for kind in KINDS for part in own}
    )
    return [buffer() is not None for buffer in alive]


def test_files_have_the_bytes_of_the_fragments_and_the_memory_goes_back(tmp_path: Path) -> None:
    assert run_ranks(save_and_leave, 2, tmp_path) == [[False] * len(KINDS)] * 2
    for rank in range(2):
        expected = (tmp_path / f"expected-{rank}").read_bytes()
        for step in (3, 6):
            assert (tmp_path / f"step-0000000{step}/fragments-0000{rank}.safetensors").read_bytes() == expected
