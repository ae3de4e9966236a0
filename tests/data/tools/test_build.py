"""Pictures and captions to shards: what is kept, converted, rejected, and refused."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import CaptionSampling, DataConfig, SourceConfig
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.samples.caption_keys import KNOWN_NAMES, OTHER_NAMES
from cosmos_scale.data.samples.captions import caption_pool
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.data.tools.captions_file import IMAGE_COLUMNS, read_rows
from cosmos_scale.data.tools.verify import verify_shards
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import open_folder, picture

Rows = Sequence[Mapping[str, Any]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "deep" / "p.png").write_bytes(picture(10, "PNG"))
    (folder / "deep" / "w.webp").write_bytes(picture(11, "WEBP"))
    (folder / "cut.jpg").write_bytes(picture(12)[:-300])
    (folder / "text.jpg").write_text("no picture")
    return folder


def build(images: Path, rows: Rows, *, workers: int = 1, per_shard: int = 3, out: str = "out") -> BuildReport:
    path = images.parent / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_shards(images, path, images.parent / out, samples_per_shard=per_shard, workers=workers, progress=False)


def read_all(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Each sample's picture and json; the json without its origin, which must be the row that the key says."""
    samples = read_whole(folder)
    for key, (_, document) in samples.items():
        assert document.pop("origin")["row"] == int(key)
    return samples


def read_whole(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    index, reader = open_folder(folder), ShardReader()
    locations = [index.locate(number) for number in range(len(index))]
    samples = {location.entry.key: reader.read(location) for location in locations}
    reader.close()
    return samples


def rejected(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return {line["row"]: line["reason"].split(":")[0] for line in lines}


def test_jpegs_stay_byte_for_byte_and_others_become_jpeg(images: Path) -> None:
    rows = [{"image": name, "caption": name} for name in ("0.jpg", "deep/p.png", "deep/w", "3")]
    report = build(images, rows)
    assert (report.samples, report.shards, dict(report.rejected)) == (4, 2, {})
    samples = read_all(report.folder)
    assert samples["000000001"] == (picture(0), {"caption": "0.jpg"})
    assert samples["000000004"] == (picture(3), {"caption": "3"})
    for key, number, kind in (("000000002", 10, "PNG"), ("000000003", 11, "WEBP")):
        converted = samples[key][0]
        assert converted.startswith(b"\xff\xd8\xff")
        before, after = (decode_rgbx(data, 10**6)[..., :3].astype(int) for data in (picture(number, kind), converted))
        # Noise is the hardest picture for JPEG: 3.3 levels here; with halved colour resolution it is above 20.
        assert np.abs(before - after).mean() < 5


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_rows_and_pictures_are_counted_and_named(images: Path, workers: int) -> None:
    rows: Rows = [
        {"image": "0.jpg", "raw_caption": ["a", "b"], "url": "left out"},
        {"image": "missing.jpg", "caption": "x"},
        {"image": "cut.jpg", "caption": "x"},
        {"image": "text.jpg", "caption": "x"},
        {"image": "1.jpg", "caption": " "},
        {"caption": "x"},
        {"image": "2.jpg", "caption": 7},
        {"image": "1.jpg", "longIB_captions": "A. B.", "caption": None},
    ]
    report = build(images, rows, workers=workers, per_shard=2, out=f"out{workers}")
    assert (report.samples, report.shards) == (2, 2)
    assert rejected(report.folder) == {
        2: "picture not found",
        3: "the picture does not decode",
        4: "the picture is not a JPEG, PNG or WebP",
        5: "no caption",
        6: "no picture named",
        7: "wrong type",
    }
    assert sum(report.rejected.values()) == 6
    assert read_all(report.folder) == {
        "000000001": (picture(0), {"raw_caption": ["a", "b"]}),
        "000000008": (picture(1), {"longIB_captions": "A. B."}),
    }
    assert "1 row rejected: picture not found" in report.describe()


def test_workers_make_the_same_bytes(images: Path) -> None:
    rows = [{"image": f"{number % 4}.jpg", "caption": str(number)} for number in range(11)]
    one, two = build(images, rows, out="one"), build(images, rows, workers=2, out="two")
    names = sorted(path.name for path in one.folder.iterdir())
    assert len(names) == 11  # four shards, four tables, the summary, the manifest, and the empty file of rejects
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_lines_that_are_no_rows_are_rejected(images: Path) -> None:
    path = images.parent / "captions.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"image": "0.jpg", "caption": "\xc3\xa4"}\n\n{"image"\n[1]\n\xff\xfe\n')
    out = images.parent / "out"
    report = build_shards(images, path, out, samples_per_shard=10, workers=1, progress=False)
    assert read_all(out) == {"000000001": (picture(0), {"caption": "ä"})}
    assert rejected(out) == {3: "not json", 4: "not an object", 5: "not json"}
    assert report.samples == 1


def test_csv_columns_of_dreamlip_and_pixelprose(images: Path) -> None:
    path = images.parent / "captions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", "raw_caption", "shortIB_captions", "longLLA_captions", "vlm_caption"])
        writer.writerow(["0.jpg", "a cat", '["One.", "Two"]', "['It\\'s one', 'two']", ""])
        writer.writerow(["1.jpg", "[not a list]", "line\nbreak", "", "generated"])
        writer.writerow(["2.jpg", "too few"])
    out = images.parent / "out"
    build_shards(images, path, out, samples_per_shard=10, workers=1, progress=False)
    assert {key: document for key, (_, document) in read_all(out).items()} == {
        "000000001": {
            "raw_caption": "a cat",
            "shortIB_captions": ["One.", "Two"],
            "longLLA_captions": ["It's one", "two"],
        },
        "000000002": {"raw_caption": "[not a list]", "shortIB_captions": "line\nbreak", "caption": "generated"},
    }
    assert rejected(out) == {3: "wrong number of cells"}


