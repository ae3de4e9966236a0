"""The teacher's image tower as a CUDA graph: when it is made, what it is given, and that it equals the tower."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cosmos_scale.config import ModelConfig, TextConfig, VisionConfig
from cosmos_scale.engine.teacher_graph import WARM_UP, GraphedEncoder
from cosmos_scale.model.cosmos import CosmosModel


class FakeGraphs:
    """Stands for CUDA's graphs: what `encode` does while one is made, `replay` does again with the same memory."""

    def __init__(self, patch: pytest.MonkeyPatch, error: str | None = None) -> None:
        self.weight = torch.ones(1)
        self.eager = self.captures = self.replays = 0
        self._error = error
        self._capturing = False
        self.stream, self.pools = "training", ["pool"] if error else []  # current stream; pools that take memory
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph", self._capture)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.pools.remove(pool))

    def encode(self, images: Tensor) -> Tensor:
        if self._capturing:
            self._images, self._features = images, torch.zeros_like(images)  # nothing runs yet
            return self._features
        self.eager += 1
        return self.weight * images

    def replay(self) -> None:
        self.replays += 1
        self._features.copy_(self.weight * self._images)

    @contextmanager
    def _capture(self, graph: object, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (graph, pool, capture_error_mode) == (self, "pool", "thread_local")
        if self._error:
            self.stream = "capture"  # torch leaves it so where it cannot end the capture
            raise RuntimeError(self._error)
        self._capturing = True
        yield
        self._capturing = False
        self.captures += 1


def test_the_graph_is_replayed_after_the_warm_up_with_each_call_s_images(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGraphs(monkeypatch)
    encoder = GraphedEncoder(fake.encode)
    results = []
    for number in range(WARM_UP + 3):
        fake.weight.fill_(10.0 + number)  # the average is copied into the same memory
        results.append(encoder(torch.full((2, 3), float(number))))
    assert [result[0, 0].item() for result in results] == [number * (10.0 + number) for number in range(WARM_UP + 3)]
    assert (fake.eager, fake.captures, fake.replays) == (WARM_UP, 1, 3)


def test_other_images_go_to_the_tower_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGraphs(monkeypatch)
    encoder = GraphedEncoder(fake.encode)
    for _ in range(2):  # no kind comes often enough in a row
        for _ in range(WARM_UP):
            encoder(torch.ones(2, 3))
        encoder(torch.ones(4, 3))
    assert (fake.eager, fake.captures) == (2 * WARM_UP + 2, 0)
    for _ in range(WARM_UP + 1):
        encoder(torch.ones(2, 3))
    before = fake.eager
    assert encoder(torch.ones(1, 3)).shape == (1, 3)
    assert encoder(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert (fake.eager, fake.captures) == (before + 2, 1)


def test_where_no_graph_can_be_made_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeGraphs(monkeypatch, "operation not permitted when stream is capturing\nmore lines")
    encoder = GraphedEncoder(fake.encode)
    with caplog.at_level(logging.INFO):
        for _ in range(WARM_UP + 3):
            encoder(torch.ones(2, 3))
    assert (fake.eager, fake.replays) == (WARM_UP + 3, 0)
    assert (fake.stream, fake.pools) == ("training", [])
    assert [message.endswith("operation not permitted when stream is capturing") for message in caplog.messages] == [
        True
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_replay_equals_the_tower_on_a_gpu(dtype: torch.dtype) -> None:
    config = ModelConfig(
        embed_dim=64,
        pooler_heads=1,
        vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=3, head_width=64),
        text=TextConfig(context_length=32, width=64, layers=1, heads=1),
    )
    device = torch.device("cuda", torch.cuda.current_device())
    model = CosmosModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(device, dtype).requires_grad_(requires_grad=False)
    encoder = GraphedEncoder(model.encode_image)
    kept = []
    for number in range(WARM_UP + 4):
        images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(number)).to(device)
        kept.append((encoder(images), model.encode_image(images)))
        for parameter in model.parameters():  # as the refresh after a step does
            parameter.mul_(1.01)
    assert encoder.replays
    for replayed, expected in kept:  # no result is overwritten by a later replay
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
def test_after_a_capture_that_broke_training_goes_on_in_its_own_stream() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.current_stream()
    encoder = GraphedEncoder(lambda images: images * float(images.sum()))  # the host waits, which no capture allows
    for number in range(WARM_UP + 3):
        images = torch.full((2, 3), float(number), device=device)
        assert torch.equal(encoder(images), images * images.sum())
    assert not encoder.replays
    assert torch.cuda.current_stream() == before
