"""A loaded model gives what the evaluators measure: features, classes, labels, weights; and it prints as people read.

Features are compared to 1e-6: batches of another size add the same float32 products in another order, and features
have length 1.
"""

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cosmos_scale
from cosmos_scale.config import ClassificationConfig, SegmentationConfig
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.attention_maps import attention_maps, encode_pairs, word_weights
from cosmos_scale.evaluation.evaluator import Encoder, measure, one_process
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.evaluation.segmentation.evaluator import Segmentation, recipe_of
from cosmos_scale.evaluation.segmentation.pixels import decode_upright
from cosmos_scale.evaluation.segmentation.segmenter import segment
from cosmos_scale.inference import LoadedModel, loaded_model
from cosmos_scale.testing.shard_files import picture
from tests.evaluation.labelled import ANIMALS
from tests.inference.conftest import Saved

NAMES = [name.replace("_", " ") for name in ANIMALS]
CLOSE = 1e-6


@pytest.fixture(scope="module")
def encoder(saved: Saved) -> Encoder:
    """What the commands of evaluation load."""
    return load_encoder(saved.checkpoint, "teacher", "cpu")


@torch.no_grad()
def features_of(encoder: Encoder, files: list[Path]) -> Tensor:
    setting = encoder.setting
    images = [evaluation_image(file.read_bytes(), setting.image_size, setting.max_pixels) for file in files]
    return encoder.images(torch.stack(images))


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def as_tensor(file: Path) -> Tensor:
    return torch.from_numpy(decode_rgbx(file.read_bytes(), 10**6)[..., :3].copy()).permute(2, 0, 1)


def test_features_are_those_of_evaluation(model: LoadedModel, encoder: Encoder, saved: Saved) -> None:
    files = saved.files()
    features = model.encode_image(files)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert worst(features, features_of(encoder, files)) < CLOSE
    with torch.no_grad():
        assert worst(model.encode_text(NAMES), encoder.texts(NAMES)) < CLOSE


