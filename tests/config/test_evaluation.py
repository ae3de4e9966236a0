"""The section `eval`: a list of evaluators, its old form, and every way in which both meet."""

from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.config import RetrievalConfig, RunConfig
from cosmos_scale.config.compare import changed_on_resume
from cosmos_scale.config.evaluation import in_new_form
from cosmos_scale.config.keys import sections
from cosmos_scale.config.load import dump_config, load_config
from cosmos_scale.config.reference import type_in_words
from cosmos_scale.errors import UserError

OLD = "eval: {every: 5, retrieval: {shards: x, batch: 3}}"
NEW = "eval: [{kind: retrieval, every: 5, shards: x, batch: 3}]"
TWO = "eval: [{kind: retrieval, name: coco, every: 7, shards: x}, {kind: retrieval, name: flickr, shards: y}]"


def write(folder: Path, text: str, base: str = "") -> Path:
    (folder / "base.yaml").write_text(f"{base}\n")
    path = folder / "run.yaml"
    path.write_text(f"extends: base.yaml\n{text}\n")
    return path


def short(config: RunConfig) -> list[tuple[str, int, str | None, int]]:
    return [(one.name, one.every, one.shards, one.batch) for one in config.eval if isinstance(one, RetrievalConfig)]


def test_the_old_form_means_one_evaluator(tmp_path: Path) -> None:
    old, new = load_config(write(tmp_path, OLD)), load_config(write(tmp_path, NEW))
    assert old == new
    assert short(new) == [("retrieval", 5, "x", 3)]
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(old))
    assert load_config(copy) == new


@pytest.mark.parametrize("form", [None, {}, {"every": 0}, {"every": 0, "retrieval": None}])
def test_the_old_form_without_pairs_evaluates_nothing(form: Any) -> None:
    assert RunConfig.model_validate(in_new_form({} if form is None else {"eval": form})).eval == ()


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        # Keys of the old form, in a file of the old form, of the new one, and where there is nothing yet.
        (OLD, ["eval.every=20"], [("retrieval", 20, "x", 3)]),
        (NEW, ["eval.every=20", "eval.retrieval.shards=z"], [("retrieval", 20, "z", 3)]),
        (NEW, ["eval={every: 20, retrieval: {batch: 9}}"], [("retrieval", 20, "x", 9)]),
        ("", ["eval.every=2", "eval.retrieval.shards=z"], [("retrieval", 2, "z", 64)]),
        ("", ["eval.retrieval.shards=z", "eval.every=2"], [("retrieval", 2, "z", 64)]),
        ("eval: []", ["eval.every=2", "eval.retrieval.shards=z"], [("retrieval", 2, "z", 64)]),
        ("", ["eval.every=0"], []),
        (OLD, ["eval.retrieval=null", "eval.every=0"], []),
        (NEW, ["eval.retrieval=null"], []),
        # Several evaluators: `every` means all, `retrieval` the one of this name, else the first of this kind.
        (TWO, ["eval.every=0"], [("coco", 0, "x", 64), ("flickr", 0, "y", 64)]),
        (TWO, ["eval.retrieval.batch=2"], [("coco", 7, "x", 2), ("flickr", 0, "y", 64)]),
        (TWO, ["eval.1.name=retrieval", "eval.retrieval.batch=2"], [("coco", 7, "x", 64), ("retrieval", 0, "y", 2)]),
        # Keys of the new form in a file of either.
        (NEW, ["eval.0.every=20"], [("retrieval", 20, "x", 3)]),
        (OLD, ["eval.0.every=20", "eval.0.name=held"], [("held", 20, "x", 3)]),
        (OLD, ["eval=[]"], []),
    ],
)
def test_overrides_of_either_form_meet_files_of_either(
    tmp_path: Path, text: str, overrides: list[str], expected: list[Any]
) -> None:
    assert short(load_config(write(tmp_path, text), overrides)) == expected


