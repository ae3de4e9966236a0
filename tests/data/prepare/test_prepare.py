"""Published captions joined with downloaded images: what is kept, in which form, what is rejected; training on it."""

import csv
import hashlib
import json
import tarfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.config import CaptionSampling
from cosmos_scale.data.prepare.datasets import DREAMLIP, PIXELPROSE, Dataset, Join
from cosmos_scale.data.prepare.manifest import Prepared
from cosmos_scale.data.prepare.prepare import prepare_dataset
from cosmos_scale.data.samples.sentences import Split
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.errors import UserError
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import open_folder, picture, shards_config
from tests.data.prepare.downloads import (
    DREAMLIP_HEADER,
    Download,
    download,
    dreamlip_row,
    pixelprose_row,
    url,
    write_dreamlip,
    write_folder,
    write_parquet,
    write_tar,
)

Samples = dict[str, tuple[bytes, dict[str, Any]]]


def run(
    tmp_path: Path,
    dataset: Dataset = DREAMLIP,
    *,
    join: Join = "url",
    split: Split = "sentences",
    workers: int = 1,
    out: str = "out",
) -> Prepared:
    """Prepare what lies in `images` with the captions files that lie in `captions`."""
    captions, images = tmp_path / "captions", tmp_path / "images"
    return prepare_dataset(
        dataset, [captions], [images], tmp_path / out, join=join, split=split, workers=workers, progress=False
    )


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions").mkdir()
    return tmp_path / "captions"


def read_all(folder: Path) -> Samples:
    """Every sample of the shards, read without the package's code."""
    samples: Samples = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {entry.name: archive.extractfile(entry) for entry in archive}
            members = {name: file.read() for name, file in files.items() if file is not None}
        for name, data in members.items():
            key, extension = name.split(".")
            if extension == "json":
                samples[key] = members[f"{key}.jpg"], json.loads(data)
    return samples


def rejected(folder: Path) -> list[tuple[str, Any, Any, str]]:
    """(captions file, row, key, reason without detail) of every reject."""
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return [
        (line.get("captions", ""), line.get("row"), line.get("key"), line["reason"].split(": ")[0]) for line in lines
    ]


@pytest.mark.parametrize("form", ["tars", "folders", "tars without parquet", "folders without parquet"])
def test_dreamlip_with_every_form_of_download(tmp_path: Path, captions: Path, form: str) -> None:
    write = write_tar if form.startswith("tars") else write_folder
    write_dreamlip(captions / "cc3m.csv", [dreamlip_row(number) for number in (4, 2, 0, 1, 3)])
    for name, numbers in (("00000", (0, 1)), ("00001", (3, 2, 4))):
        items = [download(number, key=10_000 * int(name) + place) for place, number in enumerate(numbers)]
        write(tmp_path / "images", name, items, listing="without" not in form)
    report = run(tmp_path)
    assert (report.samples, report.shards, report.rows, report.rejected) == (5, 2, 5, {})
    samples = read_all(tmp_path / "out")
    places = {"000000000": 0, "000000001": 1, "000010000": 3, "000010001": 2, "000010002": 4}
    for key, number in places.items():
        assert samples.pop(key) == (
            picture(number),
            {
                "raw_caption": [f"raw caption {number}"],
                **{
                    f"{length}{model}_captions": [f"A short {model} caption of picture {number}"]
                    if length == "short"
                    else [
                        f'The image shows "{model}, {number}"',
                        "It weighs 3.5 kg",
                        "It stands in the U.S. and shines",
                    ]
                    for model in ("IB", "SV", "LLA")
                    for length in ("short", "long")
                },
                "url": url(number),
            },
        )
    assert samples == {}


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_first_line_for_excel_names_the_separator(tmp_path: Path, captions: Path, separator: str) -> None:
    rows = [dreamlip_row(number) for number in (4, 2)]
    with (captions / "cc3m.csv").open("w", newline="") as file:
        file.write(f"sep={separator}\r\n")
        csv.writer(file, delimiter=separator).writerows([DREAMLIP_HEADER, *rows, ["too", "few"]])
    write_tar(tmp_path / "images", "00000", [download(number) for number in (2, 4)])
    report = run(tmp_path)
    assert (report.samples, report.rows) == (2, 3)
    assert [row for _, row, _, _ in rejected(tmp_path / "out")] == [3]
    write_dreamlip(captions / "cc3m.csv", rows)
    run(tmp_path, out="other")
    assert read_all(tmp_path / "out") == read_all(tmp_path / "other")


