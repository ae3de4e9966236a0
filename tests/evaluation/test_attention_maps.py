"""Attention maps: the weights against the fused attention and a formula in float64, the words, and the pictures."""

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.attention_maps import (
    AttentionMaps,
    attention_maps,
    encode_pairs,
    heat_of,
    levels_of,
    peak_of,
    require_heads,
    strongest,
    unit,
    word_weights,
)
from cosmos_scale.evaluation.attention_pictures import SampleMaps, write_page, write_picture
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.cross_modal import AttentionPooler
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import picture
from tests.evaluation.labelled import tiny_run
from tests.report.browser import SCROLLS, browser_page

CAPTIONS = ("A zebra-striped dog's café runs", "two", "a 😀 by the sea, and much more text than there is room for here")


def drawn_model(heads: int = 4, padding: str = "attend") -> CosmosModel:
    """A model of drawn weights whose poolers have several heads and biases that are not 0."""
    config = tiny_run().model.model_copy(update={"pooler_heads": heads, "text_padding": padding})
    model = CosmosModel(config)
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        for pooler in (model.visual.attn_cross_pool, model.text_attn_cross_pool):
            for parameter in pooler.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def pictures(count: int) -> Tensor:
    return torch.stack([evaluation_image(picture(number, size=(40, 24)), 16, 10**6) for number in range(count)])


def pooled_by_weights(pooler: AttentionPooler, query: Tensor, tokens: Tensor, weights_HL: Tensor) -> Tensor:
    """What the head gives, from its weights: weights @ v through out_proj."""
    attention = pooler.attn
    third = len(attention.in_proj_weight) // 3
    v_LD = pooler.ln_k(tokens) @ attention.in_proj_weight[2 * third :].T + attention.in_proj_bias[2 * third :]
    mixed_HD = torch.einsum("hl,lhd->hd", weights_HL, v_LD.unflatten(1, (attention.heads, -1)))
    pooled_1E: Tensor = attention.out_proj(mixed_HD.flatten()[None])
    return pooled_1E.squeeze(0)


@pytest.mark.parametrize("padding", ["attend", "mask"])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_the_weights_give_what_the_fused_attention_gives(heads: int, padding: str) -> None:
    """To 1e-6: both are in float32, and add the same products in another order. Values are of size 1."""
    model = drawn_model(heads, padding)
    ids = Tokenizer(16)(CAPTIONS)
    pairs = encode_pairs(model, pictures(3), ids)
    with torch.no_grad():
        for pair in pairs:
            maps = attention_maps(model, pair, 2)
            for pooler, query, tokens, weights_HL in (
                (model.visual.attn_cross_pool, pair.text, pair.patches, maps.image_weights.flatten(1)),
                (model.text_attn_cross_pool, pair.image, pair.words, maps.text_weights),
            ):
                assert weights_HL.shape == (heads, len(tokens))
                assert torch.allclose(weights_HL.sum(1), torch.ones(heads), atol=1e-6)
                fused = pooler(query[None, None], tokens, [len(tokens)])[0, 0]
                assert (pooled_by_weights(pooler, query, tokens, weights_HL) - fused).abs().max() < 1e-6
    assert [len(pair.words) for pair in pairs] == ([16] * 3 if padding == "attend" else [pair.length for pair in pairs])


def test_the_weights_are_softmax_of_the_scaled_products_in_float64() -> None:
    model = drawn_model()
    (pair,) = encode_pairs(model, pictures(1), Tokenizer(16)(CAPTIONS[:1]))
    weights = attention_maps(model, pair, 2).text_weights
    pooler = model.text_attn_cross_pool

    def projected(x: Tensor, norm: torch.nn.LayerNorm, part: int) -> Tensor:
        x = x.double()
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        x = x * norm.weight.double() + norm.bias.double()
        rows = slice(64 * part, 64 * (part + 1))
        y: Tensor = x @ pooler.attn.in_proj_weight[rows].double().T + pooler.attn.in_proj_bias[rows]
        heads: Tensor = y.unflatten(-1, (4, 16))
        return heads

    with torch.no_grad():
        q_HD, k_LHD = projected(pair.image, pooler.ln_q, 0), projected(pair.words, pooler.ln_k, 1)
        expected = (torch.einsum("hd,lhd->hl", q_HD, k_LHD) / math.sqrt(16)).softmax(-1)
    assert (weights - expected).abs().max() < 1e-6


