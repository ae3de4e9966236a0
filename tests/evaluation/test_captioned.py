"""Retrieval's layouts of pictures with captions: each by hand-written files, its refusals, its cache, and its peer."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.config.section import RuleBroken
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.captioned import LeftOut
from cosmos_scale.evaluation.datasets.captioned_files import open_pairs
from cosmos_scale.evaluation.datasets.captioned_sets import FileGallery, open_captioned
from cosmos_scale.evaluation.evaluator import Numbers, measure
from cosmos_scale.evaluation.feature_cache import FeatureCache
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.together import measure_together
from cosmos_scale.testing.shard_files import picture, write_shard
from tests.evaluation.labelled import save_picture, tiny_encoder, tiny_run
from tests.evaluation.test_evaluator import together

Captions = dict[str, list[str]]


def section(data: Path, dataset: str, **keys: Any) -> RetrievalConfig:
    return RetrievalConfig.model_validate({"kind": "retrieval", "dataset": dataset, "data": str(data), **keys})


def opened(data: Path, dataset: str, **keys: Any) -> FileGallery:
    found = open_captioned(section(data, dataset, **keys), tiny_encoder().setting)
    assert isinstance(found, FileGallery)
    return found


def captions_of(gallery: FileGallery) -> Captions:
    """The texts of each picture by its name; every picture decodes."""
    read = [gallery.read(place) for place in range(len(gallery))]
    assert all(make_image().shape == (3, 16, 16) for make_image, _ in read)
    return {gallery.name(place): texts for place, (_, texts) in enumerate(read)}


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def save(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save_picture(root / name, number)


def write_coco(root: Path) -> Captions:
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (7, 3, 5, 9)]
    annotated = [(5, "a cat"), (7, "a dog"), (5, "two cats"), (3, "a bird"), (7, "")]
    annotations = [{"id": place, "image_id": image, "caption": text} for place, (image, text) in enumerate(annotated)]
    write_json(root / "annotations/captions_val2017.json", {"images": images, "annotations": annotations})
    save(root, *(f"images/val2017/{image['file_name']}" for image in images))
    return {
        "000000000005.jpg": ["a cat", "two cats"],
        "000000000007.jpg": ["a dog", ""],
        "000000000003.jpg": ["a bird"],
    }


def write_karpathy(root: Path) -> Captions:
    def image(split: str, name: str, *texts: str) -> dict[str, Any]:
        return {"split": split, "filepath": "val2014", "filename": name, "sentences": [{"raw": text} for text in texts]}

    images = [image("val", "a.jpg", "one"), image("test", "b.jpg", "two", "three"), image("test", "c.jpg", "four")]
    write_json(root / "annotations/dataset_coco.json", {"images": images, "dataset": "coco"})
    save(root, "images/val2014/b.jpg", "images/val2014/c.jpg")
    return {"val2014/b.jpg": ["two", "three"], "val2014/c.jpg": ["four"]}


def write_karpathy_list(root: Path) -> Captions:
    captions = {"val2014/b.jpg": ["two", "three"], "val2014/c.jpg": ["four"]}
    items = [{"image": name, "caption": texts} for name, texts in captions.items()]
    write_json(root / "annotations/coco_karpathy_test.json", items)
    save(root, *captions)
    return captions


def write_flickr(split: str) -> Callable[[Path], Captions]:
    def write(root: Path) -> Captions:
        captions = {f"{root.name}/{number}.jpg": [f"text {number} {place}" for place in range(5)] for number in (4, 2)}
        items = [{"image": name, "caption": texts} for name, texts in captions.items()]
        write_json(root / f"flickr30k_{split}.json", items)
        save(root.parent, *captions)
        return captions

    return write


def write_webdataset(root: Path, samples: int = 4) -> Captions:
    """clip-benchmark's form: two shards of test/, the captions in .txt, a line each."""
    captions = {f"test/{shard}.tar: s{place}": [f"shape {shard} of {place}"] * (1 + place % 2) for shard in (0, 1)
                for place in range(samples)}  # fmt: skip
    for shard in (0, 1):
        members = [
            {"__key__": name.split(": ")[1], "jpg": picture(10 * shard + place), "txt": "\n".join(texts).encode()}
            for place, (name, texts) in enumerate(captions.items())
            if name.startswith(f"test/{shard}.tar")
        ]
        (root / "test").mkdir(exist_ok=True, parents=True)
        write_shard(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2")
    (root / "dataset_type.txt").write_text("retrieval")
    return captions


@pytest.mark.parametrize(
    ("dataset", "write"),
    [
        ("coco_val2017", write_coco),
        ("coco_karpathy_test", write_karpathy),
        ("coco_karpathy_test", write_karpathy_list),
        ("flickr30k_val", write_flickr("val")),
        ("flickr30k_test", write_flickr("test")),
        ("webdataset", write_webdataset),
    ],
)
def test_a_layout_gives_its_pictures_and_captions_in_its_order(
    dataset: str, write: Callable[[Path], Captions], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    expected = write(root)
    gallery = opened(root, dataset)
    assert list(captions_of(gallery).items()) == list(expected.items())
    assert len(opened(root, dataset, max_samples=1)) == 1
    evaluator = make_evaluator(section(root, dataset), tiny_encoder().setting)
    assert measure(evaluator, tiny_encoder())["texts"] == sum(map(len, expected.values()))
    assert evaluator.subject() == {"dataset": dataset, "data": str(root)}


@pytest.mark.parametrize("beside_the_link", [True, False])
def test_lists_behind_links_name_pictures_from_both_ends_of_the_link(beside_the_link: bool, tmp_path: Path) -> None:
    seen, real = tmp_path / "seen", tmp_path / "real" / ("other" if beside_the_link else "flickr")
    seen.mkdir()
    write_json(real / "flickr30k_val.json", [{"image": "flickr/1.jpg", "caption": ["a"]}])
    write_json(real / "pairs.jsonl", {"image": "p/0.jpg", "caption": "a"})
    save(real, "1.jpg")
    save(seen if beside_the_link else real, "p/0.jpg")
    (seen / "flickr").symlink_to(real)
    (seen / "pairs.jsonl").symlink_to(real / "pairs.jsonl")
    assert captions_of(opened(seen / "flickr", "flickr30k_val")) == {"flickr/1.jpg": ["a"]}
    assert captions_of(opened(seen / "pairs.jsonl", "pairs")) == {"p/0.jpg": ["a"]}


PAIR_FILES = {
    "a.jsonl": '{"image": "p/0.jpg", "caption": "a"}\n\n{"image": "p/1.jpg", "caption": ["b", " "]}\n'
    '{"image": "p/0.jpg", "caption": "c\\nd"}\n',
    "a.csv": '\ufeffimage,caption\np/0.jpg,a\np/1.jpg,b\n./p//0.jpg,"c\nd"\n',  # one picture, spelt unlike
    "a.tsv": 'filepath\tTitle\np/0.jpg\ta\np/1.jpg\tb\np/0.jpg\t"c\nd"\n',
}


@pytest.mark.parametrize("name", PAIR_FILES)
def test_rows_of_one_picture_are_put_together(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(PAIR_FILES[name])
    save(tmp_path, "p/0.jpg", "p/1.jpg")
    assert captions_of(opened(tmp_path / name, "pairs")) == {"p/0.jpg": ["a", "c\nd"], "p/1.jpg": ["b"]}


def test_one_picture_may_be_spelt_in_several_ways(tmp_path: Path) -> None:
    save(tmp_path, "0.jpg")
    (tmp_path / "a.csv").write_text(f"image,caption\n0.jpg,a\n./0.jpg,b\n{tmp_path}//0.jpg,c\nb/../0.jpg,d\n")
    assert captions_of(opened(tmp_path / "a.csv", "pairs")) == {"0.jpg": ["a", "b", "c", "d"]}


def test_the_key_of_pairs_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "0.jpg", "caption": "a", "alt": ["b"], "text": "c"}\n')
    save(tmp_path, "0.jpg")
    assert captions_of(opened(tmp_path / "a.jsonl", "pairs", captions="alt")) == {"0.jpg": ["b"]}
    with pytest.raises(UserError, match=r"line 1: has captions under several keys: caption, text; .*--captions KEY"):
        opened(tmp_path / "a.jsonl", "pairs")
    with pytest.raises(UserError, match=r"line 1: has no captions under 'none', but image, caption, alt, text; "):
        opened(tmp_path / "a.jsonl", "pairs", captions="none")


def pairs_of(path: Path) -> Captions:
    return {Path(file.path).name: texts for file, texts in open_pairs(path, None)}


def test_cells_of_pairs_are_read_as_elsewhere(tmp_path: Path) -> None:
    """What `data build` takes for a list of captions, or for none, is that here too."""
    save(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "a.csv").write_text("image,caption\n0.jpg,\"['a dog', 'a cat']\"\n1.jpg,nan\n2.jpg,[sic]")
    assert pairs_of(tmp_path / "a.csv") == {"0.jpg": ["a dog", "a cat"], "1.jpg": [], "2.jpg": ["[sic]"]}
    (tmp_path / "twice.csv").write_text("image,caption,Caption\n0.jpg,a,b\n")
    with pytest.raises(UserError, match=r"two columns are called caption \(caption, Caption\)"):
        opened(tmp_path / "twice.csv", "pairs")
    (tmp_path / "a.jsonl").write_text('{"image": "0.jpg", "caption": ["a", NaN]}\n{"image": "1.jpg", "caption": NaN}\n')
    assert pairs_of(tmp_path / "a.jsonl") == {"0.jpg": ["a"], "1.jpg": []}


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "a.jsonl", "names no picture"),
        ("[1]\n", "a.jsonl", "line 1: is no JSON object"),
        ('{"image": "0.jpg",\n', "a.jsonl", "line 1: is no JSON: "),
        ('{"photo": "0.jpg", "caption": "a"}', "a.jsonl", "line 1: has no picture under image, .*, but photo, caption"),
        ('{"image": "0.jpg", "alt": "a"}', "a.jsonl", "line 1: has no captions, but image, alt"),
        ('{"image": "0.jpg", "caption": 3}', "a.jsonl", "line 1: caption is neither a text nor a list"),
        ('{"image": "9.jpg", "caption": "a"}', "a.jsonl", "none of its 1 picture, such as 9.jpg, is in "),
        ('{"image": "0.jpg", "alt": "a", "alt": "b"}', "a.jsonl", "line 1: is no JSON: the key 'alt' stands twice"),
        ("image,caption\n0.jpg,a,b\n", "a.csv", "line 2: wrong number of cells: 3, the header has 2"),
        ('image,caption\n0.jpg,"a\n', "a.csv", "line 2: unclosed quote: opened on line 2"),
        ('image,caption\n0.jpg,"a\n1.jpg,a board of 12"\n', "a.csv", "line 2: unclosed quote: opened on line 2"),
        ('image\tcaption\n0.jpg\t"a\n1.jpg\ta board of 12"\n', "a.tsv", "line 2: unclosed quote: opened on line 2"),
        ("image,caption\n", "a.txt", "its name ends with none of .jsonl, .csv, .tsv"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_in_a_line(text: str, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    save(tmp_path, "0.jpg")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}.*{said}.*; rule: .*image") as refusal:
        opened(tmp_path / name, "pairs")
    assert "\n" not in str(refusal.value)


def write_string_caption(root: Path) -> None:
    write_json(root / "flickr30k_val.json", [{"image": "root/1.jpg", "caption": "no list"}])


def write_other_json(root: Path) -> None:
    write_json(root / "annotations/captions_val2017.json", {"images": []})


def without_pictures(write: Callable[[Path], Captions]) -> Callable[[Path], None]:
    def written(root: Path) -> None:
        write(root)
        for path in root.rglob("*.jpg"):
            path.unlink()

    return written


@pytest.mark.parametrize(
    ("dataset", "write", "said"),
    [
        ("coco_val2017", lambda root: None, "no such folder; rule: coco_val2017 is annotations/captions_val2017.json"),
        ("coco_val2017", Path.mkdir, r"no annotations/captions_val2017\.json in it; rule: .*images/val2017"),
        ("coco_val2017", write_other_json, "has no images and annotations of COCO's form \\(no 'annotations'\\)"),
        ("coco_val2017", without_pictures(write_coco), r"none of its 3 pictures, .*, is in .*images/val2017 or "),
        ("coco_karpathy_test", Path.mkdir, r"no annotations/coco_karpathy_test\.json or .*dataset_coco\.json in it"),
        (
            "flickr30k_val",
            Path.mkdir,
            r"no flickr30k_val\.json in it; rule: flickr30k_val\.json, a list of \{\"image\"",
        ),
        ("flickr30k_val", write_string_caption, r"caption of root/1\.jpg is no list of texts.*; rule: flickr30k_val"),
        ("flickr30k_test", without_pictures(write_flickr("test")), r"none of its 2 pictures.*; rule: flickr30k_test"),
        ("webdataset", Path.mkdir, r"no \.tar file in it nor in .*test; rule: .*captions \(\.txt, a line each\)"),
    ],
)
def test_a_wrong_layout_is_refused_with_what_is_expected_where(
    dataset: str, write: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    write(root)
    with pytest.raises(UserError, match=said) as refusal:
        opened(root, dataset)
    assert str(refusal.value).startswith(str(root))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "shards: null must be a folder"),
        ({"dataset": "pairs"}, "data: null must say where the files of pairs lie"),
        ({"dataset": "pairs", "data": "a", "shards": "b"}, "shards: b must be null where dataset is pairs"),
        ({"shards": "a", "data": "b"}, "data: b must be null where dataset is shards"),
        ({"dataset": "coco_val2017", "data": "a", "captions": "b"}, "captions: b must be null where dataset is coco"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match="must") as refusal:
        RetrievalConfig.model_validate({"kind": "retrieval", **keys})
    (details,) = refusal.value.errors()  # type: ignore[attr-defined]
    broken = details["ctx"]["error"]
    assert isinstance(broken, RuleBroken)
    shown = "null" if broken.value is None else broken.value
    assert f"{broken.key}: {shown} {broken.rule}".startswith(said)


def test_a_broken_picture_costs_one_picture_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    write_coco(root)
    (root / "images/val2017/000000000007.jpg").write_bytes(b"\xff\xd8\xff broken")
    (root / "images/val2017/000000000003.jpg").unlink()
    evaluator = make_evaluator(section(root, "coco_val2017"), tiny_encoder().setting)
    numbers = measure(evaluator, tiny_encoder())
    assert (numbers["images"], numbers["texts"], numbers["left_out_damaged"]) == (1, 2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["000000000007.jpg", "000000000003.jpg"]
    assert "No such file" in lines[1]


def test_samples_without_captions_are_counted_apart(tmp_path: Path) -> None:
    members = [{"__key__": f"s{place}", "jpg": picture(place)} for place in range(3)]
    members[1]["txt"] = b"a text\n\n"
    members[2]["txt"] = b"\n"
    write_shard(tmp_path / "0.tar", members)
    gallery = opened(tmp_path, "webdataset")
    (batch,) = gallery.batches(0, 1, 4)
    assert (batch.sample_ids.tolist(), list(batch.texts)) == ([1], [["a text"]])
    assert gallery.left_out == LeftOut(without_captions=2, damaged=0)


def test_ranks_and_batches_do_not_matter(tmp_path: Path) -> None:
    write_webdataset(tmp_path, samples=8)

    def measured(world_size: int, batch: int) -> list[Any]:
        def measures(evaluator: Any, encoder: Any, *others: Any) -> Numbers:
            encoder = tiny_encoder(evaluator.setting.rank, world_size)
            evaluator = make_evaluator(section(tmp_path, "webdataset", batch=batch), encoder.setting)
            return measure_together(evaluator, encoder, *others)

        outcomes = together(tiny_run(), world_size, lambda rank, place: None, measures=measures)
        return [number for outcome in outcomes for number in outcome]

    everything = [
        numbers for world_size in (1, 2, 3) for batch in (1, 5, 64) for numbers in measured(world_size, batch)
    ]
    assert len(everything) == 2 * 3 * (1 + 2 + 3)
    assert everything[0]["images"] == 16
    assert all(numbers == everything[0] for numbers in everything), everything


def test_kept_features_give_the_same_numbers_without_reading_pictures(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_coco(root)
    broken = root / "images/val2017/000000000003.jpg"
    broken.write_bytes(b"broken")
    read: list[int] = []

    def numbers(weights: str = "student of 1", **keys: Any) -> Numbers:
        encoder = tiny_encoder()
        setting = replace(encoder.setting, cache=FeatureCache(tmp_path / "features"))
        encoder = replace(encoder, setting=setting, weights=weights)
        evaluator = make_evaluator(section(root, "coco_val2017", **keys), setting)
        gallery = evaluator._gallery  # type: ignore[attr-defined]
        read_one = gallery.read

        def counted(sample: int) -> Any:
            read.append(sample)
            return read_one(sample)

        gallery.read = counted
        return measure(evaluator, encoder)

    first = numbers()
    assert read == [0, 1, 2]
    assert numbers(batch=1) == first  # from the cache, the picture left out too
    assert len(read) == 3
    assert first["left_out_damaged"] == 1
    numbers("student of 2")
    assert len(read) == 6
    save_picture(broken, 40)  # other data
    assert numbers()["left_out_damaged"] == 0
    assert len(read) == 9
    assert numbers(max_samples=2)["images"] == 2
    assert len(read) == 11


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_clip_benchmarks_own_code_has_the_same_recalls(batch: int, tmp_path: Path) -> None:
    """On one webdataset folder, to 1e-6: its mean of shares is in float32. The scores have no ties."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="needs clip-benchmark")
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
    from torchvision import transforms

    from cosmos_scale.batch import MEAN, STD

    write_webdataset(tmp_path, samples=12)
    encoder = tiny_encoder()
    steps = [
        transforms.Lambda(lambda image: image.convert("RGB")),
        transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    dataset = build_wds_dataset("set", transforms.Compose(steps), split="test", data_dir=str(tmp_path))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=image_captions_collate_fn)
    expected = theirs.evaluate(
        encoder.model, loader, encoder.setting.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    numbers = measure(make_evaluator(section(tmp_path, "webdataset", batch=batch), encoder.setting), encoder)
    assert numbers["images"] == 24
    for k in (1, 5, 10):
        assert numbers[f"text_to_image_R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert numbers[f"image_to_text_R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-6)
