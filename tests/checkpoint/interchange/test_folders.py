"""Folders of OpenCLIP and of Hugging Face are read by their configs, and features are those of their own libraries."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel

from cosmos_scale.checkpoint.interchange.reading import is_public, open_public, read_public
from cosmos_scale.errors import UserError
from tests.checkpoint.interchange.made import OPENCLIP_SIZES, openclip_model, ours, pictures_and_ids

# 4 and 2 heads, which no rule would guess.
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_openclip_folder(folder: Path, **changes: Any) -> open_clip.CLIP:
    """Write a folder as OpenCLIP publishes its models, and return the model; changes: of its config."""
    vision = OPENCLIP_SIZES["vision_cfg"] | {"head_width": 32}
    config = OPENCLIP_SIZES | {"vision_cfg": vision, "quick_gelu": True}
    theirs = openclip_model(**{key: value for key, value in config.items() if key != "text_cfg"})
    folder.mkdir(exist_ok=True)
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config | changes, "preprocess_cfg": {}}))
    return theirs


def save_hf_folder(folder: Path, act: str, **options: Any) -> None:
    """Write a folder of Hugging Face's tiny CLIPModel; options: of `save_pretrained`."""
    torch.manual_seed(5)
    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": act, "max_position_embeddings": 16, "eos_token_id": 49407},
        vision_config={**VISION, "hidden_act": act, "image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder, **options)


@torch.no_grad()
def test_openclip_folder(tmp_path: Path) -> None:
    theirs = save_openclip_folder(tmp_path)
    assert is_public(tmp_path)
    found = read_public(tmp_path, "student")
    assert (found.form, found.kind, found.guessed) == ("openclip", "OpenCLIP folder with open_clip_config.json", ())
    assert (found.model.activation, found.model.vision.head_width, found.model.text.heads) == ("quick_gelu", 32, 1)
    by_name = read_public(tmp_path / "open_clip_model.safetensors", "student")  # the config beside it counts
    assert (by_name.model, by_name.digest) == (found.model, found.digest)
    model, (pictures, ids) = ours(found), pictures_and_ids()
    # Both in float32, sums in another order.
    assert_close(model.encode_image(pictures), theirs.encode_image(pictures, normalize=True), atol=2e-6, rtol=0)
    assert_close(model.encode_text(ids), theirs.encode_text(ids, normalize=True), atol=2e-6, rtol=0)
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")  # as its own library opens the folder
    assert_close(opened.eval().encode_text(ids, normalize=True), theirs.encode_text(ids, normalize=True))


def test_of_two_files_of_weights_the_named_one_counts_and_else_the_one_that_is_told(tmp_path: Path) -> None:
    save_hf_folder(tmp_path / "hf", "gelu")
    save_openclip_folder(tmp_path / "openclip")
    for first, second in (
        (tmp_path / "hf" / "model.safetensors", "pytorch_model.bin"),
        (tmp_path / "openclip" / "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ):
        whole = read_public(first, "student")
        assert whole.guessed == ()
        with pytest.raises(UserError, match=rf"{second}: cannot be read: No such file"):
            read_public(first.with_name(second), "student")
        torch.save({name: tensor + 1 for name, tensor in load_file(first).items()}, first.with_name(second))
        found = read_public(first.parent, "student")
        assert found.digest == whole.digest == read_public(first, "student").digest
        assert found.guessed == (f"weights: those of {first.name} (not read: {second} beside it)",)
        named = read_public(first.with_name(second), "student")
        assert named.digest != whole.digest
        assert (named.kind, named.guessed) == (whole.kind, ())


def test_a_folder_with_one_tower_is_told_which_tensor_lacks(tmp_path: Path) -> None:
    save_hf_folder(tmp_path, "gelu")
    path = tmp_path / "model.safetensors"
    vision = {name: tensor.clone() for name, tensor in load_file(path).items() if name.startswith("vision_model.")}
    save_file(vision, path)
    refused(tmp_path, "found a CLIPModel without text_model.")


def test_a_lora_beside_a_whole_model_is_said_to_be_left_out(tmp_path: Path) -> None:
    save_hf_folder(tmp_path, "gelu")
    (tmp_path / "adapter_config.json").write_text("{}")
    said = "no LoRA: that of adapter_config.json beside the weights is not applied"
    assert read_public(tmp_path, "student").guessed == (said,)


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_hf_folder(tmp_path: Path, act: str) -> None:
    save_hf_folder(tmp_path, act)
    theirs = CLIPModel.from_pretrained(tmp_path)
    assert is_public(tmp_path)
    found = read_public(tmp_path, "teacher")
    assert (found.form, found.kind, found.guessed) == ("hf", "Hugging Face CLIPModel folder", ())
    assert (found.has_heads, found.model.activation) == (False, act)
    assert (found.model.vision.head_width, found.model.text.heads) == (16, 2)
    model, (pictures, ids) = ours(found), pictures_and_ids()
    image = theirs.get_image_features(pictures).pooler_output
    text = theirs.get_text_features(ids).pooler_output
    assert_close(model.encode_image(pictures), image / image.norm(dim=1, keepdim=True), atol=2e-6, rtol=0)
    assert_close(model.encode_text(ids), text / text.norm(dim=1, keepdim=True), atol=2e-6, rtol=0)


def test_hf_folder_in_parts_and_in_half(tmp_path: Path) -> None:
    save_hf_folder(tmp_path / "whole", "gelu")
    save_hf_folder(tmp_path / "parts", "gelu", max_shard_size="2MB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    whole = read_public(tmp_path / "whole", "student")
    assert read_public(tmp_path / "parts", "student").digest == whole.digest
    # Older models have the same files as pickles.
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.with_name("pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()
    for part in (tmp_path / "parts").glob("model-*.safetensors"):
        torch.save(load_file(part), part.with_suffix(".bin"))
        part.unlink()
    assert read_public(tmp_path / "parts", "student").digest == whole.digest
    path = tmp_path / "whole" / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    path.unlink()  # it is mapped by `whole` no more
    torch.save(
        half | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, path.with_name("pytorch_model.bin")
    )
    found = read_public(tmp_path / "whole", "student")
    assert all(torch.equal(tensor, whole.tensors[name].half().float()) for name, tensor in found.tensors.items())


def test_a_prefix_of_another_tool_in_folders(tmp_path: Path) -> None:
    save_openclip_folder(tmp_path / "openclip")
    save_hf_folder(tmp_path / "hf", "gelu")
    for file in (tmp_path / "openclip" / "open_clip_model.safetensors", tmp_path / "hf" / "model.safetensors"):
        plain = read_public(file.parent, "student")
        save_file({f"model._orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
        found = read_public(file.parent, "student")
        assert (found.digest, found.model) == (plain.digest, plain.model)
        assert found.kind == f"{plain.kind}, with model._orig_mod. before its names"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "siglip"}, "found Hugging Face's model_type 'siglip', not 'clip'"),
        ({"vision_config": {**VISION, "num_attention_heads": 5}}, "num_attention_heads 5, which does not divide 64"),
        ({"vision_config": {**VISION, "hidden_act": "gelu"}}, "hidden_act gelu of the image tower and quick_gelu of"),
        ({"vision_config": {"hidden_act": "gelu_new"}}, "vision_config.hidden_act 'gelu_new', neither gelu nor"),
        ({"text_config": {**TEXT, "num_hidden_layers": 3}}, "text_config.num_hidden_layers 3, but tensors of 2"),
        ({"text_config": {**TEXT, "layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps 1e-06, where our towers have"),
        ({"text_config": {**TEXT, "eos_token_id": 1}}, "text_config.eos_token_id 1, neither 49407 nor 2"),
        ({"projection_dim": 512}, "projection_dim 512, but tensors of 32"),
    ],
)
def test_hf_configs_that_do_not_fit(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    save_hf_folder(tmp_path, "quick_gelu")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vision_cfg": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre True, which our towers do not do"),
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "vision_cfg.timm_model_name vit_base, which our towers"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}, "vision_cfg.layers [3, 4, 6, 3], but tensors of 2"),
        ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type last, where our towers do argmax"),
        ({"text_cfg": {"heads": "8"}}, "text_cfg.heads '8', not a whole number above 0"),
        ({"init_logit_bias": -10}, "model_cfg.init_logit_bias -10, which our towers do not do"),
        ({"embed_dim": 128}, "model_cfg.embed_dim 128, but tensors of 64"),
    ],
)
def test_openclip_configs_that_do_not_fit(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    save_openclip_folder(tmp_path, **config)
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        ({}, None),
        ({"size": 32, "crop_size": 32, "do_center_crop": True, "resample": 3}, None),  # of old versions of transformers
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": None}, None),
        ({"do_center_crop": False, "size": {"height": 32, "width": 32}}, "do_center_crop False, size {'height': 32, "),
        ({"do_normalize": False, "image_mean": None}, "do_normalize False"),
        ({"resample": 2}, "resample 2"),
        ({"size": {"shortest_edge": 36}}, "size {'shortest_edge': 36}"),
    ],
)
def test_pictures_that_hf_prepares_otherwise_are_told(tmp_path: Path, pixels: dict[str, Any], said: str | None) -> None:
    save_hf_folder(tmp_path, "gelu")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    told_of_pictures(tmp_path, "preprocessor_config.json", said)