def test_pictures_of_every_form_give_the_same(model: LoadedModel, saved: Saved) -> None:
    files = saved.files()[:3]
    as_paths = model.encode_image(files)
    opened = [Image.open(file) for file in files]
    mixed = [str(files[0]), opened[1], as_tensor(files[2])]
    same: Any
    for same in (opened, [as_tensor(file) for file in files], mixed, iter(files)):
        assert torch.equal(model.encode_image(same), as_paths)
    as_two = model.encode_image([files[0], files[0]])  # a batch of its own: the last bits depend on the batch's size
    twice = Image.open(files[0])  # not read yet
    assert torch.equal(model.encode_image([twice, twice]), as_two)
    assert worst(as_two[1], as_paths[0]) < CLOSE
    batch = torch.stack([as_tensor(files[0]), as_tensor(files[0]).flip(2)])
    assert torch.equal(model.encode_image(batch)[0], as_two[0])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "png"), ("P", "png"), ("LA", "png"), ("I;16", "png"), ("RGBA", "webp"), ("L", "jpeg"), ("CMYK", "jpeg")],
)
def test_a_file_and_its_pil_picture_give_the_same(mode: str, kind: str, model: LoadedModel, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(levels[..., 0].astype(np.uint16) * 256)
    if mode != "I;16":
        image = Image.fromarray(levels)
        image = image.convert("RGB").convert(mode) if mode in ("P", "CMYK") else image.convert(mode)
    image.save(tmp_path / f"picture.{kind}")
    file = tmp_path / f"picture.{kind}"
    # One by one: on some CPUs the last bits depend on a picture's place in its batch.
    assert torch.equal(model.encode_image([file]), model.encode_image([Image.open(file)]))


def test_home_and_variables_stand_in_every_path(
    model: LoadedModel, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved.files()[0]
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("PICTURES", str(file.parent))
    for path in (f"~/{file.name}", Path("~", file.name), f"$PICTURES/{file.name}"):
        assert torch.equal(model.encode_image([path]), model.encode_image([file]))
        assert torch.equal(model.segment(path, NAMES).labels, model.segment(file, NAMES).labels)
    with pytest.raises(UserError, match=r"^images: number 0: ~no_such_user/a.jpg: .* has no home folder"):
        model.encode_image(["~no_such_user/a.jpg"])
    monkeypatch.setenv("HOME", str(tmp_path))
    model.attention_maps(file, "a cat").save("~/maps.png")
    assert (tmp_path / "maps.png").is_file()


def test_any_batch_gives_the_same(model: LoadedModel, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved.files()
    expected = model.encode_image(files), model.encode_text(NAMES)
    seen: list[int] = []
    encode = model.encoder.model.encode_image

    def encode_seen(images: Tensor) -> Tensor:
        seen.append(len(images))
        return encode(images)

    monkeypatch.setattr(model.encoder.model, "encode_image", encode_seen)
    for most in (1, 3):
        monkeypatch.setattr(loaded_model, "_LARGEST_BATCH", most)
        seen.clear()
        assert worst(model.encode_image(files), expected[0]) < CLOSE
        assert max(seen) == most
        assert sum(seen) == len(files)
        assert worst(model.encode_text(NAMES), expected[1]) < CLOSE


def test_classes_are_those_that_the_evaluator_counts(model: LoadedModel, encoder: Encoder, saved: Saved) -> None:
    templates = ["a photo of a {}.", "a drawing of the {c}."]
    (saved.pictures / "templates.txt").write_text("\n".join(templates))
    (saved.pictures / "classnames.txt").write_text("\n".join(NAMES))
    section = ClassificationConfig(kind="classification", data=str(saved.pictures))
    numbers = measure(make_evaluator(section, encoder.setting), encoder)
    found = model.classify(saved.files(), NAMES, templates=templates)
    true = torch.arange(len(NAMES)).repeat_interleave(2)
    assert float((found.labels == true).double().mean()) == numbers["top1"]
    in_five = [NAMES[label] in [name for name, _ in best] for label, best in zip(true, found.top(5), strict=True)]
    for wrong in (0, -1, 1.5, "2", None):
        with pytest.raises(UserError, match=r"^k: .*; rule: a whole number, at least 1$"):
            found.top(wrong)  # type: ignore[arg-type]
    assert sum(in_five) / len(in_five) == numbers["top5"]

    with torch.no_grad():
        texts = [[template.format(name, c=name) for template in templates] for name in NAMES]
        means = torch.stack([encoder.texts(of_class).double().mean(0) for of_class in texts])
        means /= means.norm(dim=1, keepdim=True)
        cosines = features_of(encoder, saved.files()).double() @ means.T
        logits = encoder.model.logit_scale.double().exp() * cosines
    assert worst(found.cosines, cosines) < CLOSE
    assert worst(found.probabilities, logits.softmax(1)) < 1e-5  # logits are about 14 times a cosine
    assert found.names == [NAMES[label] for label in cosines.argmax(1)]


def test_several_names_stand_for_a_class(model: LoadedModel, saved: Saved) -> None:
    found = model.classify(saved.files()[:1], [["cat", "kitten"], "dog"], templates=["{}"])
    cat = model.encode_text(["cat", "kitten"]).mean(0)
    assert found.classes == ("cat", "dog")
    assert float(found.cosines[0, 0]) == pytest.approx(
        float(model.encode_image(saved.files()[:1])[0] @ cat / cat.norm()), abs=CLOSE
    )


@pytest.mark.parametrize(("csa", "threshold"), [(False, 0.0), (True, 0.3)])
def test_labels_are_those_of_the_evaluator(
    csa: bool, threshold: float, model: LoadedModel, encoder: Encoder, saved: Saved, tmp_path: Path
) -> None:
    classes = [["sky", "wall"], "aeroplane", "bird"]
    (tmp_path / "names.txt").write_text("sky, wall\naeroplane\nbird\n")
    file = tmp_path / "images" / "0.png"
    file.parent.mkdir()
    (tmp_path / "masks").mkdir()
    file.write_bytes(picture(1, "PNG", (40, 30)))
    Image.new("L", (40, 30)).save(tmp_path / "masks" / "0.png")
    section = SegmentationConfig(
        kind="segmentation",
        images=str(file.parent),
        masks=str(tmp_path / "masks"),
        classes=str(tmp_path / "names.txt"),
        background=True,
        csa=csa,
        prob_threshold=threshold,
    )
    evaluator = make_evaluator(section, encoder.setting)
    assert isinstance(evaluator, Segmentation)
    with torch.no_grad():
        queries = evaluator.queries(encoder, one_process)
    pixels = decode_upright(file.read_bytes(), 10**6)
    expected = segment(encoder.model.visual, pixels, queries, recipe_of(section, encoder.setting.image_size))
    found = model.segment(file, classes, csa=csa, prob_threshold=threshold)
    assert torch.equal(found.labels, expected)
    assert found.labels.shape == (30, 40)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert torch.equal(found.mask("bird"), expected == 2)
    with pytest.raises(UserError, match=r"name: 'birds'; rule: one of "):
        found.mask("birds")
    in_memory = model.segment(Image.open(file), classes, csa=csa, prob_threshold=threshold)
    assert torch.equal(in_memory.labels, expected)


def test_a_file_that_lies_on_its_side_is_segmented_upright(model: LoadedModel, tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(1, "PNG", (40, 30))))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "side.jpg", quality=95, exif=exif)
    assert model.segment(tmp_path / "side.jpg", NAMES).labels.shape == (40, 30)
    assert model.segment(Image.open(tmp_path / "side.jpg"), NAMES).labels.shape == (30, 40)


def test_texts_of_classes_are_encoded_once(model: LoadedModel, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    image = saved.files()[0]
    first = [model.classify([image], NAMES).cosines, model.segment(image, NAMES).labels]
    monkeypatch.setattr(model.encoder.model, "encode_text", None)
    again = [model.classify([image], iter(NAMES)).cosines, model.segment(image, NAMES).labels]
    assert all(map(torch.equal, first, again))


def test_attention_is_that_of_the_command(model: LoadedModel, encoder: Encoder, saved: Saved, tmp_path: Path) -> None:
    caption, setting = "a fox, by the sea", encoder.setting
    found = model.attention_maps(saved.files()[0], caption)
    image = evaluation_image(saved.files()[0].read_bytes(), setting.image_size, setting.max_pixels)
    (pair,) = encode_pairs(encoder.model, image[None], setting.tokenizer([caption]))
    maps = attention_maps(encoder.model, pair, 2)
    assert worst(found.maps.image_weights, maps.image_weights) < CLOSE
    assert worst(found.maps.text_weights, maps.text_weights) < CLOSE
    assert list(found.words) == word_weights(caption, found.maps, setting.tokenizer)
    assert (found.image_map.shape, found.heat.shape, found.image.shape) == ((2, 2), (16, 16), (16, 16, 3))
    assert found.image.dtype == torch.uint8
    found.save(tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").format == "PNG"


def test_student_and_teacher_are_two_models(model: LoadedModel, saved: Saved) -> None:
    student = cosmos_scale.load(str(saved.checkpoint), "student", torch.device("cpu"))
    assert (student.which, model.which) == ("student", "teacher")
    assert student.checkpoint == model.checkpoint == saved.checkpoint
    assert worst(student.encode_text(NAMES), model.encode_text(NAMES)) > 0.01
    assert (student.image_size, student.embed_dim, str(student.device)) == (16, 64, "cpu")
    assert student.logit_scale == pytest.approx(1 / 0.07)


def test_a_model_is_given_to_other_processes_and_copied(model: LoadedModel, saved: Saved) -> None:
    """With weights of its own: what the first one remembers of its texts does not go along."""
    cosines = model.classify(saved.files()[:2], NAMES).cosines
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.encoder is not model.encoder
        assert repr(other) == repr(model)
        assert torch.equal(other.classify(saved.files()[:2], NAMES).cosines, cosines)
        with torch.no_grad():
            other.encoder.model.token_embedding.weight.zero_()
    assert torch.equal(model.classify(saved.files()[:2], NAMES).cosines, cosines)


def test_results_print_as_people_read_them(model: LoadedModel, saved: Saved) -> None:
    files = saved.files()
    sizes = "pictures of 16 pixels in patches of 8, features of 64"
    assert repr(model) == f"teacher of {saved.checkpoint}\n  on cpu; {sizes}"
    first, *lines = repr(model.classify(files, NAMES)).splitlines()
    assert first == "14 pictures, 7 classes"
    assert re.match(r"  \.\.\./\S*pictures/bird/000\.jpg: ", lines[0])
    assert lines[0].count(" %") == 3
    assert lines[-1] == "  ... and 4 more"
    assert "  picture 0: " in repr(model.classify([as_tensor(files[0])], NAMES[:1]))
    many = repr(model.segment(np_picture(), [f"class {number}" for number in range(40)]))
    assert many.startswith("a PIL picture of 40 x 30 pixels, 40 x 30 pixels\n  class ")
    maps = repr(model.attention_maps(files[0], "a fox"))
    assert " from the top, " in maps
    assert "fox " in maps


def np_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(saved: Saved, model: LoadedModel) -> None:
    """To 1e-4: a GPU's float32 products may use another order and fused operations; features have length 1."""
    on_gpu = cosmos_scale.load(saved.run, device="cuda:0")
    features = on_gpu.encode_image(saved.files())
    assert features.device.type == "cpu"
    assert worst(features, model.encode_image(saved.files())) < 1e-4
    assert worst(on_gpu.classify(saved.files(), NAMES).cosines, model.classify(saved.files(), NAMES).cosines) < 1e-4
    assert on_gpu.segment(saved.files()[0], NAMES).labels.device.type == "cpu"
    assert on_gpu.attention_maps(saved.files()[0], "a fox").maps.image_weights.device.type == "cpu"
