"""Position tables of another length, against OpenCLIP's own functions."""

from types import SimpleNamespace

import open_clip.model
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cosmos_scale.checkpoint.interchange.names import Shape
from cosmos_scale.checkpoint.interchange.resize import (
    IMAGE_TABLE,
    TEXT_TABLE,
    can_resize,
    resize_table,
    resize_tables,
    resizing,
)


def drawn(rows: int, width: int = 24) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def by_openclip(tensors: dict[str, Tensor], side: int, length: int) -> dict[str, Tensor]:
    """Both tables as OpenCLIP resizes them for a model of side x side patches and `length` text positions."""
    tower = SimpleNamespace(grid_size=(side, side))
    model = SimpleNamespace(visual=tower, positional_embedding=torch.empty(length, tensors[TEXT_TABLE].shape[1]))
    state = dict(tensors)
    open_clip.model.resize_pos_embed(state, model)
    open_clip.model.resize_text_pos_embed(state, model)
    return state


@pytest.mark.parametrize(
    ("old", "new", "length"), [(14, 16, 77), (14, 7, 32), (7, 14, 128), (3, 3, 8), (2, 5, 77), (1, 4, 76)]
)
def test_tables_are_resized_as_openclip_does(old: int, new: int, length: int) -> None:
    tensors = {IMAGE_TABLE: drawn(1 + old * old), TEXT_TABLE: drawn(77, 16), "logit_scale": torch.tensor(2.0)}
    shapes: dict[str, Shape] = {IMAGE_TABLE: (1 + new * new, 24), TEXT_TABLE: (length, 16), "logit_scale": ()}
    found, expected = resize_tables(tensors, shapes), by_openclip(tensors, new, length)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    for name, tensor in expected.items():  # the same operators on other strides
        assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert torch.equal(found[IMAGE_TABLE][0], tensors[IMAGE_TABLE][0])


def test_a_table_of_the_wanted_shape_stays_as_it_is() -> None:
    table = drawn(10)
    assert resize_table(IMAGE_TABLE, table, (10, 24)) is table
    assert resize_table(TEXT_TABLE, table, (10, 24)) is table


def test_a_constant_table_stays_constant_and_a_ramp_a_ramp() -> None:
    """An oracle of its own: both interpolations have weights that add to 1; the linear one keeps a ramp's middle."""
    ones = torch.ones(1 + 49, 3)
    assert_close(resize_table(IMAGE_TABLE, ones, (1 + 144, 3)), torch.ones(1 + 144, 3), rtol=0, atol=1e-6)
    ramp = torch.arange(8.0)[:, None].double()
    halves = resize_table(TEXT_TABLE, ramp, (4, 1))
    assert halves.flatten().tolist() == [0.5, 2.5, 4.5, 6.5]


def test_only_position_tables_of_one_width_can_be_resized() -> None:
    assert can_resize(IMAGE_TABLE, (50, 8), (197, 8))
    assert can_resize(TEXT_TABLE, (77, 8), (32, 8))
    assert not can_resize(IMAGE_TABLE, (50, 8), (50, 16))
    assert not can_resize("token_embedding.weight", (50, 8), (197, 8))
    assert resizing(IMAGE_TABLE, (50, 8), (197, 8)) == "image positions resized from 7 x 7 to 14 x 14 patches"
    assert resizing(TEXT_TABLE, (77, 8), (32, 8)) == "text positions resized from 77 to 32"
