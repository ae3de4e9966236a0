"""The home folder and variables in paths: every path key of a config and what stays as it is written."""

import argparse
import re
from pathlib import Path

import pytest

from cosmos_scale.cli.arguments import path, place, run_file
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.config.keys import sections, with_positions_named
from cosmos_scale.config.load import load_config, make_config
from cosmos_scale.config.paths import PATH_KEYS, expand_path
from cosmos_scale.config.section import Place, redact_urls
from cosmos_scale.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", "/disk")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path / "home"


def test_home_and_variables_are_put_in(home: Path) -> None:
    assert expand_path("~") == str(home)
    assert expand_path("~/runs") == f"{home}/runs"
    assert expand_path("$DISK/${DISK}-2/{0..3}.tar") == "/disk//disk-2/{0..3}.tar"
    assert expand_path("a~b/~") == "a~b/~"


@pytest.mark.parametrize(
    "text", ["https://h/~user/$x.tar", "s3://b/$x", "pipe:cat $NOT_SET/~/{0..3}.tar", "a$", "$(x)"]
)
def test_urls_commands_and_lone_signs_stay(text: str) -> None:
    assert expand_path(text) == text


def test_a_path_that_exists_is_that_path(tmp_path: Path) -> None:
    (tmp_path / "$NOT_SET").mkdir()
    assert expand_path(f"{tmp_path}/$NOT_SET") == f"{tmp_path}/$NOT_SET"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/a/$NOT_SET/b", "/a/$NOT_SET/b: $NOT_SET is not set; rule: set the variable, or write the path out"),
        ("${NOT_SET}", "${NOT_SET}: $NOT_SET is not set"),
        ("~no-such-user/x", "~no-such-user/x: ~no-such-user has no home folder"),
    ],
)
def test_what_is_not_there_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        expand_path(text)
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(said)):
        path(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/no/runs\r", "/no/runs: '\\r' stands behind the path, which does not show; rule: take it out"),
        ("~/runs\xa0", "~/runs: '\\xa0' stands behind the path"),
        ("/no/{0..3}.tar\u200b", "/no/{0..3}.tar: '\\u200b' stands behind the path"),
        ("\u202a/no/runs", "/no/runs: '\\u202a' stands before the path"),
        ("/no/folded\n", "/no/folded: '\\n' stands behind the path"),
    ],
)
def test_a_sign_that_does_not_show_makes_no_second_path(text: str, said: str) -> None:
    """As a script with Windows line ends, or a text copied from a page, has them."""
    with pytest.raises(UserError, match=re.escape(said)):
        expand_path(text)
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(said)):
        path(text)
    with pytest.raises(UserError, match=re.escape(f"command line: output: {said}")):
        make_config({}, [f"output={text}"])
    with pytest.raises(UserError, match=re.escape(said)):
        run_file(text)


def test_a_sign_that_does_not_show_makes_no_second_url() -> None:
    said = "https://h/{0..3}.tar?***: '\\r' stands behind the path, which does not show"
    with pytest.raises(UserError, match=re.escape(f"command line: data.sources.0.shards: {said}")):
        make_config({}, ["data.sources=[{name: s}]", "data.sources.0.shards=https://h/{0..3}.tar?key=x\r"])
    assert expand_path("pipe:cat a.tar\n") == "pipe:cat a.tar\n"  # as YAML's block text ends


def test_signs_that_show_or_exist_are_taken(tmp_path: Path) -> None:
    (tmp_path / "runs\r").mkdir()
    for text in (
        f"{tmp_path}/runs\r",
        "/no/a ",
        "/no/\u0645\u200c",
        "/no/\u0645\u06cc\u200c\u0631",
        "/no/\u00e9",
        "pipe:cat a\n",
        "",
    ):
        assert expand_path(text) == text


def test_options_are_put_in_too(home: Path) -> None:
    assert path("~/a") == home / "a"
    assert place("$DISK/{0..3}.tar") == "/disk/{0..3}.tar"


def test_every_path_key_of_a_run(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "extends: $HOME/base.yaml\noutput: ~/runs\ninit_from: $DISK/old\n"
        "data: {sources: [{name: $DISK, shards: ~/a}], remote: {cache: ~/cache}}\n"
        "eval: {every: 1, retrieval: {shards: $DISK/held, index: ~/held}}\n"
    )
    home.mkdir()
    (home / "base.yaml").write_text("seed: 7\n")
    config = load_config(tmp_path / "run.yaml", ["data.sources.0.index=${DISK}/index"])
    assert (config.seed, config.output, config.init_from) == (7, home / "runs", Path("/disk/old"))
    (source,) = config.data.sources
    assert (source.name, source.shards, source.index) == ("$DISK", f"{home}/a", "/disk/index")
    assert config.data.remote.cache == home / "cache"
    (gallery,) = config.eval
    assert isinstance(gallery, RetrievalConfig)
    assert (gallery.shards, gallery.index) == ("/disk/held", f"{home}/held")
    assert make_config({"resume": "~/runs/a"}).resume == f"{home}/runs/a"


def test_an_unset_variable_is_one_line_with_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: $NOT_SET/runs\n")
    with pytest.raises(UserError) as refusal:
        load_config(file)
    assert str(refusal.value).startswith(f"{file}: output: $NOT_SET/runs: $NOT_SET is not set; rule: ")
    file.write_text("extends: $NOT_SET/base.yaml\n")
    with pytest.raises(UserError, match=r"run\.yaml: extends: \$NOT_SET/base\.yaml: \$NOT_SET is not set"):
        load_config(file)
    file.write_text("eval: {every: 1, retrieval: {shards: a}}\n")
    with pytest.raises(UserError, match=r"^command line: eval\.retrieval\.shards: ~no-such-user: "):
        load_config(file, ["eval.retrieval.shards=~no-such-user"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output=s3://bucket/x", "output: a URL (s3://...) is given; rule: a path of this machine"),
        ("output=$BUCKET/x", "output: a URL (s3://...) is given"),
        ("output=pipe:cat", "output: a command (pipe:...) is given"),
        ("resume=https://user:word@h/x", "resume: a URL (https://...) is given"),
        ("init_from=hf://a/b", "init_from: a URL (hf://...) is given"),
        ("data.remote.cache=simplecache::s3://b", "data.remote.cache: a URL (simplecache::s3://...) is given"),
        ("eval=[{kind: classification, dataset: cifar10, every: 1, data: gs://b/c}]", "eval.0.data: a URL (gs://...)"),
        ("eval=[{kind: segmentation, every: 1, images: s3://b, masks: /m}]", "eval.0.images: a URL (s3://...)"),
    ],
)
def test_a_url_where_only_a_path_works_is_one_line(override: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    with pytest.raises(UserError, match=f"^command line: {re.escape(said)}"):
        make_config({}, [override])


def test_a_config_that_extends_a_url_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("extends: https://h/base.yaml\n")
    with pytest.raises(UserError, match=r"run\.yaml: extends: a URL \(https://\.\.\.\) is given; rule: a path"):
        load_config(file)


def test_no_path_key_is_missed() -> None:
    """Each key of the type of a path or place is one; `resume` is a text, since it may be auto or never."""
    (redacting,) = Place.__metadata__  # type: ignore[attr-defined]
    assert redacting.func is redact_urls
    found = {
        with_positions_named(section.key(name))
        for section in sections()
        for name, field in section.type.model_fields.items()
        if "Path" in str(field.annotation) or "redact_urls" in f"{field.annotation} {field.metadata}"
    }
    assert found | {"resume"} == PATH_KEYS
