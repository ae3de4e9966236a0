"""Packed layouts against loops, and that each block runs once a step, on no more tokens than it must."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cosmos_scale.batch import Batch
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.packing import pack_captions, pack_crops, token_multiple
from tests.model.models import SMALL, initialised, small_batch

CPU = torch.device("cpu")
CONTEXT = 12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12), st.data(), st.booleans())
def test_captions_are_cut_and_found_again(lengths: list[int], data: st.DataObject, keep_padding: bool) -> None:
    tokens_of = data.draw(st.integers(0, len(lengths)))
    layout = pack_captions(torch.tensor(lengths), CONTEXT, CPU, tokens_of, keep_padding)
    kept = [CONTEXT if keep_padding and b < tokens_of else length for b, length in enumerate(lengths)]
    assert sorted(layout.segments.queries) == sorted(kept)
    assert list(layout.segments.queries) == sorted(kept, reverse=True)

    # Every segment is the beginning of one caption, and every caption has its segment.
    captions, places = layout.ids // CONTEXT, layout.ids % CONTEXT
    assert torch.equal(places, layout.places)
    sizes = list(layout.segments.queries)
    segments = list(zip(captions.split(sizes), places.split(sizes), strict=True))
    assert sorted(int(caption[0]) for caption, _ in segments) == list(range(len(lengths)))
    for caption, place in segments:
        assert (caption == caption[0]).all()
        assert place.tolist() == list(range(kept[int(caption[0])]))

    # The ends in the captions' order, then all tokens of the first captions.
    expected = [(b, length - 1) for b, length in enumerate(lengths)]
    expected += [(b, place) for b in range(tokens_of) for place in range(kept[b])]
    assert list(zip(captions[layout.read].tolist(), places[layout.read].tolist(), strict=True)) == expected
    assert list(layout.read_lengths) == kept[:tokens_of]


@given(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12), st.integers(1, 40))
def test_tokens_fill_up_to_a_multiple_and_nobody_reads_them(lengths: list[int], multiple: int) -> None:
    plain, filled = (pack_captions(torch.tensor(lengths), CONTEXT, CPU, multiple=count) for count in (1, multiple))
    tokens = sum(lengths)
    assert filled.segments.query_tokens % multiple == 0
    assert 0 <= filled.segments.query_tokens - tokens < multiple
    own = len(lengths)
    assert filled.segments.queries[:own] == plain.segments.queries
    assert all(1 <= length <= CONTEXT for length in filled.segments.queries[own:])
    assert torch.equal(filled.ids[:tokens], plain.ids)
    assert torch.equal(filled.places[:tokens], plain.places)
    assert filled.ids.max() < len(lengths) * CONTEXT
    assert filled.places.max() < CONTEXT
    assert torch.equal(filled.read, plain.read)


def test_filled_up_tokens_change_neither_features_nor_gradients() -> None:
    results = []
    for multiple in (1, 64):
        model = initialised(SMALL.model_copy(update={"token_multiple": multiple}))
        features = model(small_batch(3))
        sum(feature.square().sum() + feature.sum() for feature in features[:4]).backward()
        results.append([*features, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    for plain, filled in zip(*results, strict=True):
        assert (plain - filled).abs().max() <= 1e-5 * max(1.0, plain.abs().max().item())


@pytest.mark.parametrize(("device", "wanted", "expected"), [("cpu", None, 1), ("cuda", None, 256), ("cuda", 8, 8)])
def test_tokens_fill_up_on_a_gpu_by_default(device: str, wanted: int | None, expected: int) -> None:
    assert token_multiple(wanted, torch.device(device)) == expected


@pytest.mark.parametrize("lengths", [[3, 0], [3, CONTEXT + 1], [-1]])
def test_lengths_that_no_caption_has_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"from 1 to {CONTEXT}, not"):
        pack_captions(torch.tensor(lengths), CONTEXT, CPU)


@pytest.mark.parametrize("tokens_of", [0, 1, 3])
def test_crops_are_read_at_their_class_tokens_and_the_first_ones_patches(tokens_of: int) -> None:
    layout = pack_crops(((3, 5), (4, 2)), tokens_of, CPU)
    assert layout.segments.queries == (5, 5, 5, 2, 2, 2, 2)
    crops = np.repeat(np.arange(7), layout.segments.queries)
    places = np.concatenate([np.arange(length) for length in layout.segments.queries])
    expected = [(crop, 0) for crop in range(7)] + [(crop, place) for crop in range(tokens_of) for place in range(1, 5)]
    read = layout.read.numpy()
    assert list(zip(crops[read].tolist(), places[read].tolist(), strict=True)) == expected


def rows_seen(model: CosmosModel, run: str, batch: Batch) -> dict[str, list[int]]:
    """How many tokens each layer got, call by call, by the layer's name; 0 for what takes a list of crops."""
    seen: dict[str, list[int]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor | list[Tensor], ...]) -> None:
        first = inputs[0]
        seen.setdefault(name, []).append(first.shape[0] if isinstance(first, Tensor) else 0)

    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(partial(note, name))
    if run == "student":
        model(batch)
    else:
        model.teacher_features(batch, 2)
    return seen


