"""Names and templates of the published sets: how many, in which order, and that they are those of their sources."""

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from cosmos_scale.cli.eval_classification import DATASETS
from cosmos_scale.evaluation.prompts.texts import filled_in, published_names, published_templates

# Classes and templates of each set; the name of clip-benchmark for it.
SETS = {
    "imagenet": (1000, 80, "imagenet1k"),
    "food101": (101, 1, "food101"),
    "cifar10": (10, 18, "cifar10"),
    "cifar100": (100, 18, "cifar100"),
    "sun397": (397, 2, "sun397"),
    "stanford_car": (196, 8, "cars"),
    "aircraft": (100, 2, "fgvc_aircraft"),
    "dtd": (47, 8, "dtd"),
    "pets": (37, 1, "pets"),
    "caltech101": (101, 34, "caltech101"),
    "flowers": (102, 1, "flowers"),
}


@pytest.mark.parametrize("dataset", SETS)
def test_each_class_has_one_name_and_each_template_one_place(dataset: str) -> None:
    classes, count, _ = SETS[dataset]
    names, templates = published_names(dataset), published_templates(dataset)
    assert (len(names), len(templates)) == (classes, count)
    twice = {"missile", "sunglasses"} if dataset == "imagenet" else set()
    assert {name for (name, *_), times in Counter(names).items() if times > 1} == twice
    assert all(len(of_class) == 1 for of_class in names)
    assert all(name == name.strip() and name for (name,) in names)
    assert all(template.count("{}") == 1 for template in templates)


def test_every_published_set_has_names() -> None:
    assert {"folders", "webdataset", *SETS} == set(DATASETS)


def test_only_the_published_spelling_of_pets_differs() -> None:
    for dataset in SETS:
        pairs = zip(published_names(dataset), published_names(dataset, "published"), strict=True)
        wrong = [(right, published) for (right,), (published,) in pairs if right != published]
        expected = [("Persian", "Persian'"), ("Yorkshire Terrier", "Yorkshire Terrie")]
        assert wrong == (expected if dataset == "pets" else [])


@pytest.mark.parametrize("dataset", SETS)
def test_names_and_templates_are_clip_benchmarks(dataset: str) -> None:
    package = find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs clip-benchmark")
    folder = Path(package.submodule_search_locations[0]) / "datasets"
    theirs = SETS[dataset][2]
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())[theirs]
    assert [template.replace("{c}", "{}") for template in templates] == list(published_templates(dataset))
    names = json.loads((folder / "en_classnames.json").read_text()).get(theirs)
    if dataset == "caltech101":
        assert names.pop(0) == "background"
    assert names in (None, [name for (name,) in published_names(dataset)])


def test_all_templates_of_the_first_name_come_first() -> None:
    assert filled_in(["cat", "dog"], ["a {}.", "the {}"]) == ["a cat.", "the cat", "a dog.", "the dog"]


def test_the_licence_of_the_sources_is_in_the_package() -> None:
    notice = Path(__file__).parents[2] / "cosmos_scale" / "evaluation" / "prompts" / "NOTICE.txt"
    assert all(owner in notice.read_text() for owner in ("2021 OpenAI", "2022, Mehdi Cherti", "MIT License"))
