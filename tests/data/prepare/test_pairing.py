"""Images never get captions of other images: keys that come twice, lists of other downloads, .json that lies apart."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture
from tests.data.prepare.downloads import (
    Download,
    download,
    dreamlip_row,
    metadata,
    url,
    write_dreamlip,
    write_folder,
    write_listing,
    write_tar,
)
from tests.data.prepare.test_prepare import read_all, run

REASON_AGAIN = "duplicate key: it comes again in its shard"


@pytest.fixture(autouse=True)
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions").mkdir()
    return write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(number) for number in range(4)])


def joined_tars(folder: Path, items: Sequence[Download], *, texts: bool = True) -> None:
    """A shard as two joined tars leave it: keys may come again."""
    files = []
    for item in items:
        files.append((f"{item.key}.jpg", item.data or b""))
        if texts:
            files.append((f"{item.key}.json", json.dumps(metadata(item)).encode()))
    write_files(folder, files)


def write_files(folder: Path, files: Sequence[tuple[str, bytes]]) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def pairs(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Picture and URL of each sample."""
    return {key: (data, document["url"]) for key, (data, document) in read_all(folder).items()}


def rejects(folder: Path) -> list[tuple[Any, Any, str]]:
    """(key, captions row from 1, reason) of every reject."""
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return [(line.get("key"), line.get("row"), line["reason"]) for line in lines]


TWICE = [download(0), download(1), download(2, key=0), download(3, key=1)]


@pytest.mark.parametrize("listing", [False, True])
def test_joined_tars_keep_the_first_image_of_a_key_with_its_own_captions(tmp_path: Path, *, listing: bool) -> None:
    joined_tars(tmp_path / "images", TWICE)
    if listing:
        write_listing(tmp_path / "images", "00000", TWICE)
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000000": (picture(0), url(0)), "000000001": (picture(1), url(1))}
    assert rejects(report.folder) == [("000000000", 3, REASON_AGAIN), ("000000001", 4, REASON_AGAIN)]


def test_images_that_no_json_tells_apart_are_rejected(tmp_path: Path) -> None:
    joined_tars(tmp_path / "images", [*TWICE[:3], download(3)], texts=False)
    write_listing(tmp_path / "images", "00000", [TWICE[1], TWICE[2], download(3)])
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000001": (picture(1), url(1)), "000000003": (picture(3), url(3))}
    assert rejects(report.folder) == [
        ("000000000", 3, f"{REASON_AGAIN}, and no .json says which url each has"),
        ("000000000", None, REASON_AGAIN),
        (None, 1, "no image: no shard lists its url"),
    ]


def test_a_key_that_is_listed_twice_is_told_by_its_json_or_rejected(tmp_path: Path) -> None:
    stored = [download(0), download(1)]
    for name, texts in (("with", True), ("without", False)):
        joined_tars(tmp_path / "images", stored, texts=texts)
        write_listing(tmp_path / "images", "00000", [*stored, TWICE[2]])
        run(tmp_path, out=name)
    first, second = ("000000000", (picture(0), url(0))), ("000000001", (picture(1), url(1)))
    assert pairs(tmp_path / "with") == dict([first, second])
    absent = "image not in its shard: the parquet beside it has it"
    no_image = "no image: no shard lists its url"
    assert rejects(tmp_path / "with") == [("000000000", 3, absent), (None, 4, no_image)]
    assert pairs(tmp_path / "without") == dict([second])
    twice = "duplicate key: the parquet beside its shard lists it with 2 urls"
    assert rejects(tmp_path / "without") == [
        ("000000000", 1, twice),
        ("000000000", 3, twice),
        (None, 4, no_image),
    ]


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_list_of_another_download_gives_no_image_its_captions(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "images", "00000", [download(0), download(1)])
    write_listing(tmp_path / "images", "00000", [download(0), download(2, key=1)])
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000000": (picture(0), url(0))}
    assert rejects(report.folder)[:2] == [
        ("000000001", None, f"contradiction: the parquet beside its shard says url {url(2)}, its .json {url(1)}"),
        ("000000001", 3, "image not in its shard: the parquet beside it has it"),
    ]


def test_an_image_that_is_listed_as_failed_does_not_share_its_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "images", "00000", [download(0), download(1)])
    write_listing(tmp_path / "images", "00000", [download(0)._replace(data=None), download(1)])
    write_tar(tmp_path / "images", "00001", [download(0, key=10_000)])
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000001": (picture(1), url(1)), "000010000": (picture(0), url(0))}
    failed = "contradiction: its shard has it, the parquet beside it says failed_to_download"
    assert rejects(report.folder)[0][::2] == ("000000000", failed)


def test_a_row_whose_image_another_shard_has_is_not_named_as_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "images", "00000", [download(0)._replace(data=None), download(1)])
    write_tar(tmp_path / "images", "00001", [download(0, key=10_000), download(2, key=10_001)._replace(data=None)])
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000001": (picture(1), url(1)), "000010000": (picture(0), url(0))}
    assert [(key, row) for key, row, _ in rejects(report.folder)] == [("000000000", None), ("000010001", 3), (None, 4)]


def test_an_image_without_json_before_one_of_its_key_does_not_take_the_json_of_the_other(tmp_path: Path) -> None:
    text = json.dumps(metadata(TWICE[2])).encode()
    write_files(
        tmp_path / "images",
        [
            ("000000001.jpg", picture(1)),
            ("000000001.json", json.dumps(metadata(TWICE[1])).encode()),
            *[("a/000000000.jpg", picture(0)), ("b/000000000.jpg", picture(2)), ("b/000000000.json", text)],
        ],
    )
    report = run(tmp_path)
    assert pairs(report.folder) == {"000000001": (picture(1), url(1))}
    # The table gives each image that is named the row of its own URL, or none.
    assert {(key, row) for key, row, _ in rejects(report.folder) if key} == {("000000000", None), ("000000000", 3)}


def test_a_json_that_lies_apart_from_its_image_is_named(tmp_path: Path) -> None:
    """Also where only some lie apart: the reject says why, not that no row has the URL."""
    texts = [(f"{number:09d}.json", json.dumps(metadata(download(number))).encode()) for number in range(3)]
    images = [(f"{number:09d}.jpg", picture(number)) for number in range(3)]
    write_files(tmp_path / "images", [*images, *texts])
    lies_apart = "its .json lies apart from it; the files of a key must follow each other in a tar"
    with pytest.raises(
        UserError,
        match=rf"images do not say their url: a \.parquet .* must have it \(00000\.tar, 000000000: {lies_apart}\)$",
    ):
        run(tmp_path)
    write_files(tmp_path / "images", [images[0], texts[0], images[1], images[2], texts[1], ("000000002.json", b"{")])
    report = run(tmp_path, out="some")
    unknown = "image without captions: its url is not known"
    assert rejects(report.folder)[:2] == [
        ("000000001", None, f"{unknown}: {lies_apart}"),
        ("000000002", None, f"{unknown}: {lies_apart}"),
    ]
    write_files(
        tmp_path / "images", [images[0], texts[0], images[1], ("000000001.json", b"{"), images[2], (texts[2][0], b"{}")]
    )
    assert rejects(run(tmp_path, out="unread").folder)[:2] == [
        ("000000001", None, f"{unknown}: its .json cannot be read"),
        ("000000002", None, f"{unknown}: its .json says no url"),
    ]
