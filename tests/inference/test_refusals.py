"""What a loaded model does not take is refused in one line that names the argument, what was given and the rule."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import cosmos_scale
from cosmos_scale import LoadedModel, UserError
from cosmos_scale.testing.shard_files import picture
from tests.evaluation.labelled import tiny_run
from tests.inference.conftest import Saved, write_checkpoint

LEVELS = torch.zeros(3, 20, 20, dtype=torch.uint8)


def refused(call: Callable[..., object], *given: Any, **named: Any) -> str:
    """What a call is refused with."""
    with pytest.raises(UserError) as refusal:
        call(*given, **named)
    said = str(refusal.value)
    assert "\n" not in said
    return said


def broken_file(folder: Path) -> Path:
    path = folder / "broken.jpg"
    path.write_bytes(picture(0)[:-100])
    return path


PICTURES: list[tuple[Any, str]] = [
    ([], "images: an empty list; rule: one picture or more"),
    (LEVELS[None][:0], "images: an empty list"),
    ("a.jpg", "images: the path 'a.jpg' alone; rule: a list of pictures"),
    (Path("a.jpg"), "images: the path 'a.jpg' alone"),
    (Image.new("RGB", (4, 5)), "images: a PIL picture of 4 x 5 pixels alone"),
    (LEVELS, "images: a uint8 tensor [3, 20, 20] alone; rule: a list of pictures, or a tensor [N, 3, H, W]"),
    ({"a.jpg": 1}, "images: a dict; rule: a list of pictures"),
    (3, "images: an int; rule: a list of pictures"),
    (
        [LEVELS, LEVELS.float()],
        "images: number 1: a float32 tensor [3, 20, 20]; rule: a path, a PIL picture, or a uint8",
    ),
    ([LEVELS[:1]], "images: number 0: a uint8 tensor [1, 20, 20]; rule:"),
    ([LEVELS[None]], "images: number 0: a uint8 tensor [1, 3, 20, 20]; rule:"),
    ([LEVELS[:, :0]], "images: number 0: a uint8 tensor [3, 0, 20] has no pixel"),
    (torch.zeros(2, 3, 20, 20), "images: number 0: a float32 tensor [3, 20, 20]; rule:"),
    ([np.zeros((4, 4, 3), np.uint8)], "images: number 0: a ndarray (Image.fromarray makes it a PIL picture); rule:"),
    ([b"bytes"], "images: number 0: a bytes; rule:"),
    ([None], "images: number 0: a NoneType; rule:"),
    ([Image.new("F", (20, 20))], "images: number 0: a PIL picture of mode F, whose range is not known"),
    ([Image.new("RGB", (0, 4))], "images: number 0: a PIL picture of 0 x 4 pixels has no pixel"),
    (["missing.jpg"], "images: number 0: missing.jpg: the picture cannot be read: No such file"),
    (["nul\0.jpg"], "images: number 0: nul\0.jpg: "),
]


PREPARED = torch.zeros(2, 3, 32, 32)  # of patches of 16 pixels


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (PREPARED[0], "images: a float32 tensor [3, 32, 32]; rule: a float32 tensor [N, 3, H, W], H and W multiples"),
        (PREPARED.permute(0, 2, 3, 1), "images: a float32 tensor [2, 32, 32, 3]; rule:"),
        (PREPARED[:, :1], "images: a float32 tensor [2, 1, 32, 32]; rule:"),
        (PREPARED[..., :30], "images: a float32 tensor [2, 3, 32, 30]; rule:"),  # 14 columns would be left out
        (PREPARED[..., :0], "images: a float32 tensor [2, 3, 32, 0]; rule:"),
        (PREPARED.long(), "images: an int64 tensor [2, 3, 32, 32]; rule:"),
        (PREPARED.numpy(), "images: a ndarray; rule: a float32 tensor [N, 3, H, W]"),
        (list(PREPARED), "images: a list; rule: a float32 tensor [N, 3, H, W]"),
    ],
)
def test_prepared_pictures_that_the_tower_would_not_see_whole(model: LoadedModel, images: Any, said: str) -> None:
    assert refused(model.encoder.images, images).startswith(said)


def test_one_text_alone_is_no_list_for_the_encoder_either(model: LoadedModel) -> None:
    assert refused(model.encoder.texts, "a cat") == "texts: 'a cat' alone; rule: a list of texts"


def test_prepared_pictures_of_other_sides_get_features_and_gradients(model: LoadedModel) -> None:
    assert model.encoder.images(PREPARED[:0]).shape == (0, model.embed_dim)
    wide = torch.zeros(1, 3, 32, 48, requires_grad=True)
    model.encoder.images(wide).sum().backward()
    assert wide.grad is not None
    assert wide.grad[..., 32:].abs().sum() > 0


@pytest.mark.parametrize(("images", "said"), PICTURES)
def test_what_is_no_list_of_pictures(images: Any, said: str, model: LoadedModel) -> None:
    assert refused(model.encode_image, images).startswith(said)
    assert refused(model.classify, images, ["cat"]).startswith(said)


@pytest.mark.parametrize("one", [LEVELS.float(), None, b"bytes", "missing.jpg", "nul\0.jpg", Image.new("F", (20, 20))])
def test_what_is_no_picture(one: Any, model: LoadedModel) -> None:
    assert refused(model.segment, one, ["cat"]).startswith("image: ")
    assert refused(model.attention_maps, one, "a cat").startswith("image: ")


def test_an_iterator_that_changes_one_picture(model: LoadedModel, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    buffer = LEVELS.clone()
    with Image.open(tmp_path / "frames.gif") as gif:
        for images in (ImageSequence.Iterator(gif), (buffer.fill_(level) for level in (0, 100))):
            said = refused(model.encode_image, images)
            assert said.startswith("images: pictures 0 and 1 are one object, which changes; rule: a list, or copies")
        copies = model.encode_image(frame.copy() for frame in ImageSequence.Iterator(gif))
        kept = model.encode_image([gif.convert("RGB")] * 2)
    assert len({tuple(row.tolist()) for row in copies}) == 3
    assert torch.equal(kept[0], kept[1])


def test_a_table_is_no_list(model: LoadedModel) -> None:
    """An iterable of its columns' names, as pandas' DataFrame is."""

    class Table:
        columns = ("caption",)

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    assert refused(model.encode_text, Table()) == "texts: a Table; rule: a list of texts"


def test_a_picture_whose_file_is_closed(model: LoadedModel, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    said = "images: number 0: the picture does not decode: its file is closed, or it cannot be read"
    assert refused(model.encode_image, [picture]) == said


def test_files_and_pictures_that_do_not_decode(model: LoadedModel, tmp_path: Path) -> None:
    path = broken_file(tmp_path)
    said = f": {path}: the picture does not decode"
    assert refused(model.encode_image, [LEVELS, path]).startswith(f"images: number 1{said}")
    assert refused(model.segment, path, ["cat"]).startswith(f"image{said}")
    assert refused(model.encode_image, [Image.open(path)]).startswith("images: number 0: the picture does not")
    (tmp_path / "text.txt").write_text("no picture")
    assert "text.txt: the picture is not a JPEG" in refused(model.encode_image, [tmp_path / "text.txt"])
    assert "cannot be read: it is a folder" in refused(model.encode_image, [tmp_path])
    narrow = torch.zeros(3, 1, 4000, dtype=torch.uint8)
    assert "hold no patch of 8 x 8" in refused(model.segment, narrow, ["cat"])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([], 'classes: an empty list; rule: a list such as ["cat", "dog"]'),
        ("cat", "classes: 'cat' alone; rule: a list"),
        (["cat", "dog", "cat"], "classes: 'cat' twice, numbers 0 and 2; rule: each class once"),
        (["cat", ["cat", "kitten"]], "classes: 'cat' twice"),
        (["cat", 3], "classes: number 1 is 3; rule: a list"),
        (["cat", []], "classes: number 1 is []; rule: a list"),
        (["cat", " "], "classes: number 1 has the name ' '; rule: a list"),
        (["cat", "d\0g"], "classes: number 1 has the name 'd\\x00g'; rule: a list"),
        (["cat", ["dog", None]], "classes: number 1 has the name None; rule: a list"),
        ({"cat": 0}, "classes: a dict; rule: a list of names"),
        (None, "classes: a NoneType; rule: a list of names"),
    ],
)
def test_what_are_no_classes(classes: Any, said: str, model: LoadedModel) -> None:
    assert refused(model.classify, [LEVELS], classes).startswith(said)
    assert refused(model.segment, LEVELS, classes).startswith(said)


def test_what_are_no_texts_templates_and_thresholds(model: LoadedModel) -> None:
    wrong: Any
    assert refused(model.encode_text, []) == "texts: an empty list; rule: one text or more"
    assert refused(model.encode_text, "a cat") == "texts: 'a cat' alone; rule: a list of texts"
    for wrong in ([3], [None], [["a"]]):
        assert refused(model.encode_text, wrong).startswith(("texts: number 0 is a ", "texts: number 0 is an int"))
    for wrong, said in (
        ("{}", "templates: '{}' alone"),
        ([], "templates: an empty"),
        (["a"], "templates: number 0"),
        (["{}\0"], "templates: number 0, '{}\\x00', holds a NUL"),
    ):
        assert refused(model.classify, [LEVELS], ["cat"], templates=wrong).startswith(said)
        assert refused(model.segment, LEVELS, ["cat"], templates=wrong).startswith(said)
    for wrong in (-0.1, 1.5, float("nan"), None):
        said = refused(model.segment, LEVELS, ["cat"], prob_threshold=wrong)
        assert said == f"prob_threshold: {wrong}; rule: from 0 to 1"
    for wrong in ("", " ", None, ["a cat"]):
        said = refused(model.attention_maps, LEVELS, wrong)
        assert said == f"caption: {wrong!r}; rule: a text"


def test_what_cannot_be_loaded(saved: Saved, tmp_path: Path) -> None:
    assert f"checkpoint {tmp_path}: none there" in refused(cosmos_scale.load, tmp_path)
    assert "none there" in refused(cosmos_scale.load, tmp_path / "missing")
    assert refused(cosmos_scale.load, 3).startswith("checkpoint: an int; rule: the path of")
    for path, said in {
        "nul\0": "'nul\\x00': embedded null byte",
        "\ud800": "'\\ud800': 'utf-8' codec",
        "n" * 5000: f"'{'n' * 5000}': File name too long",
        "~no_such_user/run": "~no_such_user/run: ~no_such_user has no home folder; rule: ",
    }.items():
        assert refused(cosmos_scale.load, path).startswith(f"checkpoint: {said}")
    assert refused(cosmos_scale.load, saved.run, "both") == "which: 'both'; rule: student or teacher"
    for wrong in ("tpu", "meta", 1.5, None):
        assert refused(cosmos_scale.load, saved.run, device=wrong).startswith(f"device: {wrong!r}")
    wanted = f"cuda:{torch.cuda.device_count()}"
    assert refused(cosmos_scale.load, saved.run, device=wanted).startswith(f"device: {wanted!r}: torch finds ")


def test_a_model_without_heads_has_no_attention_maps(tmp_path: Path, model: LoadedModel) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_run())
    towers = cosmos_scale.load(checkpoint, device="cpu")
    with torch.no_grad():
        towers.encoder.model.visual.attn_cross_pool.attn.in_proj_weight.fill_(float("nan"))
    said = refused(towers.attention_maps, LEVELS, "a cat")
    assert said.startswith(f"{checkpoint}: has no cross-modality heads")
    assert torch.equal(towers.encode_image([LEVELS]), model.encode_image([LEVELS]))


def test_what_is_no_file_for_attention_maps(model: LoadedModel) -> None:
    found = model.attention_maps(LEVELS, "a cat")
    for path, said in (
        (io.BytesIO(), "path: a BytesIO; rule: a path, as a text or a Path"),
        (None, "path: a NoneType; rule: a path, as a text or a Path"),
        (b"maps.png", "path: a bytes; rule: a path, as a text or a Path"),
        ("", ".: names no file; rule: the picture's file, such as maps.png"),
    ):
        assert refused(found.save, path) == said