def test_the_published_split_and_none(tmp_path: Path, captions: Path) -> None:
    write_dreamlip(captions / "cc3m.csv", [dreamlip_row(0)])
    write_tar(tmp_path / "images", "00000", [download(0)])
    long = dreamlip_row(0)[DREAMLIP_HEADER.index("longSV_captions")]
    expected: dict[Split, list[str]] = {
        "published": [
            'The image shows "SV, 0"',
            "It weighs 3",
            "5 kg",
            "It stands in the U",
            "S",
            "and shines",
        ],
        "none": [long],
    }
    for split, sentences in expected.items():
        run(tmp_path, split=split, out=split)
        assert read_all(tmp_path / split)["000000000"][1]["longSV_captions"] == sentences


@pytest.mark.parametrize(
    ("split", "caption"),
    [
        ("sentences", ["This image displays: a cat of 3.5 kg", "It is number 0 in the U.S. registry"]),
        ("published", ["This image displays: a cat of 3", "5 kg", "It is number 0 in the U", "S", "registry"]),
        ("none", "This image displays: a cat of 3.5 kg.\nIt is number 0 in the U.S. registry."),
    ],
)
def test_pixelprose_from_several_parquet_files(tmp_path: Path, captions: Path, split: Split, caption: object) -> None:
    for name, numbers in (("cc12m_00", (0, 1)), ("redcaps_00", (2,))):
        write_parquet(captions / f"vlm_captions_{name}.parquet", [pixelprose_row(number) for number in numbers])
    write_tar(tmp_path / "images", "00000", [download(number) for number in range(3)])
    report = run(tmp_path, PIXELPROSE, split=split)
    assert (report.samples, report.rejected) == (3, {})
    data, document = read_all(tmp_path / "out")["000000000"]
    assert data == picture(0)
    assert document == {"original_caption": "St. Paul's, picture 0", "caption": caption, "url": url(0)}


def test_join_by_key_and_by_uid(tmp_path: Path, captions: Path) -> None:
    """A table may have lost leading zeros of keys; the download holds uids as an extra column."""
    write_parquet(captions / "a.parquet", [pixelprose_row(number) | {"url": "another"} for number in range(2)])
    items = [download(number, key=number + 700)._replace(more=(("uid", f"{number:032x}"),)) for number in range(2)]
    write_tar(tmp_path / "images", "00000", items)
    joins: tuple[Join, ...] = ("key", "uid")
    for join in joins:
        assert run(tmp_path, PIXELPROSE, join=join, out=join).samples == 2
    assert read_all(tmp_path / "key")["000000701"][1]["key"] == "701"
    assert read_all(tmp_path / "uid")["000000701"][1]["uid"] == f"{1:032x}"


def test_every_reject_has_its_reason(tmp_path: Path, captions: Path) -> None:
    rows = [dreamlip_row(number) for number in range(8)]
    rows += [dreamlip_row(1), ["", *dreamlip_row(8)[1:]], [url(9), "too few"], [url(10)] + [" "] * 7, dreamlip_row(11)]
    rows += [dreamlip_row(20)]
    path = write_dreamlip(captions / "cc3m.csv", rows)
    with path.open("ab") as file:
        file.write(url(12).encode() + b',"caf\xe9\nin two lines, ""\xe8"".",c,d,e,f,g,h\n')
    first = [
        download(0),
        download(1),
        download(1, key=2),
        Download("000000003", url(2), None),
        Download("000000004", url(3), picture(3)[:-300]),
        Download("000000005", url(4), b"no image"),
        Download("000000006", "https://elsewhere.example.org/x.jpg", picture(6)),
        Download("000000007", url(10), picture(10)),
        Download("000000008", url(5), picture(5), listed=False),
        Download("000000009", url(6), picture(6), stored=False),
        Download("000000010", "https://dead.example.org", None),
    ]
    write_tar(tmp_path / "images", "00000", first)
    # The shard breaks off inside its second image; the third is not reached.
    torn = write_tar(
        tmp_path / "images", "00001", [download(7, key=10_000), download(11, key=10_001), download(0, key=5)]
    )
    with tarfile.open(torn) as archive:
        second = next(entry for entry in archive if entry.name == "000010001.jpg")
    torn.write_bytes(torn.read_bytes()[: second.offset_data + 600])
    write_tar(tmp_path / "images", "00002", [download(0)], listing=False).write_bytes(b"no tar" * 1000)
    report = run(tmp_path)
    assert sorted(read_all(report.folder)) == ["000000000", "000000001", "000010000"]
    csv = "cc3m.csv"
    expected = [
        ("", None, "000000002", "duplicate image"),
        (csv, 3, "000000003", "not downloaded"),
        (csv, 4, "000000004", "damaged image"),
        (csv, 5, "000000005", "damaged image"),
        ("", None, "000000006", "image without captions"),
        (csv, 12, "000000007", "no caption"),
        ("", None, "000000008", "image not listed"),
        (csv, 7, "000000009", "image not in its shard"),
        ("", None, "000000010", "not downloaded"),
        (csv, 13, "000010001", "damaged image"),
        ("", None, None, "torn shard"),
        ("", None, None, "torn shard"),
        ("", None, "000000005", "image not in its shard"),
        (csv, 10, None, "captions row cannot be read"),
        (csv, 11, None, "captions row cannot be read"),
        (csv, 15, None, "captions row cannot be read"),
        (csv, 9, None, "duplicate captions row"),
        (csv, 6, None, "no image"),
        (csv, 14, None, "no image"),
    ]
    assert sorted(rejected(report.folder), key=str) == sorted(expected, key=str)
    assert report.rejected == dict(Counter(reason for *_, reason in expected))
    # Each row of captions is a sample or is rejected once.
    named = [row for _, row, _, _ in expected if row is not None]
    assert sorted(named) == [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]
    assert report.samples + len(named) == report.rows == 15


