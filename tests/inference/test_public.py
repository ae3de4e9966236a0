"""Public checkpoints load as ours do, and say what they are and what was assumed of them."""

import warnings
from pathlib import Path

import pytest
import torch

import cosmos_scale
from cosmos_scale.inference import LoadedModel
from cosmos_scale.testing.shard_files import picture
from tests.checkpoint.interchange.made import save_cosmos, state_of, towers

TEXTS = ["a cat", "a dog by the sea"]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.jpg" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number))
    return paths


def same(first: LoadedModel, second: LoadedModel, images: list[Path]) -> bool:
    return torch.equal(first.encode_image(images), second.encode_image(images)) and torch.equal(
        first.encode_text(TEXTS), second.encode_text(TEXTS)
    )


def test_a_cosmos_file_has_a_student_and_a_teacher_with_heads(tmp_path: Path, images: list[Path]) -> None:
    path = save_cosmos(tmp_path / "cosmos.pt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        teacher, student = cosmos_scale.load(path, device="cpu"), cosmos_scale.load(path, "student", device="cpu")
    assert (teacher.which, student.which) == ("teacher", "student")
    assert teacher.has_heads
    assert not same(teacher, student, images)
    assert repr(teacher).startswith(
        f"teacher of {path}\n  on cpu; pictures of 32 pixels in patches of 16, features of 64"
    )
    assert all(note in repr(teacher) for note in teacher.notes)
    assert len(warned) == (2 if teacher.notes[1:] else 0)
    weights = teacher.attention_maps(images[0], "a cat").maps.image_weights
    assert weights.shape == (teacher.encoder.model.visual.attn_cross_pool.attn.heads, 2, 2)


def test_an_openclip_file_has_one_model_without_heads(tmp_path: Path, images: list[Path]) -> None:
    path = tmp_path / "openclip.pt"
    torch.save(towers(state_of(1)), path)
    with pytest.warns(UserWarning, match=r"openclip\.pt: .*assumed"):
        model = cosmos_scale.load(path, device="cpu")
    with pytest.warns(UserWarning, match="assumed"):
        assert same(model, cosmos_scale.load(str(path), "student", "cpu"), images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick = cosmos_scale.load(path, device="cpu", activation="quick_gelu")
    assert not same(model, quick, images)
    assert (model.which, model.has_heads) == ("model", False)
    assert model.classify(images, ["cat", "dog"]).probabilities.isfinite().all()
    assert model.segment(images[0], ["cat", "dog"]).labels.shape == (20, 24)
    with pytest.raises(cosmos_scale.UserError, match=r"openclip\.pt: has no cross-modality heads"):
        model.attention_maps(images[0], "a cat")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for name in ("broken.pt", "missing.pt"):
        with pytest.raises(cosmos_scale.UserError, match=name) as refusal:
            cosmos_scale.load(tmp_path / name, device="cpu")
        assert "\n" not in str(refusal.value)
    with pytest.raises(cosmos_scale.UserError, match=r"^activation: 'relu'; rule: gelu or quick_gelu or None$"):
        cosmos_scale.load(tmp_path, activation="relu")  # type: ignore[arg-type]