@pytest.mark.parametrize(
    ("base", "text", "expected"),
    [
        (OLD, "eval: {every: 15}", [("retrieval", 15, "x", 3)]),
        (NEW, "eval: {every: 15}", [("retrieval", 15, "x", 3)]),
        (NEW, "eval: {retrieval: {shards: z}}", [("retrieval", 5, "z", 3)]),
        (OLD, TWO, [("coco", 7, "x", 64), ("flickr", 0, "y", 64)]),
    ],
)
def test_files_of_either_form_extend_files_of_either(tmp_path: Path, base: str, text: str, expected: list[Any]) -> None:
    assert short(load_config(write(tmp_path, text, base))) == expected


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        # The key as the user wrote it.
        (
            OLD,
            "eval.retrieval.captoins=a",
            "eval.retrieval.captoins: no such key; did you mean eval.retrieval.captions?",
        ),
        (OLD, "eval.every=-1", "eval.every: -1 should be greater than or equal to 0"),
        (OLD, "eval.retrieval=null", "eval.every: 5 needs eval.retrieval, the pairs to evaluate on"),
        ("", "eval.every=5", "eval.every: 5 needs eval.retrieval, the pairs to evaluate on"),
        ("", "eval.retrieval.batch=5", "eval.retrieval.shards: null must be a folder or pattern of .tar files"),
        ("", "eval.retrieval=5", "eval.retrieval: 5 should be an object"),
        (NEW, "eval.0.captoins=a", "eval.0.captoins: no such key; did you mean eval.0.captions?"),
        # What the user's key of the old form means in the file's list.
        (NEW, "eval.every=-1", "eval.0.every: -1 should be greater than or equal to 0"),
        (NEW, "eval.1.every=5", "eval.1.every: '1' must be a position in a list of 1"),
        (OLD, "eval.1.every=5", "eval.1.every: '1' must be a position in a list of 1"),
        (
            NEW,
            "eval.0.kind=clasification",
            "eval.0.kind: \"clasification\" should be one of 'retrieval', 'classification', 'segmentation'",
        ),
        (NEW, "eval=[{shards: x}]", "eval.0.kind: this key is required and missing"),
        (NEW, "eval=[5]", "eval.0: 5 should be an object"),
        # Only keys of the evaluator's own kind are suggested.
        (
            NEW,
            "eval=[{kind: classification, data: x, max_samples: 3}]",
            "eval.0.max_samples: no such key; did you mean eval.0.names?",
        ),
    ],
)
def test_what_is_wrong_is_named_as_it_was_written(tmp_path: Path, text: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), [override])
    assert str(caught.value) == f"command line: {message}"


def test_an_unknown_key_of_the_old_form_gets_a_suggestion(tmp_path: Path) -> None:
    for key, nearest in (("evry", "every"), ("retreival", "retrieval")):
        path = write(tmp_path, f"eval: {{{key}: 5}}")
        with pytest.raises(UserError, match=rf"^{path}: eval\.{key}: 5 .*; did you mean eval\.{nearest}\?$"):
            load_config(path)


@pytest.mark.parametrize("old_over_new", [False, True])
def test_the_file_that_set_a_key_is_named_in_either_form(tmp_path: Path, old_over_new: bool) -> None:
    path = write(tmp_path, "eval: {every: -1}", NEW) if old_over_new else write(tmp_path, OLD.replace("3", "0"))
    with pytest.raises(UserError) as caught:
        load_config(path, [] if old_over_new else ["eval.0.every=2"])
    named = "eval.0.every: -1" if old_over_new else "eval.0.batch: 0"
    assert str(caught.value).startswith(f"{path}: {named} should be greater than")


def test_two_evaluators_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "eval: [{kind: retrieval, shards: x}, {kind: retrieval, shards: y}]")
    with pytest.raises(UserError, match=r'eval\.1\.name: "retrieval" must differ from the name of eval\.0'):
        load_config(path)
    assert [one.name for one in load_config(path, ["eval.1.name=other"]).eval] == ["retrieval", "other"]


def test_evaluators_may_change_on_resume_and_so_may_their_number(tmp_path: Path) -> None:
    none, one, two = (load_config(write(tmp_path, text)) for text in ("", OLD, TWO))
    assert changed_on_resume(none, two) == changed_on_resume(one, two) == changed_on_resume(two, none) == []


def test_a_key_of_several_kinds_is_read_by_one_rule() -> None:
    """An override's value is read by its key alone: as a text, or as YAML."""
    rules: dict[str, set[bool]] = {}
    for section in sections():
        if section.place == "eval.N":
            for name, field in section.type.model_fields.items():
                rules.setdefault(name, set()).add(
                    type_in_words(field.annotation).startswith(("whole", "number", "true"))
                )
    assert [name for name, found in rules.items() if len(found) > 1] == []
