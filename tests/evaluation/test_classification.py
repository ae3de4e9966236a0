"""Classification: its numbers by a float64 oracle and by clip-benchmark's code, on any ranks, with any damage."""

import copy
import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.classification import Classification, mean_per_class, ranks_of
from cosmos_scale.evaluation.confusions import LIST, PICTURE, Confused, worst_confusions, write_confusions
from cosmos_scale.evaluation.evaluator import Encoder, Numbers, measure, one_process
from cosmos_scale.evaluation.feature_cache import FeatureCache
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.prompts.texts import filled_in
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.evaluation.together import measure_together
from cosmos_scale.testing.shard_files import picture
from tests.evaluation.labelled import ANIMALS, section, tiny_encoder, tiny_run, write_folders, write_labelled_shards
from tests.evaluation.test_evaluator import together

COUNTS = [3, 4, 0, 5, 2, 6, 4]  # the third class has no picture
NAMES = "bird\nblue whale, whale\ncat\ndog\nfox\ngnu\nhen\n"
TEMPLATES = "a photo of a {}.\na {c} in a zoo.\nmany {}\n"


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_folders(tmp_path_factory.mktemp("animals"), COUNTS)
    (root / "classnames.txt").write_text(NAMES)
    (root / "templates.txt").write_text(TEMPLATES)
    return root


def oracle(root: Path) -> Numbers:
    """The numbers by the formula, in float64, a picture at a time."""
    encoder = tiny_encoder()
    model = copy.deepcopy(encoder.model).double()
    templates = [line.replace("{c}", "{}") for line in TEMPLATES.splitlines()]
    columns = []
    for names in NAMES.splitlines():
        texts = filled_in(names.split(", "), templates)
        rows = model.encode_text(encoder.setting.tokenizer(texts)).detach().numpy()
        mean = np.mean(rows / np.sqrt((rows**2).sum(1, keepdims=True)), axis=0)
        columns.append(mean / np.sqrt((mean**2).sum()))
    weights_EC = np.stack(columns, axis=1)
    first: dict[int, list[bool]] = {}
    fifth: list[bool] = []
    for label, folder in enumerate(sorted(path for path in root.iterdir() if path.is_dir())):
        for file in sorted(folder.iterdir()):
            image = evaluation_image(file.read_bytes(), 16, 10**6).double()
            logits = 100.0 * model.encode_image(image[None])[0].detach().numpy() @ weights_EC
            order = np.argsort(-logits, kind="stable").tolist()
            first.setdefault(label, []).append(order[0] == label)
            fifth.append(label in order[:5])
    hits = [hit for of_class in first.values() for hit in of_class]
    return {
        "pictures": len(hits),
        "classes": len(COUNTS),
        "top1": sum(hits) / len(hits),
        "top5": sum(fifth) / len(hits),
        "mean_per_class": float(np.mean([np.mean(of_class) for of_class in first.values()])),
        "chance_top1": 1 / len(COUNTS),
        "pictures_left_out": 0,
    }


def test_numbers_are_those_of_the_formula_in_float64(animals: Path) -> None:
    """Ranks of logits in float32 equal those in float64 on this data, so that the numbers differ by their rounding."""
    encoder = tiny_encoder()
    numbers = measure(make_evaluator(section(animals, batch=5), encoder.setting), encoder)
    expected = oracle(animals)
    assert 0 < expected["top1"] < expected["top5"] < 1  # else this test could not tell much
    assert numbers == pytest.approx(expected, abs=1e-12)


def test_ranks_and_batches_do_not_matter(animals: Path) -> None:
    def measured(world_size: int, batch: int) -> list[Any]:
        def measures(evaluator: Any, encoder: Any, *others: Any) -> Numbers:
            encoder = tiny_encoder(evaluator.setting.rank, world_size)
            return measure_together(make_evaluator(section(animals, batch=batch), encoder.setting), encoder, *others)

        outcomes = together(tiny_run(), world_size, lambda rank, place: None, measures=measures)
        return [number for outcome in outcomes for number in outcome]

    everything = [
        numbers for world_size in (1, 2, 3) for batch in (1, 7, 64) for numbers in measured(world_size, batch)
    ]
    assert len(everything) == 2 * 3 * (1 + 2 + 3)
    assert all(numbers == everything[0] for numbers in everything), everything