@pytest.mark.parametrize("text_padding", ["attend", "mask"])
@pytest.mark.parametrize("run", ["student", "teacher"])
def test_each_layer_runs_once_on_the_tokens_it_must(run: str, text_padding: str) -> None:
    text = SMALL.text.model_copy(update={"layers": 2})
    model = initialised(SMALL.model_copy(update={"text_padding": text_padding, "text": text}))
    samples, captions = 3, 4
    batch = small_batch(samples, views=(2, 3), captions=captions)
    seen = rows_seen(model, run, batch)
    assert {name: rows for name, rows in seen.items() if len(rows) > 1} == {}, "runs more than once a step"

    student = run == "student"
    context, patches = SMALL.text.context_length, (24 // 8) ** 2
    kept = batch.caption_lengths if student else batch.caption_lengths[:2]
    words = kept[0].clone()
    if student and text_padding == "attend":
        words.fill_(context)
    text_tokens = int(words.sum() + kept[1:].sum())
    image_tokens = samples * (2 * (1 + patches) + (3 * (1 + (16 // 8) ** 2) if student else 0))
    for tower, tokens in (("transformer", text_tokens), ("visual.transformer", image_tokens)):
        assert seen[f"{tower}.resblocks.0.mlp"] == seen[f"{tower}.resblocks.1.ln_1"] == [tokens]
    # Behind the last attention: what is read, and no more.
    views = (2 + 3, captions) if student else (2, 2)
    assert seen["visual.ln_post"] == [samples * (views[0] + (patches if student else 0))]
    assert seen["visual.transformer.resblocks.1.mlp"] == seen["visual.ln_post"]
    assert seen["ln_final"] == [samples * views[1] + (int(words.sum()) if student else 0)]
    assert seen["transformer.resblocks.1.mlp"] == seen["ln_final"]
    if student:
        assert seen["text_token_mapping"] == seen["text_attn_cross_pool.ln_k"] == [int(words.sum())]
        assert seen["image_token_mapping"] == seen["visual.attn_cross_pool.ln_k"] == [samples * patches]
        assert seen["text_attn_cross_pool.attn"] == [samples * views[0]]
        assert seen["visual.attn_cross_pool.attn"] == [samples * views[1]]
    else:
        assert "text_token_mapping" not in seen


def test_position_tables_are_interpolated_once_per_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = initialised(SMALL), []
    positions = model.visual._positions

    def note(height: int, width: int) -> Tensor:
        sizes.append((height, width))
        return positions(height, width)

    monkeypatch.setattr(model.visual, "_positions", note)
    model(small_batch(3))
    assert sizes == [(24, 24), (16, 16)]


def test_what_the_host_reads_stays_there_when_a_batch_moves() -> None:
    batch = small_batch(3)
    moved = batch.to(torch.device("meta"))
    devices = {name: tensor.device.type for name, tensor in moved._asdict().items()}
    on_host = {devices.pop(name) for name in ("caption_lengths", "sample_ids", "substituted")}
    assert on_host == {"cpu"}
    assert set(devices.values()) == {"meta"}
    assert torch.equal(moved.caption_lengths, batch.caption_lengths)


def test_lengths_on_a_device_are_refused_for_reading_them_would_wait() -> None:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        pack_captions(torch.ones(3, dtype=torch.int64, device="meta"), CONTEXT, CPU)


def test_layouts_first_made_in_inference_mode_serve_training() -> None:
    pack_crops.cache_clear()
    model, batch = initialised(SMALL), small_batch(3)
    with torch.inference_mode():
        model(batch)
    sum(feature.sum() for feature in model(batch)[:4]).backward()
    assert model.visual.conv1.weight.grad is not None
