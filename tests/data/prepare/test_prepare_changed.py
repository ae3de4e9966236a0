"""Inputs that change between a preparation's start and its end, or after it: no mixture, no old result as new."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.data.prepare import prepare
from cosmos_scale.data.prepare.writing import write_prepared_shard
from cosmos_scale.data.work import PREPARATION, Work
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture
from tests.data.prepare.downloads import download, dreamlip_row, write_dreamlip, write_folder, write_tar
from tests.data.prepare.test_prepare import read_all, run
from tests.data.prepare.test_prepare_again import first_three

CHANGED = r"out: its preparation was {} with {}_digest .* \({} changed since\); go on with the same options and files"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(number) for number in range(4)])
    for number, write in enumerate((write_tar, write_tar, write_tar, write_folder)):
        write(tmp_path / "images", f"{number:05d}", [download(number, key=number * 10_000)])
    return tmp_path


def stopped(inputs: Path) -> None:
    """Stop a preparation behind its third shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "map_jobs", first_three)
        with pytest.raises(InterruptedError):
            run(inputs)


def edit_captions(inputs: Path) -> None:
    """The same number of bytes."""
    path = inputs / "captions" / "a.csv"
    path.write_bytes(path.read_bytes().replace(b"raw caption", b"RAW CAPTION"))


def download_again(path: Path) -> None:
    """The same name and number of bytes, as a download that resizes to one size may leave."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10_000_000))


def download_tar_again(inputs: Path) -> None:
    download_again(inputs / "images" / "00001.tar")


def download_file_again(inputs: Path) -> None:
    download_again(inputs / "images" / "00003" / "000030000.jpg")


def list_again(inputs: Path) -> None:
    download_again(inputs / "images" / "00002.parquet")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (edit_captions, "captions"),
        (download_tar_again, "images"),
        (download_file_again, "images"),
        (list_again, "images"),
    ],
)
@pytest.mark.parametrize("how", ["begun", "done"])
def test_inputs_of_the_same_size_that_changed_are_refused(
    inputs: Path, change: Callable[[Path], None], what: str, how: str
) -> None:
    if how == "begun":
        stopped(inputs)
    else:
        run(inputs)
    before = {path.name: path.read_bytes() for path in (inputs / "out").glob("*.tar")}
    change(inputs)
    with pytest.raises(UserError, match=CHANGED.format(how, what, what)):
        run(inputs)
    assert {path.name: path.read_bytes() for path in (inputs / "out").glob("*.tar")} == before


def test_captions_that_change_before_the_first_shard_are_read_anew(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_prepared_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            run(inputs)
    edit_captions(inputs)
    documents = [document for _, document in read_all(run(inputs).folder).values()]
    assert [document["raw_caption"] for document in documents] == [[f"RAW CAPTION {number}"] for number in range(4)]


def test_captions_that_change_while_they_are_prepared_make_no_finished_folder(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> Any:
        written = write_prepared_shard(*arguments)
        if written.shard == "00001":
            edit_captions(inputs)
        return written

    monkeypatch.setattr(prepare, "write_prepared_shard", write)
    for _ in range(2):  # the same command again does not take the mixture for its own work either
        with pytest.raises(UserError, match=CHANGED.format("begun", "captions", "captions")):
            run(inputs)
    assert Work(PREPARATION, inputs / "out").is_unfinished


@pytest.mark.parametrize("how", ["begun", "done"])
def test_a_folder_of_an_older_version_is_refused_in_one_line(inputs: Path, how: str) -> None:
    """Older versions noted sizes only."""
    if how == "begun":
        stopped(inputs)
        noted, inside = inputs / "out" / ".prepare" / "options.json", None
    else:
        run(inputs)
        noted, inside = inputs / "out" / "manifest.json", "options"
    content = json.loads(noted.read_text())
    options = content if inside is None else content[inside]
    del options["captions_digest"], options["images_digest"]
    options["image_shards_digest"] = "0123456789abcdef"
    noted.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        run(inputs)
    assert str(error.value) == (
        f"{inputs / 'out'}: its preparation was {how} by an older version, which did not note captions_digest: whether "
        "the files are the same is not known; delete the folder, or name another one with --out"
    )
    assert (inputs / "out" / "00000.tar").exists()


def test_a_preparation_goes_on_where_nothing_changed(inputs: Path) -> None:
    stopped(inputs)
    (inputs / "captions").rename(inputs / "moved")  # by what the files hold, not by their times
    (inputs / "captions").mkdir()
    (inputs / "captions" / "a.csv").write_bytes((inputs / "moved" / "a.csv").read_bytes())
    assert {data for data, _ in read_all(run(inputs).folder).values()} == {picture(number) for number in range(4)}