def test_text_weights_are_the_same_to_the_last_bit_on_any_number_of_ranks() -> None:
    names = [(f"thing {number}",) for number in range(7)]
    templates = [f"sentence {number} of a {{}}." for number in range(100)]  # two classes a group
    alone = text_weights(tiny_encoder(), names, templates, one_process)

    def measures(evaluator: Any, encoder: Any, gather: Any, folder: None) -> Any:
        encoder = tiny_encoder(evaluator.setting.rank, 3)
        return text_weights(encoder, names, templates, gather).detach()

    for outcome in together(tiny_run(), 3, lambda rank, place: None, measures=measures):
        for weights in outcome:
            assert isinstance(weights, torch.Tensor)
            assert torch.equal(weights, alone)
    assert torch.allclose(alone.norm(dim=1), torch.ones(7), atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_has_the_numbers_of_the_cpu(animals: Path) -> None:
    """Features differ in their last bits; on this data no two classes of a picture are that close."""
    expected = measure(make_evaluator(section(animals), tiny_encoder().setting), tiny_encoder())
    encoder = tiny_encoder()
    cuda = torch.device("cuda")
    setting = replace(encoder.setting, device=cuda)
    encoder = replace(encoder, model=copy.deepcopy(encoder.model).to(cuda), setting=setting)
    assert measure(make_evaluator(section(animals, confusions=2), setting), encoder) == expected


def test_ties_and_nan_have_one_rule() -> None:
    nan = float("nan")
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [nan, 1.0, 0.0], [1.0, nan, 2.0], [3.0, 1.0, 2.0]])
    assert ranks_of(logits, torch.tensor([0, 2, 1, 1, 0])).tolist() == [0, 1, 1, 3, 0]
    assert ranks_of(torch.zeros(3, 4), torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]


def test_of_classes_with_one_name_the_first_has_all_pictures(tmp_path: Path) -> None:
    def hits(counts: list[int], names: str) -> int:
        root = write_folders(tmp_path / str(len(counts)), counts)
        (root / "classnames.txt").write_text(names)
        encoder = tiny_encoder()
        numbers = measure(make_evaluator(section(root, batch=5), encoder.setting), encoder)
        return round(numbers["top1"] * numbers["pictures"])

    # The third class wins no picture, so that the first two hit what they hit without it.
    assert hits([6, 6, 9], "dog\ncat\ndog\n") == hits([6, 6], "dog\ncat\n") > 0


def test_classes_without_pictures_are_in_no_mean_and_named(animals: Path) -> None:
    assert mean_per_class(torch.tensor([[4, 1, 2], [0, 0, 0], [1, 1, 1]])) == (0.25 + 1.0) / 2
    encoder = tiny_encoder()
    evaluator = make_evaluator(section(animals), encoder.setting)
    caption = evaluator.table({"student": measure(evaluator, encoder)}, "step 5").caption
    assert str(caption).endswith("; 1 class without a picture: cat")


def test_a_broken_picture_costs_one_picture_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "set", [2, 2, 2])
    (root / "bird" / "000.jpg").write_bytes(picture(0)[:300])
    (root / "cat" / "big.png").write_bytes(picture(9, "PNG", (100, 100)))
    encoder = tiny_encoder(max_pixels=5000)
    evaluator = make_evaluator(section(root), encoder.setting)
    (root / "blue_whale" / "002.jpg").unlink()
    numbers = measure(evaluator, encoder)
    assert (numbers["pictures"], numbers["pictures_left_out"]) == (4, 3)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out: bird/000.jpg: the picture does not decode: ")
    assert said[1] == "left out: blue_whale/002.jpg: the picture cannot be read: No such file or directory"
    assert said[2] == "left out: cat/big.png: the picture has 100 x 100 pixels, more than max_pixels 5000"
    table = evaluator.table({"student": numbers}, "")
    assert table.caption == "4 pictures, 3 classes; chance top-1: 33.33 %; left out, damaged or too large: 3"