def test_pictures_are_prepared_as_the_processor_of_transformers_5_says(tmp_path: Path) -> None:
    save_hf_folder(tmp_path, "gelu")
    processor, older = tmp_path / "processor_config.json", tmp_path / "preprocessor_config.json"
    processor.write_text(json.dumps({"image_processor": {"resample": 2}, "processor_class": "CLIPProcessor"}))
    older.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))  # transformers does not read it then
    told_of_pictures(tmp_path, "processor_config.json", "resample 2")
    processor.write_text(json.dumps({"image_processor": {"image_mean": [0.5, 0.5, 0.5]}}))
    refused(tmp_path, "processor_config.json: found pixels normalised by mean [0.5, 0.5, 0.5], not by CLIP's")
    processor.write_text(json.dumps({"image_processor": "CLIPImageProcessor"}))
    refused(tmp_path, "processor_config.json: found image_processor 'CLIPImageProcessor', not an object")
    processor.write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # of transformers 4
    refused(tmp_path, "preprocessor_config.json: found pixels normalised by mean [0.5, 0.5, 0.5], not by CLIP's")


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        ({"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "size": 32, "fill_color": 0}, None),
        (
            {"interpolation": "bicubic", "resize_mode": "squash"},
            "resize_mode 'squash'",
        ),  # as published with DFN's weights
        ({"interpolation": "bilinear"}, "interpolation 'bilinear'"),
    ],
)
def test_pictures_that_openclip_prepares_otherwise_are_told(
    tmp_path: Path, pixels: dict[str, Any], said: str | None
) -> None:
    save_openclip_folder(tmp_path)
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": pixels}))
    told_of_pictures(tmp_path, path.name, said)


