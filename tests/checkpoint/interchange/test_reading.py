"""Public checkpoints are read: each form, with the config that its tensors tell, and features as its own program's."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from cosmos_scale.checkpoint.interchange.names import hf_names, is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.openclip import assumed_activation
from cosmos_scale.checkpoint.interchange.reading import open_public, read_public
from cosmos_scale.checkpoint.interchange.sizes import Known, infer_model
from cosmos_scale.checkpoint.interchange.weights import PublicWeights
from cosmos_scale.config import ModelConfig
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel
from tests.checkpoint.interchange.made import (
    SIZES,
    openclip_model,
    ours,
    pictures_and_ids,
    save_cosmos,
    state_of,
    towers,
)

HEADS = "attention heads: 2 in the image tower, 1 in the text tower (tensors do not tell)"
GELU = "activation: gelu (tensors do not tell)"


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == torch.float32 and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(
    "model",
    [SIZES, ModelConfig(), ModelConfig.model_validate({"vision": {"patch_size": 32}})],
    ids=["tiny", "B-16", "B-32"],
)
def test_shapes_are_those_of_the_model(model: ModelConfig) -> None:
    with torch.device("meta"):
        state = CosmosModel(model).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(model)
    assert set(hf_names(model)) == {name for name in state if not is_of_heads(name)}
    if model is not SIZES:
        assert len(state) == 323
        assert sum(len(theirs.names) for theirs in hf_names(model).values()) == 398


def test_cosmos_checkpoint(tmp_path: Path) -> None:
    path = save_cosmos(tmp_path / "tiny.pt")
    student, teacher = (read_public(path, which) for which in ("student", "teacher"))
    assert student._replace(tensors={}) == PublicWeights(
        "cosmos", "COSMOS checkpoint of epoch 32", SIZES, {}, True, student.digest, (HEADS,)
    )
    assert equal(student.tensors, state_of(1))
    assert equal(teacher.tensors, state_of(2))
    assert student.digest != teacher.digest
    assert open_public(path, "student").models == ("student", "teacher")


@pytest.mark.parametrize("sizes", [{}, {"vision": {"patch_size": 32}}], ids=["B-16", "B-32"])
def test_published_sizes_need_no_guess(tmp_path: Path, sizes: dict[str, object]) -> None:
    model = ModelConfig.model_validate(sizes)
    zero = torch.zeros(())
    state = {name: zero.expand(shape) for name, shape in tensor_shapes(model).items()}  # all of one number on disk
    torch.save({"epoch": 32, "student": state, "teacher": state}, tmp_path / "cosmos.pt")
    found = open_public(tmp_path / "cosmos.pt", "teacher")
    assert (found.model, found.guessed, found.has_heads) == (model, (), True)


@pytest.mark.parametrize("form", ["bare", "safetensors", "training", "wrapped", "text", "openai", "half", "double"])
def test_openclip(tmp_path: Path, form: str) -> None:
    theirs = openclip_model(quick_gelu=form == "openai")
    state = theirs.state_dict()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    kind, guessed = "OpenCLIP state dict", GELU
    if form == "safetensors":
        save_file(state, path)
    elif form == "training":
        kind = "OpenCLIP training checkpoint of epoch 7"
        optimizer = {"param_groups": [{"lr": torch.tensor(1.0).numpy()[()].astype("float64")}]}
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 7, "name": "run", "state_dict": wrapped, "optimizer": optimizer}, path)
    else:
        if form == "wrapped":
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        if form == "text":
            state = {
                name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": tensor
                for name, tensor in state.items()
            } | {"text.attn_mask": torch.zeros(16, 16)}
        if form == "openai":
            guessed = "activation: quick_gelu (tensors do not tell)"
            sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
            state |= {name: torch.tensor(size) for name, size in sizes.items()}
            state["logit_scale"] = state["logit_scale"].reshape(1)
        if form in ("half", "double"):
            state = {name: tensor.to(getattr(torch, form)) for name, tensor in state.items()}
        torch.save(state, path)
    found = read_public(path, "student")
    model = SIZES.model_copy(update={"activation": "quick_gelu" if form == "openai" else "gelu"})
    assert (found.form, found.kind, found.model, found.has_heads) == ("openclip", kind, model, False)
    assert found.guessed == (HEADS, guessed)
    expected = {name: tensor.float() for name, tensor in openclip_model().state_dict().items()}
    if form == "half":
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    assert equal(found.tensors, {name: tensor for name, tensor in expected.items() if name != "attn_mask"})


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.pt", "ViT-B-32-quickgelu-laion400m_e32.pt"])
def test_features_are_those_of_openclip(tmp_path: Path, name: str) -> None:
    theirs = openclip_model(quick_gelu="quickgelu" in name)
    torch.save(theirs.state_dict(), tmp_path / name)
    model = ours(read_public(tmp_path / name, "student"))
    pictures, ids = pictures_and_ids()
    # Both in float32, sums in another order.
    assert_close(model.encode_image(pictures), theirs.encode_image(pictures, normalize=True), atol=2e-6, rtol=0)
    assert_close(model.encode_text(ids), theirs.encode_text(ids, normalize=True), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("vit_b_32-quickgelu-laion400m_e32.pt", "quick_gelu"),
        ("ViT-B-16-OpenAI.pt", "quick_gelu"),
        ("metaclip_400m/open_clip_pytorch_model.bin", "quick_gelu"),
        ("DFN2B-CLIP-ViT-B-16/weights.bin", "quick_gelu"),
        ("hdfn/vit_b_16-laion400m_e32.pt", "gelu"),
        ("openai/runs/epoch_32.pt", "gelu"),
    ],
)
def test_activation_by_the_name(name: str, activation: str) -> None:
    assert assumed_activation(Path(name), {}) == activation


def test_bare_state_dict_with_heads(tmp_path: Path) -> None:
    torch.save(state_of(1), tmp_path / "model.pt")
    found = read_public(tmp_path / "model.pt", "teacher")
    assert (found.form, found.kind, found.has_heads) == ("cosmos", "COSMOS state dict", True)
    assert equal(found.tensors, state_of(1))
    save_file(towers(state_of(1)), tmp_path / "model.safetensors")
    found = read_public(tmp_path / "model.safetensors", "teacher", activation="gelu")
    assert (found.form, found.guessed) == ("openclip", (HEADS,))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-M-32-alt", "ViT-g-14", "coca_ViT-B-32"])
def test_sizes_that_openclip_knows(name: str) -> None:
    """Of those that the config can say, the assumed heads are OpenCLIP's; the others are refused by what they are."""
    said = open_clip.get_model_config(name)
    assert said is not None
    sizes = {key: value for key, value in said.items() if key != "custom_text"}
    with torch.device("meta"):
        theirs = (open_clip.CoCa if "multimodal_cfg" in said else open_clip.CLIP)(**sizes)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items() if key != "attn_mask"}
    refusals = {
        "ViT-g-14": "found a model whose MLPs are 4.364 times as wide as its tower, where ours are 4",
        "coca_ViT-B-32": "found a CoCa model",
    }
    if name in refusals:
        with pytest.raises(UserError, match=refusals[name]):
            infer_model(name, shapes, Known(), "gelu")
        return
    model = infer_model(name, shapes, Known(), "gelu").model
    vision = {"head_width": 64, **said["vision_cfg"]}
    assert model.embed_dim == said["embed_dim"]
    assert {key: getattr(model.vision, key) for key in vision} == vision
    assert {key: getattr(model.text, key) for key in said["text_cfg"]} == said["text_cfg"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "student.", "net.module.", "module._orig_mod."])
def test_a_prefix_of_another_tool_is_taken_off_and_said(tmp_path: Path, prefix: str) -> None:
    def before(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in state.items()}

    said = f", with {prefix} before its names"
    path = tmp_path / "model.ckpt"
    for content, kind, expected in (
        (before(state_of(1)), f"COSMOS state dict{said}", state_of(1)),
        ({"state_dict": before(towers(state_of(1)))}, f"OpenCLIP training checkpoint{said}", towers(state_of(1))),
        ({"student": before(state_of(1)), "teacher": state_of(2)}, f"COSMOS checkpoint{said}", state_of(1)),
    ):
        torch.save(content, path)
        found = read_public(path, "student")
        assert found.kind == kind
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.items())


def test_a_prefix_before_openais_sizes_still_tells_its_activation(tmp_path: Path) -> None:
    state = {**towers(state_of(1)), "input_resolution": torch.tensor(32), "vocab_size": torch.tensor(49408)}
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.pt")
    assert read_public(tmp_path / "model.pt", "student").model.activation == "quick_gelu"