@pytest.mark.parametrize("world_size", [1, 2])
def test_pictures_in_no_class_and_those_named_as_none_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: int
) -> None:
    root = write_folders(tmp_path / "set", [2, 2])
    (root / "bird" / "000.jpg").write_bytes(b"x")
    for name in ("loose.JPG", "another.heic", ".hidden.jpg", "notes.txt"):
        (root / name).write_bytes(picture(0))
    for name in ("1.jpg_large", "2", ".3.jpg_large"):
        (root / "blue_whale" / name).write_bytes(picture(0))
    (root / "blue_whale" / "3.tif_original").write_bytes(b"II*\0 and more")
    (root / "blue_whale" / "notes.txt").write_text("no picture")
    tables = []

    def measures(evaluator: Any, encoder: Any, *others: Any) -> Numbers:
        encoder = tiny_encoder(evaluator.setting.rank, world_size)
        evaluator = make_evaluator(section(root, batch=1), encoder.setting)
        numbers = measure_together(evaluator, encoder, *others)
        tables.append(evaluator.table({"student": numbers}, ""))
        return numbers

    for outcome in together(tiny_run(), world_size, lambda rank, place: None, measures=measures):
        for numbers in outcome:
            assert isinstance(numbers, dict)
            assert (numbers["pictures"], numbers["pictures_left_out"]) == (3, 6)
    said = (
        "2 pictures beside the folders of the classes, in no class, such as another.heic",
        "3 pictures named as no picture is, such as blue_whale/1.jpg_large",
    )
    lines = capsys.readouterr().err.splitlines()
    assert all(f"left out: {root}: {what}" in lines for what in said)
    assert str(tables[0].caption).endswith(
        f"; left out, damaged or too large: 1; left out, {'; left out, '.join(said)}"
    )


def test_a_set_of_pictures_that_are_named_as_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg_large").write_bytes(picture(0))
    said = (
        "no picture in its 1 folder, but 1 file that is one, such as cat/1.jpg_large; rule: the names of pictures end"
    )
    with pytest.raises(UserError, match=f"^{tmp_path}: {said} with .jpg, "):
        make_evaluator(section(tmp_path), tiny_encoder().setting)


def test_a_set_without_any_sound_picture_is_an_error(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [1, 1])
    encoder = tiny_encoder(max_pixels=10)
    with pytest.raises(UserError, match=f"^{root}: none of its 2 pictures can be used$"):
        measure(make_evaluator(section(root), encoder.setting), encoder)


