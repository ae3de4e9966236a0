"""Colour of the crops that DALI cuts: by kernels as by batched torch, which is compared with Pillow elsewhere."""

from typing import Any

import pytest
import torch

from cosmos_scale.config import DaliConfig, ViewsConfig
from cosmos_scale.data.decode.crop_colour import colour_crops_
from cosmos_scale.profiling.operators import DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.data.decode.crop_plans import plan_fields, some_pixels
from tests.kernels.programs import json_lines, needs_triton

KERNELS = ("grey_sums", "recolour_", "box_blur_")
BLUR_MISSES = tolerance("colour, blurred, levels that differ", torch.uint8)


@needs_triton
def test_the_interpreted_kernels_make_the_same_levels() -> None:
    rows = json_lines("-m", "tests.data.decode.interpret_colour", interpret=True)
    assert len(rows) == 5
    for row in rows:
        assert row["changed"] > 0.5, row["case"]
        assert row["most"] <= ("blur" in row["case"] or row["case"] == "whole plans"), row["case"]
        assert row["misses"] <= BLUR_MISSES, row["case"]


@needs_triton
@pytest.mark.parametrize("blurred", [False, True])
def test_kernels_are_launched_by_view_and_not_by_operation(blurred: bool) -> None:
    """Two launches for each view, and the passes of a blur for all blurred crops together."""
    views, samples, side = ViewsConfig(), 64, 224
    fields = plan_fields(views, samples)
    fields["blur_radius"] *= blurred
    result = torch.empty(2, samples, 3, side, side, dtype=torch.uint8, device="meta")
    pixels = list(torch.empty(2, samples, side, side, 3, dtype=torch.uint8, device="meta"))
    launches = {}
    for triton in (True, False):
        with DeviceCounter() as counter:
            colour_crops_(result, pixels, *fields.values(), triton=triton)
        launches[triton] = {name: count.launches for (_, name), count in counter.counts.items() if name in KERNELS}
    assert launches[True] == {"grey_sums": 2, "recolour_": 2} | ({"box_blur_": 6} if blurred else {})
    assert launches[False] == {}


def test_no_views_and_no_crops_are_no_trouble() -> None:
    views = ViewsConfig()
    for count, samples in ((0, 3), (2, 0)):
        result = torch.empty(count, samples, 3, 8, 8, dtype=torch.uint8)
        fields = {name: field[: count * samples] for name, field in plan_fields(views, 3).items()}
        colour_crops_(
            result, some_pixels(2, 3, 8, 8)[:count] if samples else [result.new_empty(0, 8, 8, 3)] * 2, *fields.values()
        )


def test_dalis_memory_is_kept_until_the_gpu_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which has no wheel for this machine")
    from cosmos_scale.data.decode.dali import DaliDecoder

    made: list[Any] = []

    class Event:
        """An event that has happened when the test says so; any wait of the host would fail."""

        def __init__(self) -> None:
            self.happened = False
            made.append(self)

        def record(self, stream: object) -> None:
            self.stream = stream

        def query(self) -> bool:
            return self.happened

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "steps")
    decoder = DaliDecoder(ViewsConfig(), 32, 2, torch.device("cpu"), DaliConfig())
    crops = [[torch.empty(1)] for _ in range(4)]
    for batch in crops[:3]:
        decoder._keep(batch)
    assert [kept for _, kept in decoder._read] == crops[:3]
    made[0].happened = made[2].happened = True
    decoder._keep(crops[3])
    assert [kept for _, kept in decoder._read] == [crops[1], crops[3]]
    assert {event.stream for event in made} == {"steps"}


@pytest.mark.gpu
@pytest.mark.parametrize("side", [224, 96, 33])
def test_a_gpu_makes_the_same_levels(side: int) -> None:
    views, samples = ViewsConfig(solarise=0.5), 24
    fields, pixels = plan_fields(views, samples), some_pixels(2, samples, side, side)
    expected = torch.empty(2, samples, 3, side, side, dtype=torch.uint8)
    colour_crops_(expected, pixels, *fields.values())
    for triton in (True, False):
        result = torch.empty_like(expected, device="cuda")
        colour_crops_(result, [of.cuda() for of in pixels], *fields.values(), triton=triton)
        difference = (expected.int() - result.cpu().int()).abs()
        assert (difference > 0).float().mean() <= BLUR_MISSES