@pytest.mark.parametrize("column", ["text", "TEXT", "title", "captions", "Caption", "caption"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_common_columns_of_captions_are_read(images: Path, kind: str, column: str) -> None:
    path = images.parent / f"captions.{kind}"
    row = {"File Name": "0.jpg", column: "a cat"}
    path.write_text(json.dumps(row) if kind == "jsonl" else f"File Name,{column}\n0.jpg,a cat\n")
    report = build_shards(images, path, images.parent / "out", samples_per_shard=10, workers=1, progress=False)
    assert read_all(report.folder) == {"000000001": (picture(0), {"caption": "a cat"})}


def test_a_title_beside_captions_is_left_alone(images: Path) -> None:
    report = build(images, [{"image": "0.jpg", "title": "x", "text": "y", "raw_caption": ["a"]}])
    assert read_all(report.folder)["000000001"][1] == {"raw_caption": ["a"]}


def test_options_name_other_columns(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = images.parent / "captions.csv", images.parent / "out"
    path.write_text("Photo ID,alt text,caption\n0.jpg,a cat,left out\n1.jpg,,left out\n")
    command = ["data", "build", "--images", str(images), "--captions", str(path), "--out", str(out), "--quiet"]
    assert main(command) == 2
    assert "no picture column among Photo ID, alt text, caption" in (message := capsys.readouterr().err)
    assert "--image-column names another" in message
    assert main([*command, "--image-column", "Photo ID", "--caption-column", "alt text", "--workers", "1"]) == 0
    assert read_all(out) == {"000000001": (picture(0), {"caption": "a cat"})}
    assert "no caption: empty is alt_text" in (out / "rejected.jsonl").read_text()


def test_a_reject_says_what_its_row_has(images: Path) -> None:
    report = build(
        images, [{"image": "0.jpg", "Alt": "x"}, {"photo": "0.jpg", "caption": "x"}, {"image": "0", "text": "a"}]
    )
    reasons = [json.loads(line)["reason"] for line in (report.folder / "rejected.jsonl").read_text().splitlines()]
    assert reasons[0].startswith("no caption: expected one of raw_caption, ")
    assert reasons[0].endswith("caption, captions, text, title; the row has image, Alt")
    assert reasons[1].endswith("; the row has photo, caption")


def test_the_help_names_every_accepted_column(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "build", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out.split("options:")[0].lower()))
    assert words >= {*IMAGE_COLUMNS, *KNOWN_NAMES, *OTHER_NAMES}


def test_samples_carry_their_origin_and_reports_name_it(images: Path) -> None:
    report = build(images, [{"image": name, "raw_caption": [name]} for name in ("0.jpg", "none.jpg", "deep/w")])
    samples = read_whole(report.folder)
    assert samples["000000003"][1]["origin"] == {"captions": "captions.jsonl", "row": 3, "image": "deep/w"}
    document = samples["000000003"][1]
    for sampling in get_args(CaptionSampling):
        if "pixelprose" not in sampling and sampling != "long":
            assert caption_pool(sampling, document) == ["deep/w"]
    (line,) = [json.loads(line) for line in (report.folder / "rejected.jsonl").read_text().splitlines()]
    assert line == {
        "captions": "captions.jsonl",
        "row": 2,
        "key": "000000002",
        "image": "none.jpg",
        "reason": "picture not found",
    }

    # A shard that is damaged later.
    (shard,) = report.folder.glob("*.tar")
    data = shard.read_bytes()
    shard.write_bytes(data.replace(picture(0), picture(0)[:200] + bytes(len(picture(0)) - 200)))
    data_config = DataConfig(sources=[SourceConfig(name="a", shards=str(report.folder))])
    verdict = verify_shards(data_config, workers=1, progress=False)
    fault = next(fault for fault in verdict.first if fault.origin)
    assert (fault.key, fault.origin) == ("000000001", "captions.jsonl row 1, 0.jpg")
    assert "(built from captions.jsonl row 1, 0.jpg)" in verdict.describe(None)


def test_nan_is_no_caption_and_no_picture(images: Path) -> None:
    nan = float("nan")
    rows: Rows = [
        {"image": nan, "path": "0.jpg", "caption": "a", "raw_caption": nan},
        {"image": "1.jpg", "caption": nan},
        {"image": nan, "caption": "a"},
    ]
    report = build(images, rows)
    assert [document["caption"] for _, document in read_all(report.folder).values()] == ["a"]
    assert rejected(report.folder) == {2: "no caption", 3: "no picture named"}


def test_an_open_quote_does_not_swallow_the_rows_behind_it(images: Path) -> None:
    path = images.parent / "captions.csv"
    rows = [f"{number % 4}.jpg,caption {number}" for number in range(1001)]
    path.write_text('image,caption\n0.jpg,sound\n1.jpg,"open\n' + "\n".join(rows) + "\n")
    out = images.parent / "out"
    report = build_shards(images, path, out, samples_per_shard=2000, workers=1, progress=False)
    assert report.samples == 1002
    (line,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert (line["row"], line["image"]) == (2, "1.jpg")
    assert line["reason"].startswith("unclosed quote: opened on line 3, ")
    assert "the 999 lines behind it may belong to it" in line["reason"]
    path.write_text('image,"caption\n0.jpg,sound\n')
    with pytest.raises(UserError, match="its header cannot be read: unclosed quote: opened on line 1"):
        build_shards(images, path, images.parent / "none", samples_per_shard=10, workers=1, progress=False)


def test_rows_that_are_not_utf8_are_rejected(images: Path) -> None:
    """Of a Latin-1 file the rows with such letters must be rejected; letters must not vanish silently."""
    path = images.parent / "captions.csv"
    rows = ["image,caption,note", "0.jpg,a café,", "1.jpg,a dog,", "2.jpg,a cat,père", "é.jpg,a cow,", "é,a,b,c"]
    path.write_bytes("\n".join(rows).encode("latin-1"))
    out = images.parent / "out"
    report = build_shards(images, path, out, samples_per_shard=10, workers=1, progress=False)
    assert read_all(out) == {"000000002": (picture(1), {"caption": "a dog"})}
    assert rejected(out) == dict.fromkeys((1, 3, 4, 5), "not UTF-8")
    assert dict(report.rejected) == {"not UTF-8": 4}
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["0.jpg", "2.jpg", "\udce9.jpg", "\udce9"]
    assert "byte 0xe9" in lines[0]["reason"]


def test_pictures_outside_the_folder_are_rejected(images: Path) -> None:
    outside = images.parent / "images_too"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(picture(20))
    (images / "link").symlink_to(outside)
    names = [
        "../images_too/secret.jpg",
        str(outside / "secret.jpg"),
        "deep/../../images_too/secret",
        "link/secret.jpg",
        "deep/../0.jpg",
        str(images / "1.jpg"),
        "..",
    ]
    report = build(images, [{"image": name, "caption": "x"} for name in names], per_shard=10)
    assert rejected(report.folder) == dict.fromkeys((1, 2, 3, 7), "picture outside the folder")
    assert dict(report.rejected) == {"picture outside the folder": 4}
    assert [data for data, _ in read_all(report.folder).values()] == [picture(20), picture(0), picture(1)]


def test_extensions_left_out_may_be_upper_case(images: Path) -> None:
    (images / "CAMERA.JPG").write_bytes(picture(21))
    (images / "scan.PNG").write_bytes(picture(22, "PNG"))
    report = build(images, [{"image": name, "caption": "x"} for name in ("CAMERA", "scan")])
    assert (report.samples, dict(report.rejected)) == (2, {})
    assert read_all(report.folder)["000000001"][0] == picture(21)


def test_inputs_that_cannot_work_are_refused(images: Path) -> None:
    captions = images.parent / "captions.csv"
    captions.write_text("image,colour\n0.jpg,red\n")

    def attempt(images: Path, captions: Path) -> None:
        build_shards(images, captions, images.parent / "out", samples_per_shard=10, workers=1, progress=False)

    with pytest.raises(
        UserError, match=r"no caption column among image, colour; one of these is needed: .*raw_caption"
    ):
        attempt(images, captions)
    captions.write_text("image,caption_1,caption_2\n0.jpg,red,a red one\n")
    with pytest.raises(UserError, match=r"names another; several captions of a picture are a json list in one column"):
        attempt(images, captions)
    captions.write_text("caption\nred\n")
    with pytest.raises(UserError, match="no picture column among caption"):
        attempt(images, captions)
    with pytest.raises(UserError, match="no such folder of pictures"):
        attempt(images / "nowhere", captions)
    with pytest.raises(UserError, match=r"missing\.csv: cannot be read: No such file"):
        attempt(images, images.parent / "missing.csv")
    (images.parent / "captions.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"captions\.parquet: captions come as \.jsonl or \.csv"):
        attempt(images, images.parent / "captions.parquet")
    with pytest.raises(UserError, match=r"no row of 1 can be used; see .*rejected\.jsonl"):
        build(images, [{"image": "missing.jpg", "caption": "x"}])
    build(images, [{"image": "0.jpg", "caption": "x"}])
    with pytest.raises(UserError, match=r"out: captions\.jsonl has changed since this build"):
        build(images, [{"image": "0.jpg", "caption": "another"}])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_in_utf16_are_refused(images: Path, kind: str, encoding: str) -> None:
    captions = images.parent / f"captions.{kind}"
    captions.write_text("image,caption\n0.jpg,a\n" if kind == "csv" else json.dumps({"image": "0"}), encoding=encoding)
    with pytest.raises(UserError, match="is UTF-16 or no text; save it as UTF-8"):
        list(read_rows(captions))


def test_two_columns_of_one_name_are_refused_where_one_would_be_lost(images: Path) -> None:
    captions = images.parent / "captions.csv"
    captions.write_text("image,caption,Caption\n0.jpg,a,b\n")
    with pytest.raises(UserError, match=r"two columns are called caption \(caption, Caption\)"):
        list(read_rows(captions))
    captions.write_text("image,caption,note,note,title,title\n0.jpg,a,b,c,d,e\n")
    assert [row.document for row in read_rows(captions)] == [{"caption": "a"}]
    lines = captions.with_suffix(".jsonl")
    lines.write_text('{"image": "0", "caption": "a", "Caption": ""}\n{"image": "0", "caption": "a", "N": 1, "n": 2}\n')
    first, second = read_rows(lines)
    assert first.fault == "two keys of one name: caption; the row has image, caption, Caption"
    assert (second.fault, second.document) == (None, {"caption": "a"})


def test_a_pipe_of_captions_is_refused(images: Path) -> None:
    """To open a pipe that nobody writes would wait for ever."""
    captions = images.parent / "captions.csv"
    os.mkfifo(captions)
    with pytest.raises(UserError, match="is a pipe or a device, but is read several times; give a file"):
        build_shards(images, captions, images.parent / "out", samples_per_shard=3, workers=1, progress=False)


@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
def test_a_refused_captions_file_leaves_no_folder(images: Path, name: str) -> None:
    captions, out = images.parent / name, images.parent / "out"
    captions.write_text("image;caption\n0.jpg;a\n")
    with pytest.raises(UserError):
        build_shards(images, captions, out, samples_per_shard=3, workers=1, progress=False)
    assert not out.exists()


def test_a_name_without_extension_that_two_pictures_have_is_rejected(images: Path) -> None:
    (images / "0.png").write_bytes(picture(20, "PNG"))
    (images / "1.png").symlink_to(images / "1.jpg")  # one picture, under two names
    report = build(images, [{"image": name, "caption": name} for name in ("0", "0.png", "1", "2")])
    assert (report.samples, dict(report.rejected)) == (3, {"picture unclear": 1})
    (line,) = map(json.loads, (report.folder / "rejected.jsonl").read_text().splitlines())
    assert line["reason"] == "picture unclear: the name is that of 0.jpg, 0.png"


def test_captions_that_are_not_read_are_counted_and_two_for_one_key_are_refused(images: Path) -> None:
    rows = [
        {"image": "0.jpg", "title": "a", "Text": "b"},
        {"image": "1.jpg", "caption": "a", "text": "b", "title": " "},
        {"image": "2.jpg", "vlm_caption": "a", "caption": "b"},
        {"image": "3.jpg", "vlm_caption": "a", "caption": ""},
    ]
    report = build(images, rows)
    assert [document for _, document in read_all(report.folder).values()] == [{"caption": text} for text in "baa"]
    assert (dict(report.unread), dict(report.rejected)) == ({"title": 1, "text": 1}, {"two captions for caption": 1})
    assert "1 row has text under title, which is not read (--caption-column title reads it alone)" in report.describe()


def test_half_of_a_surrogate_pair_and_nul_reject_their_rows_and_a_whole_pair_is_kept(images: Path) -> None:
    texts = ("a \ud83d", "a \U0001f600", ["a", "\ude00"], "sound", "a\0b")
    report = build(images, [{"image": f"{number % 4}.jpg", "caption": text} for number, text in enumerate(texts)])
    assert [document["caption"] for _, document in read_all(report.folder).values()] == ["a \U0001f600", "sound"]
    assert dict(report.rejected) == {"not text": 3}
    assert rejected(report.folder) == {1: "not text", 3: "not text", 5: "not text"}
