"""Names of a file against what the data calls its classes: what is refused, what is doubtful, what is only shown."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from cosmos_scale.config import SegmentationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from cosmos_scale.evaluation.evaluator import measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.prompts.class_pairs import ClassPairs, DataNames, alike_names, pair_names
from cosmos_scale.evaluation.prompts.texts import published_names, read_names
from cosmos_scale.evaluation.segmentation.names import public_names
from cosmos_scale.set_names import MaskedSet
from cosmos_scale.testing.shard_files import picture, write_shard
from tests.evaluation.labelled import ANIMALS, section, tiny_encoder, write_folders
from tests.evaluation.segmentation.own_set import OwnSet

FILE = Path("names.txt")


def paired(folders: str, lines: str) -> ClassPairs:
    """Compare lines with folders, both separated by semicolons."""
    names = {label: (name,) for label, name in enumerate(folders.split(";"))}
    of_lines = tuple(tuple(line.split(", ")) for line in lines.split(";"))
    return pair_names(FILE, of_lines, DataNames("folder", names, "rule: the order of the folders"))


@pytest.mark.parametrize(
    ("folders", "lines", "shown"),
    [
        ("blue_whale;cat", "Blue-Whale;cat, a kitten", ""),
        ("bird;blue_whale", "a bird, birds;whale", "bird is 'a bird', blue_whale is 'whale'"),
        ("n01440764;n01443537", "tench;goldfish", "n01440764 is 'tench', n01443537 is 'goldfish'"),
        ("0;1;2;3", "zero;one;two;three", "0 is 'zero', 1 is 'one', 2 is 'two', ..."),
        # Homonyms: a dog and a garment.
        ("cardigan;cat;dog;fox", "Cardigan Welsh corgi, cardigan;cat;dog;cardigan", "cardigan is"),
    ],
)
def test_names_that_may_be_right_are_only_shown(folders: str, lines: str, shown: str) -> None:
    found = paired(folders, lines)
    assert found.doubt == ""
    assert found.shown.startswith(shown)
    assert bool(found.shown) == bool(shown)


@pytest.mark.parametrize(
    ("folders", "lines", "said"),
    [
        ("bird;blue_whale", "Blue whale;bird", "line 1 is 'Blue whale', but folder 1 is 'bird'"),
        # One class is missing and another one is there instead: all between them move.
        ("ant;bird;cat;dog", "ant;cat;dog;elk", "line 3 is 'dog', but folder 3 is 'cat'"),
        ("ant;bird;cat;dog", "an ant;cat, feline;the bird, bird;dog", "line 2 is 'cat', but folder 2 is 'bird'"),
    ],
)
def test_lines_of_other_classes_are_refused(folders: str, lines: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        paired(folders, lines)
    assert str(refused.value) == f"names.txt: {said}; rule: the order of the folders"


def test_lines_of_another_set_are_doubtful() -> None:
    found = paired("bird;blue_whale;cat", "car;lorry;bus")
    assert found.doubt == (
        "names.txt: line 1 is 'car', but folder 1 is 'bird', and 3 lines of 3 may be of other classes; rule: the order "
        "of the folders"
    )
    assert found.shown == "bird is 'car', blue_whale is 'lorry', cat is 'bus'"
    assert "line 3 is 'hound', but folder 3 is 'dog', and 1 line" in paired("bird;cat;dog", "bird;dog;hound").doubt


def test_parts_of_a_set_with_all_pictures_in_one_folder_are_doubtful_as_classes(tmp_path: Path) -> None:
    """As competitions hand them out: train/, test/ and a table of the labels. Two classes may be called so, though."""
    root = write_folders(tmp_path / "set", [1, 1], ["Train", "test"])
    assert open_labelled_set(section(root)).pairs.doubt == (
        f"{root}: its folders are Train, test: called as parts of a set are, and taken for classes; rule: --data names "
        "the folder of the classes' folders"
    )
    (root / "test").rename(root / "tent")
    assert open_labelled_set(section(root)).pairs.doubt == ""


def test_doubt_and_pairs_reach_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "set", [1, 1])
    (root / "classnames.txt").write_text("car\nlorry\n")
    evaluator = make_evaluator(section(root), tiny_encoder().setting)
    assert capsys.readouterr().err.startswith(f"doubtful names: {root}/classnames.txt: line 1 is 'car', but folder 1")
    make_evaluator(section(root), tiny_encoder(1, 2).setting)
    assert capsys.readouterr().err == ""  # rank 0 has said it
    numbers = {"pictures": 2, "classes": 2, "top1": 0, "top5": 1, "mean_per_class": 0, "chance_top1": 0.5}
    caption = evaluator.table({"student": {**numbers, "pictures_left_out": 0}}, "").caption
    assert str(caption).endswith("; bird is 'car', blue_whale is 'lorry'")


def test_folders_of_one_name_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path / "set", [1, 1, 1], ["Red ball", "cat", "red_ball"])
    make_evaluator(section(root), tiny_encoder().setting)
    assert capsys.readouterr().err == (
        f"doubtful names: {root}: folders Red ball and red_ball are 'Red ball', so that 1 class of 3 cannot be told "
        "from another; rule: classnames.txt or --classes FILE names the classes\n"
    )
    make_evaluator(section(root), tiny_encoder(1, 2).setting)
    (root / "classnames.txt").write_text("red ball, ball\ncat\nred balloon, ball\n")
    make_evaluator(section(root), tiny_encoder().setting)
    assert capsys.readouterr().err == ""


def test_equal_lines_are_told_and_keep_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = OwnSet(tmp_path / "own")
    (tmp_path / "own/names.txt").write_text("dog\nsky, wall\ncat\n Wall,  sky\ndog, hound\n")
    evaluator = make_evaluator(own.section(background=False, per_class=True), tiny_encoder().setting)
    assert capsys.readouterr().err == (
        f"doubtful names: {tmp_path}/own/names.txt: lines 2 and 4 are 'sky', so that 1 class of 5 cannot be told from "
        "another; rule: a line a class, in the masks' order\n"
    )
    numbers = measure(evaluator, tiny_encoder())
    of_classes = [name for name in numbers if name.startswith("IoU_")]
    assert of_classes == ["IoU_dog (label 0)", "IoU_sky", "IoU_cat", "IoU_ Wall", "IoU_dog (label 4)"]
    root = write_folders(tmp_path / "set", [1, 1, 1], ["ant", "bee", "cat"])
    (root / "classnames.txt").write_text("ant\nbee\nbee\n")
    alike = open_labelled_set(section(root)).pairs.alike
    assert alike.startswith(f"{root}/classnames.txt: lines 2 and 3 are 'bee', so that 1 class of 3 cannot")


@pytest.mark.parametrize("dataset", get_args(MaskedSet))
def test_copied_lists_of_public_sets_are_not_doubtful(tmp_path: Path, dataset: MaskedSet) -> None:
    """Not even COCO-Object's, whose background is called "bed" too."""
    names = public_names(dataset, "corrected")
    assert alike_names("", names, range(len(names)), "") == ""


