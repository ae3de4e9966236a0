"""Exports are opened by the programs they are for, which give our features, and are read back bit for bit."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, pipeline

from cosmos_scale.checkpoint.interchange.names import is_of_heads
from cosmos_scale.checkpoint.interchange.reading import read_public
from cosmos_scale.checkpoint.interchange.weights import Activation, Which
from cosmos_scale.cli import main as cli
from cosmos_scale.config import ModelConfig
from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import END_OF_TEXT, Tokenizer
from tests.checkpoint.interchange.made import SIZES, pictures_and_ids, state_of, towers
from tests.checkpoint.interchange.runs import STEP, STUDENT, TEACHER, save_run

# Features are of length 1. Sums of 128 float32 products in another order differ by some 1e-7.
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
CAPTIONS = ["a photo of a dog", "Two  RED spheres, 12 of them; naïve café's ☃", "one word " * 20]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    save_run(folder)
    return folder


def convert(source: Path, to: str, folder: Path, *options: str) -> Path:
    assert cli.main(["convert", "--checkpoint", str(source), "--to", to, *options, str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def openclip(run: Path) -> Path:
    return convert(run, "openclip", run.parent / "openclip", "--which", "teacher")


@pytest.fixture(scope="module")
def hf(run: Path) -> Path:
    return convert(run, "hf", run.parent / "hf", "--which", "teacher")


def our_features(seed: int, images: Tensor, ids: Tensor, model: ModelConfig = SIZES) -> tuple[Tensor, Tensor]:
    ours = CosmosModel(model).eval()
    ours.load_state_dict(state_of(seed, model))
    with torch.no_grad():
        return ours.encode_image(images), ours.encode_text(ids)


def openclip_features(folder: Path, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        return model.eval().encode_image(images, normalize=True), model.encode_text(ids, normalize=True)


def hf_features(folder: Path, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    model, told = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told  # missing, unexpected and mismatched keys
    with torch.no_grad():
        found = (
            model.eval().get_image_features(pixel_values=images).pooler_output,
            model.get_text_features(input_ids=ids).pooler_output,
        )
    image, text = (torch.nn.functional.normalize(features, dim=-1) for features in found)
    return image, text


def test_openclip_opens_the_folder_and_gives_our_features(openclip: Path) -> None:
    images, ids = pictures_and_ids()
    assert_close(openclip_features(openclip, images, ids), our_features(TEACHER, images, ids), **CLOSE)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{openclip}")
    assert sorted(model.state_dict()) == sorted(towers(state_of(TEACHER)))
    tokens = open_clip.get_tokenizer(f"local-dir:{openclip}")(CAPTIONS)
    assert torch.equal(tokens, Tokenizer(SIZES.text.context_length)(CAPTIONS).long())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 4), np.uint8)
    pixels[..., 3] = 255
    assert_close(preprocess(Image.fromarray(pixels[..., :3])), evaluation_crop(pixels, 32), **CLOSE)


def test_hf_opens_the_folder_and_gives_our_features(hf: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    images, ids = pictures_and_ids()
    expected = our_features(TEACHER, images, ids)
    assert_close(hf_features(hf, images, ids), expected, **CLOSE)
    given = CLIPProcessor.from_pretrained(hf)(text=CAPTIONS, return_tensors="pt", padding="max_length", truncation=True)
    ours = Tokenizer(SIZES.text.context_length)(CAPTIONS).long()
    assert torch.equal(given["input_ids"], torch.where(ours == 0, END_OF_TEXT, ours))
    model = CLIPModel.from_pretrained(hf).eval()
    with torch.no_grad():  # padding that is masked, as the processor gives it
        texts = model.get_text_features(**given).pooler_output
    assert_close(torch.nn.functional.normalize(texts, dim=-1), our_features(TEACHER, images, ours)[1], **CLOSE)


def test_the_image_processor_differs_as_the_card_says(hf: Path) -> None:
    size = SIZES.vision.image_size
    level = 1 / 255 / 0.26  # the smallest deviation of a channel is 0.261
    processors = CLIPProcessor.from_pretrained(hf).image_processor, CLIPImageProcessorPil.from_pretrained(hf)
    for width, shifted in ((32 + 8, False), (32 + 7, True)):
        pixels = np.random.default_rng(0).integers(0, 256, (size, width, 4), np.uint8)
        pixels[..., 3] = 255
        picture, ours = Image.fromarray(pixels[..., :3]), evaluation_crop(pixels, size)
        for processor, most in zip(processors, (level, 1e-5), strict=True):
            theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
            assert bool((theirs - ours).abs().max() > most) == shifted
            assert (theirs - evaluation_crop(pixels[:, : width - shifted], size)).abs().max() <= most


def test_the_zero_shot_pipeline_opens_the_folder(hf: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))
    classes = ["dog", "red cube", "cat"]
    found = pipeline("zero-shot-image-classification", model=str(hf))(picture, candidate_labels=classes)
    pixels = CLIPProcessor.from_pretrained(hf)(images=picture, return_tensors="pt")["pixel_values"]
    ids = Tokenizer(SIZES.text.context_length)([f"This is a photo of {name}." for name in classes])
    image, texts = our_features(TEACHER, pixels, ids)
    scores = (image @ texts.T * state_of(TEACHER)["logit_scale"].exp()).softmax(-1)[0]
    by_class = {one["label"]: one["score"] for one in found}
    assert_close(torch.tensor([by_class[name] for name in classes]), scores, **CLOSE)


@pytest.mark.parametrize(
    ("to", "features"), [("openclip", openclip_features), ("hf", hf_features)], ids=["openclip", "hf"]
)
def test_quick_gelu_and_other_heads_are_told(to: str, features: Any, tmp_path: Path) -> None:
    sizes = SIZES.model_dump() | {"activation": "quick_gelu", "pooler_heads": 2}
    sizes["vision"]["head_width"], sizes["text"]["heads"] = 32, 4
    model = ModelConfig.model_validate(sizes)
    save_run(tmp_path / "run", model)
    folder = convert(tmp_path / "run", to, tmp_path / "out")
    images, ids = pictures_and_ids()
    assert_close(features(folder, images, ids), our_features(STUDENT, images, ids, model), **CLOSE)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_exports_without_heads_are_read_back_bit_for_bit(openclip: Path, hf: Path) -> None:
    for path in (openclip / "open_clip_model.safetensors", openclip, hf):
        read = read_public(path, "student")
        assert same(read.tensors, towers(state_of(TEACHER))), path
        assert read.model == SIZES
        assert not read.has_heads


def test_one_format_is_converted_to_another(hf: Path, openclip: Path, tmp_path: Path) -> None:
    through = convert(hf, "openclip", tmp_path / "openclip")
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (through / name).read_bytes() == (openclip / name).read_bytes()
    assert "Not known" in (through / "README.md").read_text()


def test_a_cosmos_file_has_both_models_in_the_published_layout(run: Path, tmp_path: Path) -> None:
    file = convert(run, "cosmos", tmp_path / "out") / "cosmos.pt"
    content = torch.load(file, weights_only=True)
    assert list(content) == ["epoch", "name", "student", "teacher"]
    assert (content["epoch"], content["name"]) == (2, "tiny")
    assert same(content["student"], {f"module.{name}": tensor for name, tensor in state_of(STUDENT).items()})
    assert same(content["teacher"], state_of(TEACHER))
    models: tuple[tuple[Which, int], ...] = (("student", STUDENT), ("teacher", TEACHER))
    for which, seed in models:
        read = read_public(file, which)
        assert (read.model, read.has_heads) == (SIZES, True)
        assert same(read.tensors, state_of(seed))
    again = convert(file, "cosmos", tmp_path / "again") / "cosmos.pt"
    assert same(torch.load(again, weights_only=True)["teacher"], state_of(TEACHER))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_bare_state_dict_takes_the_activation_that_is_named(activation: Activation, tmp_path: Path) -> None:
    save_file(towers(state_of(STUDENT)), tmp_path / "bare.safetensors")
    folder = convert(tmp_path / "bare.safetensors", "hf", tmp_path / "out", "--activation", activation)
    assert CLIPModel.from_pretrained(folder).config.vision_config.hidden_act == activation
    assert "heads" in (folder / "README.md").read_text()


def test_the_card_tells_of_model_training_and_numbers(openclip: Path, hf: Path, run: Path) -> None:
    card = (openclip / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in towers(state_of(TEACHER)).values())
    for text in (
        f"Converted from: checkpoint of step {STEP} of the run tiny.",
        "# tiny: teacher, as OpenCLIP",
        f"| parameters | {parameters:,} |",
        "| samples seen | 72 |",
        "| epochs | 2.250 (4 steps each) |",
        "| photos | 1 |",
        "| image_to_text_R@1 | 0.2500 | 0.3750 |",
        "| images | 512 | 512 |",
        f"cosmos-scale convert --checkpoint {run} --to openclip --which teacher {openclip}",
        f'open_clip.create_model_and_transforms("local-dir:{openclip}")',
        "heads and the log-scale of the distillation are left out",
        "embed_dim: 64",
    ):
        assert text in card, text
    assert "secret" not in card
    assert "0.1111" not in card
    assert "CLIPImageProcessorPil" in (hf / "README.md").read_text()


def test_the_lines_on_how_to_open_it_run(openclip: Path, hf: Path, run: Path, tmp_path: Path) -> None:
    for folder in (openclip, hf, convert(run, "cosmos", tmp_path / "out")):
        lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert len(lines.splitlines()) == 3
        names: dict[str, Any] = {}
        exec(lines, names)
    assert len(names["teacher"]) == len(state_of(TEACHER))


def test_nothing_but_the_towers_is_in_a_safetensors_file(openclip: Path) -> None:
    tensors = load_file(openclip / "open_clip_model.safetensors")
    assert not any(map(is_of_heads, tensors))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
