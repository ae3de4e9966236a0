"""Which weights a new run may start from, and what is done to them; nothing is trained here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_scale.checkpoint.initial import InitialWeights, open_initial
from cosmos_scale.checkpoint.interchange.names import is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.resize import IMAGE_TABLE, TEXT_TABLE, resize_tables
from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from tests.checkpoint.interchange.made import SIZES, save_cosmos, state_of, towers
from tests.checkpoint.interchange.test_folders import save_hf_folder, save_openclip_folder

UNTOLD = "by the config, since the file does not tell: activation gelu, vision.head_width 64, text.heads 1"


def opened(path: Path, heads: str = "from", seed: int = 7, **sizes: Any) -> InitialWeights:
    """Look at weights for a run of the model SIZES; sizes: keys of `model` that the run has changed."""
    model = SIZES.model_dump()
    for key, value in sizes.items():
        section, _, name = key.rpartition("__")
        (model[section] if section else model)[name] = value
    return open_initial(
        RunConfig.model_validate({"init_from": path, "init_heads": heads, "model": model, "seed": seed})
    )


def refused(path: Path, *parts: str, **changes: Any) -> None:
    """Opening is refused, on one line that has these parts."""
    with pytest.raises(UserError) as refusal:
        opened(path, **changes).digest()
    said = str(refusal.value)
    assert "\n" not in said
    for part in ("init_from: ", str(path), *parts):
        assert part in said, said


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def towers_file(tmp_path: Path) -> Path:
    """An OpenCLIP state dict."""
    torch.save(towers(state_of(3)), tmp_path / "towers.pt")
    return tmp_path / "towers.pt"


def test_both_models_of_a_cosmos_checkpoint(tmp_path: Path) -> None:
    found = opened(save_cosmos(tmp_path / "cosmos.pt"))
    assert equal(found.read("student"), state_of(1))
    assert equal(found.read("teacher"), state_of(2))
    assert (found.has_heads, found.tensors) == (True, len(tensor_shapes(SIZES)))
    assert len(set(found.digest().split())) == 2
    assert found.notes == [
        "by the config, since the file does not tell: vision.head_width 64, text.heads 1, pooler_heads 8"
    ]


def test_a_cosmos_checkpoint_of_one_model(tmp_path: Path) -> None:
    for number, which in ((1, "student"), (2, "teacher")):
        torch.save({"epoch": 3, which: state_of(number)}, tmp_path / f"{which}.pt")
        found = opened(tmp_path / f"{which}.pt")
        assert equal(found.read("student"), state_of(number))
        assert equal(found.read("teacher"), state_of(number))
        assert found.notes[0] == "student and teacher are the same model"
        assert len(found.digest().split()) == 1


def test_new_heads_take_the_place_of_a_checkpoints_own(tmp_path: Path) -> None:
    found = opened(save_cosmos(tmp_path / "cosmos.pt"), "new")
    assert equal(found.read("teacher"), towers(state_of(2)))
    assert "heads and distill_logit_scale drawn from seed 7" in found.notes


def test_towers_alone_need_new_heads(towers_file: Path) -> None:
    refused(towers_file, "OpenCLIP state dict", "without the cross-modality heads", "init_heads=new")
    found = opened(towers_file, "new")
    assert not found.has_heads
    for which in ("student", "teacher"):
        assert equal(found.read(which), towers(state_of(3)))
    drawn = "heads and distill_logit_scale drawn from seed 7"
    assert found.notes == ["student and teacher are the same model", drawn, UNTOLD]
    assert found.describe() == f"{towers_file}: {found.kind} ({found.digest()}); " + "; ".join(found.notes)


def test_position_tables_of_another_length_are_resized(towers_file: Path) -> None:
    found = opened(towers_file, "new", vision__image_size=48, text__context_length=12)
    before, after = towers(state_of(3)), found.read("student")
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    expected = resize_tables(before, shapes | {IMAGE_TABLE: (10, 128), TEXT_TABLE: (12, 64)})
    assert equal(after, expected)
    assert found.notes[1:3] == [
        "image positions resized from 2 x 2 to 3 x 3 patches",
        "text positions resized from 16 to 12",
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vision__patch_size": 8, "vision__image_size": 16}, "size mismatch of visual.conv1.weight: [128, 3, 16, 16]"),
        ({"vision__width": 64}, "size mismatch of visual.class_embedding: [128] there, [64] in the model"),
        ({"text__layers": 3}, "size mismatch of transformer.resblocks.2.ln_1.weight: none there, [64] in the model"),
        ({"vision__layers": 1}, "size mismatch of visual.transformer.resblocks.1."),
        ({"text__vocab_size": 50000}, "size mismatch of token_embedding.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_sizes_are_refused(towers_file: Path, changes: dict[str, int], part: str) -> None:
    refused(towers_file, "does not fit the model", part, heads="new", **changes)


def test_an_activation_that_the_file_needs_must_be_the_configs(tmp_path: Path) -> None:
    path = tmp_path / "ViT-tiny-quickgelu.pt"
    torch.save(towers(state_of(3)), path)
    refused(path, "model.activation quick_gelu", "the config says gelu", "model.activation=quick_gelu", heads="new")
    assert "activation quick_gelu" in opened(path, "new", activation="quick_gelu").notes[-1]
    cosmos = save_cosmos(tmp_path / "cosmos.pt")
    refused(cosmos, "needs model.activation gelu, but the config says quick_gelu", activation="quick_gelu")


def test_an_activation_that_nothing_tells_is_the_configs(towers_file: Path) -> None:
    note = opened(towers_file, "new", activation="quick_gelu").notes[-1]
    assert "activation quick_gelu (most models of these sizes have gelu)" in note


def test_numbers_of_attention_heads_that_nothing_tells_are_the_configs(towers_file: Path) -> None:
    note = opened(towers_file, "new", vision__head_width=32).notes[-1]
    assert "vision.head_width 32 (most models of these sizes have 64), text.heads 1" in note


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = towers(state_of(3))
    state["ln_final.weight"][5] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    refused(tmp_path / "nan.pt", "1 of 64 numbers of ln_final.weight are not finite", heads="new")


def test_what_a_folders_config_says_must_be_the_runs(tmp_path: Path) -> None:
    save_openclip_folder(tmp_path)
    same: dict[str, Any] = {"heads": "new", "activation": "quick_gelu", "vision__head_width": 32}
    found = opened(tmp_path, **same)
    drawn = "heads and distill_logit_scale drawn from seed 7"
    assert (found.kind, found.notes) == (
        "OpenCLIP folder with open_clip_config.json",
        ["student and teacher are the same model", drawn],
    )
    refused(tmp_path, "needs model.activation quick_gelu, but the config says gelu", **same | {"activation": "gelu"})
    refused(tmp_path, "needs model.vision.head_width 32, but the config says 64", **same | {"vision__head_width": 64})
    refused(tmp_path, "needs model.text.heads 1, but the config says 2", **same | {"text__heads": 2})


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    save_hf_folder(tmp_path, "gelu")
    tower = {"width": 32, "layers": 2, "heads": 2}
    sizes = {f"text__{key}": size for key, size in tower.items()} | {"vision__width": 64, "vision__head_width": 16}
    found = opened(tmp_path, "new", embed_dim=32, **sizes, vision__image_size=64)
    assert found.kind == "Hugging Face CLIPModel folder"
    assert "image positions resized from 2 x 2 to 4 x 4 patches" in found.notes
    assert found.read("teacher").keys() == towers(state_of(0)).keys()
    assert found.read("teacher")[IMAGE_TABLE].shape == (17, 64)


def test_every_head_is_drawn_and_no_tower() -> None:
    assert {name for name in tensor_shapes(SIZES) if is_of_heads(name)} == state_of(0).keys() - towers(state_of(0))