@pytest.mark.parametrize(
    ("form", "first", "count", "said"),
    [
        ("{}", 0, 12, "line 3 is 'name c', for folder 10, but by its number that is the line of folder 2"),
        ("class_{}", 1, 10, "line 2 is 'name b', for folder class_10, but by its number that is the line of folder c"),
        ("{}", 0, 10, ""),
        ("{:02}", 1, 12, ""),
    ],
)
def test_folders_whose_numbers_have_another_order_are_told(
    tmp_path: Path, form: str, first: int, count: int, said: str
) -> None:
    """As ImageNetV2's 0 to 999: sorted as texts, so that a list in the order of the numbers names other classes."""
    folders = [form.format(first + number) for number in range(count)]
    root = write_folders(tmp_path, [1] * count, folders)
    (root / "classnames.txt").write_text("".join(f"name {letter}\n" for letter in "abcdefghijkl"[:count]))
    doubt = open_labelled_set(section(root)).pairs.doubt
    assert doubt.startswith(f"{root}/classnames.txt: {said}" if said else "")
    assert bool(doubt) == bool(said)
    (root / "classnames.txt").write_text("".join(f"{folder}\n" for folder in sorted(folders)))
    assert open_labelled_set(section(root)).pairs.doubt == ""


def test_wnids_without_names_are_told(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [1, 1], ["n01440764", "n01443537"])
    doubt = open_labelled_set(section(root)).pairs.doubt
    assert "its folder n01440764 is a wnid and no name, so a text is 'a photo of a n01440764.'" in doubt
    assert "--dataset imagenet" not in doubt  # which takes all 1,000 alone