def test_the_manifest_says_what_was_made(tmp_path: Path, captions: Path) -> None:
    write_dreamlip(captions / "cc3m.csv", [dreamlip_row(number) for number in range(3)])
    write_tar(tmp_path / "images", "00000", [download(0), download(1)])
    write_tar(tmp_path / "images", "00001", [Download("000010000", url(2), None)])
    report = run(tmp_path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    data = (tmp_path / "out" / "00000.tar").read_bytes()
    shard = {"shard": "00000.tar", "samples": 2, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["shards"] == [shard]
    assert (manifest["samples"], manifest["bytes"], manifest["captions_rows"]) == (2, len(data), 3)
    assert manifest["rejected"] == report.rejected == {"not downloaded": 1}
    assert manifest["options"]["split"] == "sentences"
    assert manifest["options"]["captions"] == [{"file": "cc3m.csv", "bytes": (captions / "cc3m.csv").stat().st_size}]
    assert "1 rejected: not downloaded" in report.describe()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.index.npy",
        "00000.tar",
        "index.json",
        "manifest.json",
        "rejected.jsonl",
    ]


@pytest.mark.parametrize(
    ("dataset", "sampling"),
    [(DREAMLIP, "textcrop"), (PIXELPROSE, "textcrop_pixelprose")],
    ids=["dreamlip", "pixelprose"],
)
@pytest.mark.parametrize("split", ["sentences", "published", "none"])
def test_prepared_shards_train(
    tmp_path: Path, captions: Path, dataset: Dataset, sampling: CaptionSampling, split: Split
) -> None:
    if dataset is DREAMLIP:
        write_dreamlip(captions / "cc3m.csv", [dreamlip_row(number) for number in range(8)])
    else:
        write_parquet(captions / "a.parquet", [pixelprose_row(number) for number in range(8)])
    write_tar(tmp_path / "images", "00000", [download(number) for number in range(8)])
    run(tmp_path, dataset, split=split)
    config = shards_config(tmp_path / "out", captions={"count": 3, "sampling": sampling})
    tokenizer = Tokenizer(config.model.text.context_length)
    loader = TrainLoader(config, open_folder(tmp_path / "out"), tokenizer, 0, 1)
    with closing(loader.batches(0)) as batches:
        found = [next(batches) for _ in range(2)]
    assert sorted(int(sample) for batch in found for sample in batch.sample_ids) == list(range(8))
    assert all(int(batch.substituted) == 0 for batch in found)


@pytest.mark.parametrize("kind", ["gzip", "zip"])
def test_compressed_image_shards_are_said_to_be(tmp_path: Path, captions: Path, kind: str) -> None:
    (tmp_path / "images").mkdir()
    write_dreamlip(captions / "cc3m.csv", [dreamlip_row(0)])
    head = {"gzip": b"\x1f\x8b\x08\x00\x00\x00", "zip": b"PK\x03\x04\x14\x00"}[kind]
    (tmp_path / "images" / "00000.tar").write_bytes(head + bytes(2000))
    with pytest.raises(UserError, match=rf"00000\.tar: is {kind}-compressed; .* unpack it to a plain \.tar"):
        run(tmp_path)