def told_of_pictures(folder: Path, name: str, said: str | None) -> None:
    guessed = read_public(folder, "student").guessed
    if said is None:
        assert guessed == ()
        return
    (line,) = guessed
    assert line.startswith("pictures: normalised, resized by their shorter side, bicubic, and cut to their middle")
    assert f"(though {name} says {said}" in line


def test_folders_that_are_none(tmp_path: Path) -> None:
    save_openclip_folder(tmp_path)
    path = tmp_path / "open_clip_config.json"
    pixels = {"model_cfg": json.loads(path.read_text())["model_cfg"], "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    path.write_text(json.dumps(pixels))
    refused(tmp_path, "found pixels normalised by mean [0.5, 0.5, 0.5], not by CLIP's")
    path.write_text("[1]")
    refused(tmp_path, "open_clip_config.json: found a JSON list, not an object")
    path.write_text("{")
    refused(tmp_path, "open_clip_config.json: found no JSON")
    (tmp_path / "open_clip_model.safetensors").unlink()
    path.write_text("{}")
    refused(tmp_path, "found open_clip_config.json, but neither open_clip_model.safetensors nor")
    path.unlink()
    assert not is_public(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_public(tmp_path)
    refused(tmp_path, "found a LoRA (adapter_config.json)")


def test_another_activation_than_the_config_says_is_refused(tmp_path: Path) -> None:
    save_hf_folder(tmp_path, "gelu")
    with pytest.raises(UserError, match="found activation gelu, but quick_gelu was asked for"):
        open_public(tmp_path, "student", activation="quick_gelu")
    assert open_public(tmp_path, "student", activation="gelu").model.activation == "gelu"


def refused(path: Path, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        read_public(path, "student")
    text = str(refusal.value)
    assert said in text
    assert (text.count("\n"), text.count("; accepted: a step-* folder")) == (0, 1)