def test_folders_whose_names_are_no_text_are_told(tmp_path: Path) -> None:
    """As archives of a Chinese Windows unpack: the model would be asked for a text that means nothing."""
    root = write_folders(tmp_path, [1, 1], ["a cat", os.fsdecode("大象".encode("gbk"))])
    assert open_labelled_set(section(root)).pairs.doubt == (
        f"{root}: the name of its folder \\xb4\\xf3\\xcf\\xf3 is no utf-8 text, so it cannot mean its class; "
        "rule: classnames.txt or --classes FILE names the classes"
    )
    (root / "classnames.txt").write_text("a cat\n大象\n", encoding="utf-8")
    assert "text, so it cannot" not in open_labelled_set(section(root)).pairs.doubt


def test_json_of_shards_names_their_classes(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("".join(f"{name}\n" for name in ANIMALS))
    config = section(tmp_path, dataset="webdataset")

    def shard(*classes: tuple[int, bytes]) -> None:
        samples = [
            {"__key__": f"s{place}", "jpg": picture(place), "cls": str(label).encode(), "json": document}
            for place, (label, document) in enumerate(classes)
        ]
        write_shard(tmp_path / "0.tar", samples)

    def names(name: str) -> bytes:
        return json.dumps({"Class Name": name}).encode()

    shard((0, names("bird")), (1, names("Blue Whale, Balaenoptera")), (2, b"{"), (3, b'{"class": 3}'))
    assert open_labelled_set(config).pairs == ClassPairs("", "")
    shard((0, names("blue_whale")), (1, names("bird")))
    with pytest.raises(
        UserError, match="line 1 is 'bird', but by the shards' json class 1 is 'blue_whale'; rule: line"
    ):
        open_labelled_set(config)


def test_public_sets_know_their_classes(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    wnids = [f"n{number:08d}" for number in range(1000)]
    for wnid in wnids:
        (tmp_path / "imagenet" / wnid).mkdir(parents=True)
    (tmp_path / "imagenet" / wnids[0] / "a.jpg").write_bytes(picture(0))
    of_imagenet = [names[0] for names in published_names("imagenet")]
    for dataset in ("imagenet", "folders"):
        config = section(tmp_path / "imagenet", dataset=dataset, classes=str(file))
        file.write_text("".join(f"{name}\n" for name in of_imagenet))
        assert open_labelled_set(config).pairs == ClassPairs("", "")
        file.write_text("".join(f"{name}\n" for name in sorted(of_imagenet)))
        with pytest.raises(
            UserError, match=r"line 1 is .*, but folder 1 is 'n00000000'; rule: the lines have the order"
        ):
            open_labelled_set(config)
    voc = tmp_path / "voc"
    for folder, name in (
        ("JPEGImages", "a.jpg"),
        ("SegmentationClass", "a.png"),
        ("ImageSets/Segmentation", "val.txt"),
    ):
        (voc / folder).mkdir(parents=True)
        (voc / folder / name).write_text("a\n")
    names = [", ".join(of_class) for of_class in public_names("voc20", "corrected")]
    file.write_text("".join(f"{name}\n" for name in [*names[1:], names[0]]))
    public = SegmentationConfig(kind="segmentation", dataset="voc20", data=str(voc), classes=str(file))
    with pytest.raises(
        UserError, match=f"line 1 is .*, but voc20's class 1 is '{names[0].split(', ')[0]}'; rule: a line"
    ):
        make_evaluator(public, tiny_encoder().setting)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 background\n1 cat\n", "line 1 is '0 background', and each line has a number beside the name"),
        ("7: road\n8: sidewalk\n11: building\n23: sky\n24: a\n25: b\n26: c\n", "each line has a number"),
        ("n01440764 tench, Tinca\nn01443537 goldfish\n", "each line has a wnid beside the name"),
        ("road, 128, 64, 128\nsky (70, 130, 180)\n", "each line has a colour beside the name"),
    ],
)
def test_numbers_beside_names_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "names.txt"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        read_names(file)
    assert said in str(refused.value)
    assert "; rule: names alone, such as '" in str(refused.value)


@pytest.mark.parametrize(
    "text", ["0\n1\n2\n", "1 apple\n2 apples\n3 apples\n", "2012 Tesla\n2007 Audi\n", "707-320\n727-200\n", "0 cats\n"]
)
def test_names_with_numbers_are_names(tmp_path: Path, text: str) -> None:
    file = tmp_path / "names.txt"
    file.write_text(text)
    assert [names[0] for names in read_names(file)] == text.splitlines()
