"""Where labelled pictures lie: the published sets as torchvision finds them, folders, shards, and what is refused."""

import errno
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from cosmos_scale.cli.eval_classification import DATASETS
from cosmos_scale.cli.eval_command import section_of
from cosmos_scale.config import ClassificationConfig
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets import published_sets
from cosmos_scale.evaluation.datasets.folders import open_folders
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from cosmos_scale.evaluation.datasets.published_sets import PUBLISHED, open_published
from cosmos_scale.testing.shard_files import picture, write_shard
from tests.evaluation.labelled import (
    ANIMALS,
    noise,
    saver,
    section,
    tiny_encoder,
    write_folders,
    write_labelled_shards,
)

TREES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {}


def tree(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what writes a small set in its own layout and returns it as torchvision has it."""

    def register(write: Callable[..., Any]) -> Callable[..., Any]:
        TREES[name] = write
        return write

    return register


@tree("food101")
def food101(root: Path, patch: pytest.MonkeyPatch) -> Any:
    listed = {"waffles": ["waffles/7", "waffles/8"], "apple_pie": ["apple_pie/1"]}
    save = saver(root / "food-101" / "images")
    for names in listed.values():
        for name in names:
            save(f"{name}.jpg")
    (root / "food-101" / "meta").mkdir()
    (root / "food-101" / "meta" / "test.json").write_text(json.dumps(listed))
    return datasets.Food101(root, split="test")


def cifar(root: Path, patch: pytest.MonkeyPatch, name: str, labels: str, meta: dict[str, Any]) -> Any:
    kind: Any = getattr(datasets, name)
    # The small set's files have other checksums.
    patch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    data = np.stack([noise(number).transpose(2, 0, 1).reshape(-1) for number in range(4)])
    for file, _ in (*kind.train_list, *kind.test_list):
        (folder / file).write_bytes(pickle.dumps({"data": data, labels: [1, 0, 1, 1]}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["airplane", "automobile"], **meta}))
    return kind(root, train=False)


@tree("cifar10")
def cifar10(root: Path, patch: pytest.MonkeyPatch) -> Any:
    return cifar(root, patch, "CIFAR10", "labels", {})


@tree("cifar100")
def cifar100(root: Path, patch: pytest.MonkeyPatch) -> Any:
    return cifar(root, patch, "CIFAR100", "fine_labels", {})


@tree("sun397")
def sun397(root: Path, patch: pytest.MonkeyPatch) -> Any:
    save = saver(root / "SUN397")
    for name in ("a/abbey/sun_b.jpg", "a/abbey/sun_a.jpg", "y/yard/inner/sun_c.jpg"):
        save(name)
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/y/yard/inner\n")
    return datasets.SUN397(root)


@tree("stanford_car")
def stanford_car(root: Path, patch: pytest.MonkeyPatch) -> Any:
    files = pytest.importorskip("scipy.io")
    save = saver(root / "stanford_cars" / "cars_test")
    names = [f"0000{number}.jpg" for number in range(3)]
    for name in names:
        save(name)
    (root / "stanford_cars" / "devkit").mkdir()
    annotations = np.array([(2, names[0]), (1, names[1]), (2, names[2])], dtype=[("class", "i4"), ("fname", "O")])
    files.savemat(root / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    classes = np.array(["Acura RL Sedan 2012", "Volvo XC90 SUV 2007"], dtype=object)
    files.savemat(root / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": classes})
    return datasets.StanfordCars(root, split="test")


@tree("aircraft")
def aircraft(root: Path, patch: pytest.MonkeyPatch) -> Any:
    folder = root / "fgvc-aircraft-2013b" / "data"
    save = saver(folder / "images")
    for name in ("11", "12"):
        save(f"{name}.jpg")
    (folder / "variants.txt").write_text("707-320\nDHC-8-100\n")
    (folder / "images_variant_test.txt").write_text("12 DHC-8-100\n11 707-320\n")
    return datasets.FGVCAircraft(root, split="test", annotation_level="variant")


@tree("dtd")
def dtd(root: Path, patch: pytest.MonkeyPatch) -> Any:
    folder = root / "dtd" / "dtd"
    save = saver(folder / "images")
    names = ["zigzagged/z_1.jpg", "banded/b_1.jpg", "banded/b_2.jpg"]
    for name in names:
        save(name)
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("".join(f"{name}\n" for name in names))
    return datasets.DTD(root, split="test", partition=1)


@tree("pets")
def pets(root: Path, patch: pytest.MonkeyPatch) -> Any:
    folder = root / "oxford-iiit-pet"
    save = saver(folder / "images")
    for name in ("Abyssinian_201", "yorkshire_terrier_9"):
        save(f"{name}.jpg")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "test.txt").write_text("yorkshire_terrier_9 2 2 25\nAbyssinian_201 1 1 1\n")
    return datasets.OxfordIIITPet(root, split="test")


@tree("caltech101")
def caltech101(root: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(published_sets, "CALTECH_PICTURES", 7)
    patch.setattr(published_sets, "CALTECH_FIRST", 3)
    save = saver(root / "caltech101" / "101_ObjectCategories")
    for name, count in (("BACKGROUND_Google", 2), ("accordion", 4), ("Faces", 3)):
        for number in range(count):
            save(f"{name}/image_{number + 1:04d}.jpg")
    whole = datasets.Caltech101(root)
    generator = torch.Generator().manual_seed(3072)
    return torch.utils.data.random_split(whole, [3, 4], generator=generator)[1]


@tree("flowers")
def flowers(root: Path, patch: pytest.MonkeyPatch) -> Any:
    files = pytest.importorskip("scipy.io")
    patch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: Path(path).is_file())
    folder = root / "flowers-102"
    save = saver(folder / "jpg")
    for number in range(1, 6):
        save(f"image_{number:05d}.jpg")
    files.savemat(folder / "imagelabels.mat", {"labels": np.array([3, 1, 2, 1, 3])})
    files.savemat(folder / "setid.mat", {"trnid": [1], "valid": [2], "tstid": [5, 3, 4]})
    return datasets.Flowers102(root, split="test")


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_pictures_and_labels_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    theirs = TREES[dataset](tmp_path, monkeypatch)
    ours = open_published(section(tmp_path, dataset=dataset))
    setting = tiny_encoder().setting
    pairs = [(ours.pixels(place, setting)[:, :, :3], ours.labels[place]) for place in range(len(ours))]
    expected = [(np.asarray(image.convert("RGB")), label) for image, label in (theirs[i] for i in range(len(theirs)))]
    if dataset == "sun397":  # in the order of paths, not of the file system
        expected.sort(key=lambda pair: [np.array_equal(pair[0], pixels) for pixels, _ in pairs].index(True))
    assert len(ours) == len(expected) >= 2
    for (pixels, label), (their_pixels, their_label) in zip(pairs, expected, strict=True):
        assert np.array_equal(pixels, their_pixels)
        assert label == their_label
    assert ours.describe() == open_published(section(tmp_path, dataset=dataset)).describe()


def test_the_lists_of_sets_are_one() -> None:
    assert {*PUBLISHED, "folders", "webdataset", "imagenet"} == set(DATASETS)
    assert PUBLISHED.keys() == TREES.keys()


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_a_folder_without_the_set_is_told_what_was_expected(tmp_path: Path, dataset: Any) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError) as caught:
        open_published(section(tmp_path, dataset=dataset))
    assert str(caught.value).startswith(f"{tmp_path}: not the files of {dataset} (")
    assert f"; rule: {dataset} is {PUBLISHED[dataset].tree}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "download" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # torchvision would make folders
    with pytest.raises(UserError, match=f"^{tmp_path}/b: no such folder; rule: {dataset} is "):
        open_published(section(tmp_path / "b", dataset=dataset))


def test_a_split_file_says_which_pictures_of_sun397_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sun397(tmp_path, monkeypatch)
    split = tmp_path / "Testing_01.txt"

    def opened(text: str) -> Any:
        split.write_text(text)
        return open_published(section(tmp_path, dataset="sun397", split=str(split)))

    found = opened("/y/yard/inner/sun_c.jpg\n/a/abbey/sun_b.jpg\n\n")
    assert [found.name(place) for place in range(2)] == ["SUN397/y/yard/inner/sun_c.jpg", "SUN397/a/abbey/sun_b.jpg"]
    assert list(found.labels) == [1, 0]
    with pytest.raises(UserError, match=rf"^{split}: line 1: /a/sun_z.jpg: no such picture below {tmp_path}/SUN397$"):
        opened("/a/sun_z.jpg\n")
    with pytest.raises(UserError, match="names no picture; rule: a path a line"):
        opened("\n")
    with pytest.raises(UserError, match=r"^--split: x must be null where dataset is not sun397$"):
        section_of("classification", {"data": str(tmp_path), "split": "x"})


def test_caltech101_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        caltech101(tmp_path, patch)
    with pytest.raises(UserError, match=r"101_ObjectCategories: 7 pictures; rule: 8,677, of which a seed draws"):
        open_published(section(tmp_path, dataset="caltech101"))


def test_imagenet_wants_a_thousand_wnids(tmp_path: Path) -> None:
    write_folders(tmp_path / "few", [1, 1], ["n00000001", "n00000002"])
    with pytest.raises(UserError, match=rf"^{tmp_path}/few: 2 folders; rule: 1,000 folders named by wnids"):
        open_labelled_set(section(tmp_path / "few", dataset="imagenet"))
    write_folders(tmp_path / "names", [1, 1])
    with pytest.raises(UserError, match="its folder bird is no wnid; rule: 1,000 folders"):
        open_labelled_set(section(tmp_path / "names", dataset="imagenet"))
    wnids = [f"n{number:08d}" for number in range(1000)]
    write_folders(tmp_path / "all", [1], wnids)
    for wnid in wnids[1:]:
        (tmp_path / "all" / wnid).mkdir()
    found = open_labelled_set(section(tmp_path / "all", dataset="imagenet"))
    assert (len(found.names), found.names[0], len(found.templates)) == (1000, ("tench",), 80)


def test_folders_have_names_of_a_file_or_their_own(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set", [1, 2])
    found = open_labelled_set(section(root))
    assert found.names == (("bird",), ("blue whale",))
    assert found.templates == ("a photo of a {}.",)
    (root / "classnames.txt").write_text("a bird, birds\r\nwhale\n\n")
    (root / "templates.txt").write_text("{}\nthe {c}!\n")
    found = open_labelled_set(section(root))
    assert found.names == (("a bird", "birds"), ("whale",))
    assert found.templates == ("{}", "the {}!")
    other = tmp_path / "other.txt"
    other.write_text("x\ny\n")
    assert open_labelled_set(section(root, classes=str(other), templates=str(root / "templates.txt"))).names[1] == (
        "y",
    )


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("classnames.txt", "bird\n", r"names 1 class, but \S+ has 2 \(bird, blue_whale\); rule: a line for each class"),
        (
            "classnames.txt",
            "Blue whale\nbird\n",
            "line 1 is 'Blue whale', but folder 1 is 'bird'; rule: the",
        ),
        ("classnames.txt", "\n", "is empty; rule: a class a line"),
        ("classnames.txt", "bird\n\nwhale\n", "line 2 is empty; rule: a class a line"),
        ("templates.txt", "a photo\n", "line 1: 'a photo' has no place for the name; rule: {} or {c}"),
    ],
)
def test_texts_that_do_not_match_are_refused(tmp_path: Path, file: str, text: str, said: str) -> None:
    root = write_folders(tmp_path, [1, 2])
    (root / file).write_text(text)
    with pytest.raises(UserError, match=f"^{root}/{file}: {said if '(' in said else re.escape(said)}"):
        open_labelled_set(section(root))


def test_pictures_of_any_form_are_found_and_folders_of_programs_are_none(tmp_path: Path) -> None:
    """What cannot be read must be left out and counted, not passed over."""
    for name in (
        "a/0.JFIF",
        "a/1.heic",
        "a/._0.jpg",
        "a/notes.txt",
        "b/0.WebP",
        ".ipynb_checkpoints/0.jpg",
        "@eaDir/0.jpg",
        "a/@eaDir/0.jpg/thumbnail.jpg",
        *("lost+found/0.jpg", "#recycle/a/0.jpg", "$RECYCLE.BIN/S-1-5-21/0.jpg", "System Volume Information/0.jpg"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = open_folders(section(tmp_path))
    assert [found.name(place) for place in range(len(found))] == ["a/0.JFIF", "a/1.heic", "b/0.WebP"]
    assert (list(found.labels), list(found.classes)) == ([0, 0, 1], ["a", "b"])


def test_links_to_folders_are_followed_and_those_that_run_in_a_circle_add_nothing(tmp_path: Path) -> None:
    """Followed as often as the system lets one, a circle would count a class's pictures 41 times."""
    for name in ("set/a/0.jpg", "set/a/z/3.jpg", "set/b/1.jpg", "elsewhere/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    links = {"set/b/more": "elsewhere", "set/a/all": "set/a", "elsewhere/back": "set/b", "set/a/root": "/"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "set/itself").symlink_to("itself")
    found = open_folders(section(tmp_path / "set"))
    assert [found.name(place) for place in range(len(found))] == ["a/0.jpg", "a/z/3.jpg", "b/1.jpg", "b/more/2.jpg"]
    assert (list(found.labels), list(found.classes)) == ([0, 0, 1, 1], ["a", "b"])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over, its pictures would be missing from the numbers without a word."""
    (tmp_path / "a" / "closed").mkdir(parents=True)
    listdir = os.listdir

    def closed(folder: str) -> list[str]:
        if folder.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(UserError, match="a/closed: the folder cannot be listed: Permission denied"):
        open_folders(section(tmp_path))


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    rule = "rule: a folder for each class, with its pictures in it"
    with pytest.raises(UserError, match=f"^{tmp_path}/no: no such folder; {rule}$"):
        open_labelled_set(section(tmp_path / "no"))
    with pytest.raises(UserError, match=f"^{tmp_path}: has no folder in it; {rule}$"):
        open_labelled_set(section(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}: no picture in its 1 folder; {rule}$"):
        open_labelled_set(section(tmp_path))


def test_parts_of_a_set_are_no_classes(tmp_path: Path) -> None:
    write_folders(tmp_path / "val", [1, 1])
    with pytest.raises(
        UserError, match=f"^{tmp_path}: its folder val is no class, but a part of a set with folders in it"
    ):
        open_labelled_set(section(tmp_path))
    write_folders(tmp_path / "Train", [1, 1])
    with pytest.raises(UserError, match=f"^{tmp_path}: its folders Train, val are no class, .*; name one part$"):
        open_labelled_set(section(tmp_path))
    assert len(open_labelled_set(section(tmp_path / "val")).names) == 2
    write_folders(tmp_path, [1])  # a class beside them, or a picture directly in one: then they are classes
    assert len(open_labelled_set(section(tmp_path)).names) == 3


def test_shards_have_labels_and_lines_have_one_name(tmp_path: Path) -> None:
    root = write_labelled_shards(tmp_path, [2] * 11)
    (root / "classnames.txt").write_text("a, b\n" + "c\n" * 6)
    (root / "test" / "._0.tar").write_bytes(b"\0\5\x16\7")  # as a Mac leaves it beside each file
    found = open_labelled_set(section(root, dataset="webdataset"))
    assert list(found.pictures.labels) == [place % 7 for place in range(22)]
    assert found.pictures.name(21) == "test/10.tar: s0021"  # behind 9.tar
    assert found.names[0] == ("a, b",)  # as clip-benchmark reads the line
    assert found.templates == ("a photo of a {}.", "a drawing of the {}.")
    image = Image.open(io.BytesIO(picture(20))).convert("RGB")
    assert np.array_equal(found.pictures.pixels(20, tiny_encoder().setting)[:, :, :3], np.asarray(image))
    (root / "zeroshot_classification_templates.txt").rename(root / "templates.txt")
    assert open_labelled_set(section(root, dataset="webdataset")).names[0] == ("a", "b")


def test_a_sample_without_a_label_is_damaged_and_wrong_shards_are_refused(tmp_path: Path) -> None:
    def opened(config: ClassificationConfig) -> Any:
        return open_labelled_set(config).pictures

    config = section(tmp_path, dataset="webdataset")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}: no .tar file in it nor in {tmp_path}/test; rule: a folder with"
    ):
        opened(config)
    shard = write_shard(tmp_path / "0.tar", [{"__key__": "a", "jpg": picture(0)}, {"__key__": "b", "cls": b"0"}])
    with pytest.raises(UserError, match=rf"^{tmp_path}/classnames.txt: no such file; rule: .*--classes FILE"):
        opened(config)
    (tmp_path / "classnames.txt").write_text("".join(f"{name}\n" for name in ANIMALS))
    with pytest.raises(UserError, match=f"^{tmp_path}: no sample has a label; rule: "):
        opened(config)
    write_shard(shard, [{"__key__": "a", "jpg": picture(0)}, {"__key__": "b", "cls": b"6\n", "png": picture(1)}])
    pictures = opened(config)
    assert list(pictures.labels) == [-1, 6]
    with pytest.raises(DamagedSample, match=r"it has no label \(.cls\)"):
        pictures.pixels(0, tiny_encoder().setting)
    for label in (b"7", b"-1", b"bird"):
        write_shard(shard, [{"__key__": "a", "jpg": picture(0), "cls": label}])
        with pytest.raises(UserError, match=r"0.tar: a.cls: '\S+' is no label; rule: a number from 0 to 6, the line"):
            opened(config)
    shard.write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=rf"^{shard}: is no readable .tar file: "):
        opened(config)
