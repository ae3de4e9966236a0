"""Captions in json or txt, members that lie apart, keys with dots: what is a sample, and what is said of the rest."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import CaptionsConfig, DataConfig, SourceConfig
from cosmos_scale.data.samples.caption_keys import KNOWN_KEYS, OTHER_NAMES
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.index_report import REJECTED, Unindexed, count_unindexed
from cosmos_scale.data.shards.members import DEFAULT_RULES, ScanRules
from cosmos_scale.data.shards.reader import BLOCK, CLOSE, ShardReader
from cosmos_scale.data.shards.scan import ShardScan, scan_shard
from cosmos_scale.data.shards.unfinished import IndexedShard, Unfinished
from cosmos_scale.data.tools.verify import verify_shards
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import flip_bytes, open_folder, picture, write_shards
from tests.data.shards.test_reader import JSON, keys, location, write_tar

TXT = b"a photo of a thing"
METADATA = {"url": "http://x/1", "width": 40}


def encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def documents(path: Path, scan: ShardScan) -> dict[str, Any]:
    """What a reader gives of each sample; each picture must be one of ours."""
    reader, found = ShardReader(), {}
    for place, entry in enumerate(scan.entries):
        image, found[entry.key] = reader.read(location(path, scan, place))
        assert image.startswith(b"\xff\xd8")
    reader.close()
    return found


@pytest.mark.parametrize("order", ["jpg json txt", "jpg txt json", "json jpg txt", "txt jpg json", "json txt jpg"])
@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (METADATA, METADATA | {"caption": "a photo of a thing"}),
        ({"caption": None, "key": "1"}, {"caption": "a photo of a thing", "key": "1"}),
        ({"raw_caption": [" "], "title": "Buy!"}, {"raw_caption": [" "], "title": "Buy!", "caption": TXT.decode()}),
        ({"caption": "of the json"}, {"caption": "of the json"}),
        ({"longSV_captions": ["a"]} | METADATA, {"longSV_captions": ["a"]} | METADATA),
        ({"caption": " ...."} | METADATA, METADATA | {"caption": "a photo of a thing"}),  # no sentence in the json's
    ],
)
def test_a_caption_is_taken_where_it_is(
    tmp_path: Path, order: str, document: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = {"jpg": picture(0), "json": encoded(document), "txt": TXT}
    path = write_tar(tmp_path / "0.tar", [(f"{key}.{kind}", data[kind]) for key in "ab" for kind in order.split()])
    scan = scan_shard(path)
    assert scan.rejected == []
    assert documents(path, scan) == {"a": expected, "b": expected}


def test_a_txt_stands_in_for_a_json_that_is_broken_or_far_away(tmp_path: Path) -> None:
    far = ("a.cls", bytes(CLOSE + 1))
    members = [("a.jpg", picture(0)), ("a.json", encoded(METADATA)), far, ("a.txt", TXT)]
    path = write_tar(tmp_path / "0.tar", [*members, ("b.jpg", picture(1)), ("b.json", b"{"), ("b.txt", TXT)])
    assert documents(path, scan_shard(path)) == {"a": {"caption": TXT.decode()}, "b": {"caption": TXT.decode()}}


def test_a_txt_of_a_windows_editor_is_its_text(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.txt", "a photo".encode("utf-8-sig"))])
    assert documents(path, scan_shard(path)) == {"a": {"caption": "a photo"}}


def test_two_texts_that_do_not_lie_where_the_index_says_are_damage(tmp_path: Path) -> None:
    members = [("a.jpg", picture(0)), ("a.json", encoded(METADATA)), ("a.txt", TXT)]
    path = write_tar(tmp_path / "0.tar", members)
    found = location(path, scan_shard(path), 0)
    with closing(ShardReader()) as reader:
        assert reader.read(found)[1]["caption"] == TXT.decode()
        entry = found.entry
        for wrong in (entry._replace(text_size=entry.text_size - 1), entry._replace(text_offset=entry.text_offset + 1)):
            with pytest.raises(DamagedSample, match="no two members at byte"):
                reader.read(found._replace(entry=wrong))
        flip_bytes(path, found.entry.text_offset + BLOCK + 124, 12)  # the size of the second member
        with pytest.raises(DamagedSample, match=r"no two members at byte 2048: the shard has changed or is damaged"):
            reader.read(found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"caption": None} | METADATA, "no caption: caption is null; --captions KEY names other keys"),
        ({"Text": " ", "title": ""} | METADATA, "no caption: Text is empty, title is empty; --captions KEY names"),
        ({"captions": [None, ""]} | METADATA, "no caption: captions is empty"),
        ({"captions": float("nan")} | METADATA, "no caption: captions is null"),
        ({"caption": " ....\n."} | METADATA, "no caption: no sentence in caption; --captions KEY names other keys"),
    ],
)
def test_a_sample_whose_captions_are_all_empty_is_in_no_epoch(
    tmp_path: Path, text: dict[str, Any], reason: str
) -> None:
    members = [("a.jpg", picture(0)), ("a.json", encoded(text)), ("a.txt", b" \n")]
    path = write_tar(tmp_path / "0.tar", [*members, ("b.jpg", picture(1)), ("b.json", JSON)])
    scan = scan_shard(path)
    assert keys(scan) == ["b"]
    assert scan.rejected[0].reason.startswith(reason)
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert "1 sample rejected: no caption" in report.describe()


@pytest.mark.parametrize("txt", [b"....", b" . \n.", "\u3002".encode(), b"</s>."])
@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"width": 40}, "no caption: no sentence in its txt"),
        ({"caption": None} | METADATA, "no caption: no sentence in its txt"),
        ({"caption": "..."}, "no caption: no sentence in its txt"),
        (None, "no caption: no sentence in caption; --captions KEY names other keys"),
    ],
)
def test_a_txt_without_a_sentence_is_rejected_whatever_its_json_is(
    tmp_path: Path, document: dict[str, Any] | None, reason: str, txt: bytes
) -> None:
    json_member = [] if document is None else [("a.json", encoded(document))]
    path = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), *json_member, ("a.txt", txt)])
    scan = scan_shard(path)
    assert (scan.entries, [rejected.reason for rejected in scan.rejected]) == ([], [reason])


def test_a_txt_without_a_sentence_beside_a_json_of_other_keys_is_damaged_with_a_reason(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.json", encoded(METADATA)), ("a.txt", b"....")])
    scan = scan_shard(path)
    assert (len(scan.entries), scan.unnamed) == (1, 1)  # data.captions.keys may name one of the json's keys
    (document,) = documents(path, scan).values()
    with pytest.raises(DamagedSample, match=r"textcrop needs one of raw_caption.*the document has url, width"):
        draw_captions(CaptionsConfig(), document, SampleKey(0, 0, 0))


def test_the_users_keys_are_the_only_captions(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        **{"a": {"blip": "a dog"} | METADATA, "b": {"caption": "x"}},
        **{"c": {"blip": ["", "a cat"]}, "d": {"blip": ""}},
    }
    path = write_tar(
        tmp_path / "0.tar",
        [
            member
            for key, document in kinds.items()
            for member in ((f"{key}.jpg", picture(0)), (f"{key}.json", encoded(document)), (f"{key}.txt", TXT))
        ],
    )
    assert scan_shard(path).unnamed == 0
    scan = scan_shard(path, rules=ScanRules(captions=("blip",)))
    assert documents(path, scan) == {key: kinds[key] for key in "ac"}
    assert [fault.reason for fault in scan.rejected] == [
        "no caption: it lacks blip and has caption",
        "no caption: blip is empty",
    ]
    assert main(["data", "index", str(tmp_path), "--captions", "blip", "--quiet", "--workers", "1"]) == 0
    data = {"sources": [{"name": "s", "shards": str(tmp_path)}], "captions": {"keys": ["blip"]}}
    verdict = verify_shards(DataConfig.model_validate(data), workers=1, progress=False)
    assert (verdict.samples, verdict.damaged, verdict.left_out) == (2, 0, 2)


def test_samples_that_tar_has_appended_again_are_told(tmp_path: Path) -> None:
    """Both are taken: joined tars may have pictures of their own under equal keys."""
    members = [(f"{key}.{kind}", data) for key in (0, 1) for kind, data in (("jpg", picture(key)), ("txt", b"a dog"))]
    write_tar(tmp_path / "0.tar", [*members, *members[:2], *members[:2]])
    write_tar(tmp_path / "1.tar", members)
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, report.again, sum(report.rejected.values())) == (5, 1, 1)  # the third one is adjacent
    assert (
        "1 sample has the key of a sample before in the shard; both are taken: where they are one" in report.describe()
    )
    again = scan_shard(tmp_path / "0.tar").entries[2].start
    lines = [json.loads(line) for line in (tmp_path / REJECTED).read_text().splitlines()]
    assert {"shard": "0.tar", "key": "0", "reason": f"second sample: at byte {again}, and before at 0"} in lines
    assert count_unindexed(str(tmp_path), {"0.tar"}) == Unindexed(samples=1, again=1)
    read = "1 sample has the key of a sample before in the shard, and both are read"
    source = SourceConfig(name="s", shards=str(tmp_path))
    verdict = verify_shards(DataConfig(sources=(source,)), workers=1, progress=False)
    assert (verdict.again, read in verdict.describe(None)) == (1, True)
    assert (
        open_folder(tmp_path).unindexed().describe()
        == f"not in the index, so never read: 1 sample; {read} (rejected.jsonl)"
    )


def test_captions_under_no_known_key_are_said(tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = [{"blip": "a dog"} | METADATA, {"caption": "x"}, {"blip": "a cat"}]
    members = [(("jpg", picture(0)), ("json", encoded(document))) for document in documents]
    write_tar(tmp_path / "0.tar", [(f"{key}.{kind}", data) for key, pair in enumerate(members) for kind, data in pair])
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, report.unnamed) == (3, 2)
    said = "2 samples have no text or list of texts under a known key; if its captions have another, name it by"
    assert f"{said} --captions KEY here" in report.describe()
    report = index_shards(str(tmp_path), None, rules=ScanRules(("blip",)), workers=1, progress=False)
    assert (report.samples, report.unnamed) == (2, 0)


def test_members_that_lie_apart_are_joined(tmp_path: Path) -> None:
    numbers = range(6)
    pictures = [(f"{number}.jpg", picture(number)) for number in numbers]
    metadata = [(f"{number}.json", encoded({"number": number})) for number in numbers]
    texts = [(f"{number}.txt", f"text {number}".encode()) for number in numbers]
    path = write_tar(tmp_path / "0.tar", [*texts[:3], *pictures, *metadata[::-1], *texts[3:]])
    scan = scan_shard(path)
    assert scan.rejected == []
    expected = {str(number): {"number": number, "caption": f"text {number}"} for number in numbers}
    assert documents(path, scan) == expected
    assert [entry.start for entry in scan.entries] == sorted(entry.start for entry in scan.entries)
    reader = ShardReader()
    for place, entry in enumerate(scan.entries):
        assert reader.read(location(path, scan, place))[0] == picture(int(entry.key))
    reader.close()


def test_members_apart_that_repeat_are_not_joined(tmp_path: Path) -> None:
    members = [("a.jpg", picture(0)), ("b.jpg", picture(1)), ("a.jpg", picture(2)), ("b.json", JSON), ("a.json", JSON)]
    scan = scan_shard(write_tar(tmp_path / "0.tar", members))
    assert keys(scan) == ["b"]
    assert [fault.key for fault in scan.rejected] == ["a", "a", "a"]
    assert [fault.byte for fault in scan.rejected] == sorted(fault.byte for fault in scan.rejected)


def test_keys_end_at_the_last_dot_where_the_first_one_joins_them(tmp_path: Path) -> None:
    names = ["www.Example.org_1", *(f"www.example.org_{number}" for number in range(1, 9))]
    dotted = [(f"{name}.{kind}", data) for name in names for kind, data in (("JPG", picture(0)), ("json", JSON))]
    plain = [("1.jpg", picture(1)), ("1.mask.png", picture(2, "PNG")), ("1.json", JSON)]
    write_tar(tmp_path / "0.tar", [*dotted, *plain])
    write_tar(tmp_path / "1.tar", [*dotted[::2], *dotted[1::2], ("x/www.2.jpg", picture(0))])
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, report.dotted, dict(report.rejected)) == (19, 18, {"no text (.json, .txt)": 1})
    assert "18 keys have dots" in report.describe()
    index = open_folder(tmp_path)
    assert [index.locate(number).entry.key for number in range(19)] == [*names, "1", *names]


def test_a_key_with_dots_beside_its_first_part_is_said_with_the_option(tmp_path: Path) -> None:
    kinds = (("jpg", picture(0)), ("json", JSON))
    write_tar(tmp_path / "0.tar", [(f"{key}.{kind}", data) for key in ("a", "a.2", "a.3") for kind, data in kinds])
    assert index_shards(str(tmp_path), None, workers=1, progress=False).samples == 1
    faults = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [fault["key"] for fault in faults] == ["a.2", "a.3"]
    assert faults[0]["reason"] == "key with dots: a part of a; --last-dot makes it a sample of its own"
    assert main(["data", "index", str(tmp_path), "--last-dot", "--quiet", "--workers", "1"]) == 0
    data = DataConfig.model_validate({"sources": [{"name": "s", "shards": str(tmp_path)}]})
    verdict = verify_shards(data, workers=1, progress=False)
    assert (verdict.samples, verdict.sound) == (3, True)


def test_what_was_indexed_by_other_rules_is_indexed_again(tmp_path: Path) -> None:
    shard = IndexedShard("0.tar", 3, 10, (("a", "no caption"),), None, dotted=2, unnamed=1, again=(("b", "too"),))
    shard = shard._replace(texts=(("blip.txt", 3),))
    Unfinished(tmp_path / "unfinished", DEFAULT_RULES, str).append(shard)
    assert Unfinished(tmp_path / "unfinished", DEFAULT_RULES, str).read(["0.tar"]) == {"0.tar": shard}
    assert Unfinished(tmp_path / "unfinished", ScanRules(("blip",)), str).read(["0.tar"]) == {}


def test_the_help_names_every_key_of_captions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "index", "--help"])
    said = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert {*KNOWN_KEYS, *OTHER_NAMES} <= set(said)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "a.json",
            b'{"caption": "one", "caption": "two"}',
            "unreadable json: the key 'caption' stands twice in one object",
        ),
        ("a.txt", bytes(20), "unreadable txt: NUL at byte 0"),
        ("a.txt", b"caf\xe9", "unreadable txt: 'utf-8' codec"),
        ("a.txt", "a cat".encode("utf-16"), "unreadable txt: "),
    ],
)
def test_a_text_that_would_be_changed_in_passing_rejects_its_sample(
    tmp_path: Path, name: str, text: bytes, reason: str
) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), (name, text), ("b.jpg", picture(1)), ("b.txt", TXT)])
    scan = scan_shard(path)
    assert keys(scan) == ["b"]
    (rejected,) = scan.rejected
    assert rejected.key == "a"
    assert rejected.reason.startswith(reason)


@pytest.mark.parametrize(
    ("kinds", "read"), [("jpg png", "jpg"), ("png jpg", "jpg"), ("jpeg png", "png"), ("webp jpeg", "jpeg")]
)
def test_of_two_pictures_one_is_read_and_the_other_is_counted(tmp_path: Path, kinds: str, read: str) -> None:
    # In the order of the published loader, whichever comes first in the tar.
    data = {kind: picture(number, "JPEG") for number, kind in enumerate(kinds.split())}
    members = [("a.txt", TXT), *((f"a.{kind}", data[kind]) for kind in data), ("b.jpg", picture(5)), ("b.txt", TXT)]
    path = write_tar(tmp_path / "0.tar", members)
    report = index_shards(str(tmp_path), None, progress=False)
    assert (report.samples, report.unread, dict(report.rejected)) == (2, 1, {})
    assert "1 second picture of a sample not read: the first of .jpg, .png, .jpeg, .webp is" in report.describe()
    (other,) = set(kinds.split()) - {read}
    (line,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (line["key"], line["reason"]) == ("a", f"second picture: .{read} is read, not .{other}")
    scan, reader = scan_shard(path), ShardReader()
    assert reader.read(location(path, scan, 0))[0] == data[read]
    reader.close()
    config = DataConfig.model_validate({"sources": [{"name": "s", "shards": str(tmp_path)}]})
    verdict = verify_shards(config, workers=1, progress=False)
    assert (verdict.sound, verdict.unread) == (True, 1)
    assert "1 second picture of a sample not read" in verdict.describe(None)


def test_texts_of_other_endings_beside_the_one_that_is_read_are_told(tmp_path: Path) -> None:
    """Such as captions of another captioner: whoever added them would train on the old ones without a word."""
    others = [("a.caption", TXT), ("a.blip.txt", TXT), ("b.Blip.TXT", TXT), ("b.caption_2.json", b"{}")]
    kept = [("a.mask.png", b""), ("b.cls", b"3"), ("b.bbox.json", b"{}")]
    pairs = [(f"{key}.{kind}", data) for key in "ab" for kind, data in (("jpg", picture(0)), ("txt", TXT))]
    write_tar(tmp_path / "0.tar", sorted([*others, *kept, *pairs]))
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert report.texts == {"caption": 1, "blip.txt": 1, "Blip.txt": 1, "caption_2.json": 1}
    assert "1 sample has a .blip.txt that is not read: captions are those of the .json or .txt" in report.describe()
    assert "bbox" not in report.describe()


def test_of_two_texts_or_pictures_of_one_extension_the_second_is_a_rejected_sample(tmp_path: Path) -> None:
    repeats = [("a.jpg", picture(0)), ("a.JPG", picture(1)), ("a.txt", TXT)]
    texts = [("b.jpg", picture(2)), ("b.txt", TXT), ("b.TXT", b"other")]
    path = write_tar(tmp_path / "0.tar", [*repeats, *texts, ("A.jpg", picture(3)), ("A.txt", TXT)])
    scan = scan_shard(path)
    assert keys(scan) == ["b", "A"]
    assert [(fault.key, fault.reason.split(":")[0]) for fault in scan.rejected] == [
        ("a", "no text (.json, .txt)"),
        ("a", "duplicate key"),
        ("b", "duplicate key"),
    ]


def test_endings_that_are_found_are_named_beside_those_that_are_accepted(tmp_path: Path) -> None:
    lacking = [("a.jpe", picture(0)), ("a.txt", TXT), ("b.jpg", picture(1)), ("b.caption", TXT), ("b.cls", b"1")]
    scan = scan_shard(write_tar(tmp_path / "0.tar", [*lacking, ("c.jpg", picture(2))]))
    assert [fault.reason for fault in scan.rejected] == [
        "no picture (.jpg, .jpeg, .png, .webp), but .jpe",
        "no text (.json, .txt), but .caption, .cls",
        "no text (.json, .txt)",
    ]


def test_links_and_copies_of_a_shard_are_named(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("a.jpg", picture(number)), ("a.txt", TXT)])
    (tmp_path / "2.tar").symlink_to(tmp_path / "0.tar")
    (tmp_path / "3.tar").hardlink_to(tmp_path / "1.tar")
    report = index_shards(str(tmp_path), None, progress=False)
    assert report.alike == [("2.tar", "0.tar"), ("3.tar", "1.tar")]
    assert "2 shards look like another one (2.tar like 0.tar): if they are one, its samples count twice" in (
        report.describe()
    )


def test_a_page_in_place_of_a_far_shard_is_asked_for_again(tmp_path: Path) -> None:
    """A server that asks for a login answers with a page: once logged in, the same command reads the shard itself."""
    shard = write_shards(tmp_path / "far", [2]) / "00000.tar"
    answer = tmp_path / "answer"
    answer.write_text("<html>please log in</html>")
    pattern = f"pipe:cat {answer} # 00000.tar"
    with pytest.raises(UserError, match="no usable sample in 1 shard"):
        index_shards(pattern, tmp_path / "index", workers=1, progress=False)
    answer.write_bytes(shard.read_bytes())
    assert index_shards(pattern, tmp_path / "index", workers=1, progress=False).samples == 2


def test_far_shards_that_are_done_say_nothing_of_others_of_their_names(tmp_path: Path) -> None:
    here, there = write_shards(tmp_path / "here", [2]), write_shards(tmp_path / "there", [5, 3])
    with pytest.raises(UserError, match=r"00001\.tar"):  # it is missing here, so that the indexing stays unfinished
        index_shards(f"file://{here}/{{00000..00001}}.tar", tmp_path / "index", workers=1, progress=False)
    report = index_shards(f"file://{there}/{{00000..00001}}.tar", tmp_path / "index", workers=1, progress=False)
    assert report.samples == 8


def test_an_unreadable_line_hides_no_line_behind_it(tmp_path: Path) -> None:
    line = '{"shard": "0.tar", "key": "1", "reason": "no picture"}'
    (tmp_path / REJECTED).write_text(f'{line}\ncut {{\n{{"shard": ["0.tar"]}}\n{line}\n')
    assert count_unindexed(str(tmp_path), {"0.tar"}).samples == 2