def test_confusions_are_counted_named_and_drawn(animals: Path, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    evaluator = make_evaluator(section(animals, confusions=3), encoder.setting)
    numbers = measure(evaluator, encoder, folder=tmp_path / "out")
    (table,) = evaluator.details()
    rows = list(csv.reader((tmp_path / "out" / LIST).open()))
    assert rows[0] == ["truth", "taken_for", "pictures", "share"]
    assert 1 <= len(rows) - 1 <= 3
    assert [row[2] for row in rows[1:]] == sorted((row[2] for row in rows[1:]), reverse=True)
    assert {row[0] for row in rows[1:]} <= {line.split(", ")[0] for line in NAMES.splitlines()}
    assert int(rows[1][2]) <= numbers["pictures"] * (1 - numbers["top1"])
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert table.row_count == len(rows) - 1  # type: ignore[union-attr]


def test_confusions_of_names_that_are_no_utf8_or_a_formula_are_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")  # a folder's, by a disk of another system
    write_confusions(torch.tensor([[1, 2], [0, 1]]), [name, "$_^$"], [Confused(name, "tea", 2, 0.5)], tmp_path)
    assert (tmp_path / LIST).read_bytes().splitlines()[1] == b"caf\xe9,tea,2,0.5"
    assert (tmp_path / PICTURE).exists()


def test_the_worst_confusions_come_first_and_never_the_right_answers() -> None:
    counts = torch.tensor([[9, 1, 0], [2, 0, 2], [0, 0, 5]])
    found = worst_confusions(counts, ["a", "b", "c"], 10)
    assert [(one.truth, one.taken_for, one.pictures, one.share) for one in found] == [
        ("b", "a", 2, 0.5),
        ("b", "c", 2, 0.5),
        ("a", "b", 1, 0.1),
    ]
    assert len(worst_confusions(counts, ["a", "b", "c"], 2)) == 2


def test_text_weights_are_kept_for_the_same_weights_and_texts(tmp_path: Path) -> None:
    calls: list[int] = []
    plain = tiny_encoder()
    setting = replace(plain.setting, cache=FeatureCache(tmp_path / "features"))

    def weights(names: list[tuple[str, ...]], of: str = "student of 1") -> torch.Tensor:
        encoder = replace(plain, setting=setting, weights=of)
        encode = Encoder.texts

        def counted_texts(self: Encoder, texts: Any) -> torch.Tensor:
            calls.append(len(texts))
            return encode(self, texts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Encoder, "texts", counted_texts)
            return text_weights(encoder, names, ["a {}."], one_process).detach()

    first = weights([("cat",), ("dog",)])
    assert torch.equal(weights([("cat",), ("dog",)]), first)
    assert calls == [2]
    weights([("cat",), ("hen",)])
    weights([("cat",), ("dog",)], "teacher of 1")
    weights([("cat",), ("dog",)], "")  # weights that are still trained are never kept
    assert calls == [2, 2, 2, 2]
    assert len(list((tmp_path / "features").iterdir())) == 3
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(weights([("cat",), ("dog",)]), first)


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file")
    for made_of in ("a", "b"):
        cache.save(made_of, {"weights": torch.zeros(1)})
        assert cache.load(made_of) is None
    assert capsys.readouterr().err.count("features are not kept: ") == 1


def test_long_work_is_reported_part_by_part(animals: Path) -> None:
    told: list[tuple[str, int, int]] = []
    encoder = tiny_encoder()
    setting = replace(encoder.setting, report=lambda *work: told.append(work))
    encoder = replace(encoder, setting=setting)
    measure(make_evaluator(section(animals, batch=10), setting), encoder)
    assert told == [("groups of texts", 1, 1), ("pictures", 10, 24), ("pictures", 20, 24), ("pictures", 24, 24)]


def test_clip_benchmarks_own_code_has_the_same_numbers(tmp_path: Path) -> None:
    """On one webdataset folder: top-1, top-5 and mean per class, to 1e-12 since all are shares of whole numbers.

    clip-benchmark's `accuracy` does not run with numpy 2.4; its one line is repeated here on its logits.
    """
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason="needs clip-benchmark")
    from clip_benchmark.datasets.builder import build_wds_dataset

    root = write_labelled_shards(tmp_path, [9, 8, 12])
    encoder = tiny_encoder()

    def prepare(image: Any) -> torch.Tensor:
        from torchvision import transforms

        from cosmos_scale.batch import MEAN, STD

        steps = [
            transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        prepared: torch.Tensor = transforms.Compose(steps)(image.convert("RGB"))
        return prepared

    dataset = build_wds_dataset("set", transform=prepare, split="test", data_dir=str(root))
    loader = torch.utils.data.DataLoader(dataset.batched(4), batch_size=None)
    classifier = theirs.zero_shot_classifier(
        encoder.model, encoder.setting.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    logits, target = theirs.run_classification(encoder.model, classifier, loader, "cpu", amp=False)
    best = logits.topk(5).indices
    expected = {
        "top1": (best[:, 0] == target).double().mean().item(),
        "top5": (best == target[:, None]).any(1).double().mean().item(),
        "mean_per_class": theirs.balanced_accuracy_score(target, logits.argmax(1)),
    }
    evaluator = make_evaluator(section(root, dataset="webdataset", batch=5), encoder.setting)
    numbers = measure(evaluator, encoder)
    assert numbers["pictures"] == len(target) == 29
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_the_subject_stands_in_json(animals: Path) -> None:
    evaluator = Classification(section(animals), tiny_encoder().setting)
    assert json.dumps(evaluator.subject()) == json.dumps({"dataset": "folders", "data": str(animals)})
    assert evaluator.gallery().startswith("24 pictures, digest ")
    assert ANIMALS[1] == "blue_whale"