def test_maps_are_spread_over_0_to_1_and_only_words_count() -> None:
    assert torch.equal(unit(torch.tensor([3.0, 1.0, 2.0])), torch.tensor([1.0, 0.0, 0.5]))
    assert torch.equal(unit(torch.full((4,), 0.25)), torch.zeros(4))
    text = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])  # start, two words, EOT, padding
    image = torch.tensor([[[0.1, 0.2], [0.7, 0.0]]])
    maps = AttentionMaps(image, text, 4)
    assert maps.share_on_words == pytest.approx(0.35)
    assert torch.allclose(maps.text_map, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    assert peak_of(maps.image_map) == (0.75, 0.25)
    without_words = AttentionMaps(image, text, 2)
    assert without_words.share_on_words == 0.0
    assert not without_words.text_map.any()


def test_heat_lies_over_the_crop_that_the_model_saw() -> None:
    heat = heat_of(torch.tensor([[0.0, 1.0]]), 4, 8)
    assert heat.shape == (4, 8)
    assert torch.equal(heat[0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))  # pixels' middles, by hand
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(levels).save(png, format="PNG")
    assert np.array_equal(levels_of(evaluation_image(png.getvalue(), 16, 10**6)).numpy(), levels)


@pytest.mark.parametrize("caption", [*CAPTIONS, "", "<end_of_text> x", "\u00e9\u00e9 &amp;", "ünïcödé 漢字"])
def test_each_token_has_its_weight_and_words_are_read_as_the_model_reads_them(caption: str) -> None:
    model, tokenizer = drawn_model(), Tokenizer(16)
    ids = tokenizer([caption])
    (pair,) = encode_pairs(model, pictures(1), ids)
    maps = attention_maps(model, pair, 2)
    words = word_weights(caption, maps, tokenizer)
    weights = [weight for word in words for weight in word.weights]
    assert weights == pytest.approx(maps.text_weights.mean(0)[1 : pair.length - 1].tolist())
    assert sum(weights) == pytest.approx(maps.share_on_words)
    assert all(word.value == max(word.values) and len(word.tokens) == len(word.weights) for word in words)


def test_words_in_parts_are_put_together() -> None:
    tokenizer = Tokenizer(77)
    assert [word.parts for word in tokenizer.pieces("A CYAN dog's")] == [("a",), ("cy", "an"), ("dog",), ("'s",)]
    assert [word.word for word in tokenizer.pieces("A CYAN café 犬小屋")] == ["a", "cyan", "café", "犬小屋"]
    assert "".join(part for word in tokenizer.pieces("café zebra") for part in word.parts) == "cafézebra"
    short = Tokenizer(5).pieces("one two three four five")  # room for 3 between start and EOT
    assert sum(len(word.parts) for word in short) == 3


def test_a_model_without_heads_is_refused() -> None:
    model = drawn_model()
    require_heads(model, "here")
    with torch.no_grad():
        model.text_attn_cross_pool.attn.in_proj_weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"^here: has no cross-modality heads; rule: .* COSMOS"):
        require_heads(model, "here")


def sample_maps(caption: str = CAPTIONS[0], number: int = 0) -> SampleMaps:
    model, tokenizer = drawn_model(), Tokenizer(16)
    image = pictures(number + 1)[number]
    (pair,) = encode_pairs(model, image[None], tokenizer([caption]))
    maps = attention_maps(model, pair, 2)
    title = f"<{number}>&.jpg"
    return SampleMaps(title, caption, levels_of(image).numpy(), maps, word_weights(caption, maps, tokenizer))


@pytest.mark.parametrize("caption", [CAPTIONS[0], "", "$x^2$ \\frac{1} 漢字 " * 40])
def test_a_picture_is_written_for_any_caption(caption: str, tmp_path: Path) -> None:
    write_picture(sample_maps(caption), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (760, 490))
        assert len(drawn.convert("RGB").getcolors(10**6) or []) > 200


@pytest.mark.parametrize(
    ("name", "form"),
    [("a", "PNG"), ("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.tif", "TIFF")],
)
def test_a_picture_has_the_form_of_its_name(name: str, form: str, tmp_path: Path) -> None:
    write_picture(sample_maps(), tmp_path / name)
    with Image.open(tmp_path / name) as drawn:
        assert (drawn.format, drawn.size) == (form, (760, 490))


def test_drawings_are_written_and_other_forms_refused(tmp_path: Path) -> None:
    for name, begin in (("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        write_picture(sample_maps(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    rule = (
        r"a\.gif: \.gif is no form that can be drawn; rule: \.png, \.jpg, \.jpeg, \.webp, \.tif, \.tiff, \.pdf, \.svg$"
    )
    with pytest.raises(UserError, match=rule):
        write_picture(sample_maps(), tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.svg"]


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    write_page(
        [sample_maps(caption, number) for number, caption in enumerate(CAPTIONS)], tmp_path / "a.html", "T", "<b>"
    )
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 * 3  # the crop, the crop again, and the heat over it
    for source in sources:
        assert source.startswith("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (224, 224)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert '<meta name="viewport"' in page
    assert "&lt;0&gt;&amp;.jpg" in page
    assert "<b>" not in page
    assert all(f">{word}<" in page for word in ("two", "runs"))
    assert strongest(sample_maps().words) in page


def test_a_browser_shows_the_page_without_a_bar_below(tmp_path: Path) -> None:
    write_page([sample_maps("long" * 40)], tmp_path / "a.html", "T", "/a" * 200)
    with browser_page(tmp_path / "profile") as page:
        for width in (390, 500, 1200):
            page.open(tmp_path / "a.html", width, 900)
            assert page.value(SCROLLS) <= 0, width
            assert page.value("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
            assert page.errors == []
