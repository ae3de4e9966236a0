"""Indexes on disk: patterns, reports, several sources, and what is refused."""

import io
import json
import shutil
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import SourceConfig
from cosmos_scale.data.shards.index import index_shards, open_index, open_sources
from cosmos_scale.data.shards.mark import HEAD, is_other, mark_of
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.shards.summary import FORMAT
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import flip_bytes, open_folder, picture, sample, write_shard, write_shards


def source(pattern: str | Path, index: Path | None = None, name: str = "test") -> SourceConfig:
    return SourceConfig(name=name, shards=str(pattern), index=None if index is None else str(index))


def rejected(folder: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_every_sample_of_every_source_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [3, 4])
    write_shards(tmp_path / "b", [2, 5, 1])
    merged = open_sources([source(tmp_path / "a", name="a"), source(tmp_path / "b", name="b")])
    assert len(merged) == 15
    assert merged.shard_samples.tolist() == [3, 4, 2, 5, 1]
    reader = ShardReader()
    for number in range(15):
        location = merged.locate(number)
        expected = number if number < 7 else number - 7
        assert location.source == ("a" if number < 7 else "b")
        assert location.entry.key == f"{expected:06d}"
        assert reader.read(location)[0] == picture(expected)
    reader.close()
    with pytest.raises(IndexError):
        merged.locate(15)


def test_workers_and_a_folder_of_its_own_make_the_same_index(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [3, 1, 4, 2])
    out = tmp_path / "index" / "deep"
    report = index_shards(str(folder), out, workers=2, progress=False)
    assert (report.samples, report.shards, report.torn, report.folder) == (10, 4, 0, out)
    for path in [*folder.glob("*.npy"), folder / "index.json"]:
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(open_index(source(folder, out)).rows) == 4


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x", []),
        ("x/a-0.tar", ["a-0.tar"]),
        ("x/a-{0..1}.tar", ["a-0.tar", "a-1.tar"]),
        ("x/?-1.tar", ["a-1.tar", "b-1.tar"]),
        ("x/{a,b}-[01].tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("*/b-*.tar", ["x/b-0.tar", "x/b-1.tar"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, names: list[str]) -> None:
    (tmp_path / "x").mkdir()
    all_names = [f"{letter}-{number}.tar" for letter in "ab" for number in range(2)]
    for number, name in enumerate(all_names):
        write_shard(tmp_path / "x" / name, [sample(number)])
    out = tmp_path / "index"
    index_shards(str(tmp_path / pattern), out, workers=1, progress=False)
    opened = open_index(source(tmp_path / pattern, out))
    assert [row.name for row in opened.rows] == (names or all_names)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("set[1]{x}", ["0.tar", "[2]{3}.tar"]),
        ("set[1]{x}/0.tar", ["0.tar"]),
        ("set[1]{x}/[2]{3}.tar", ["[2]{3}.tar"]),
        ("set[1]{x}/?.tar", ["0.tar"]),
        ("set[1]{x}/{0,[[]2]*}.tar", ["0.tar", "[2]{3}.tar"]),
        ("{set[2],none}/*.tar", None),
        ("s*/{0,1}.tar", ["set1/0.tar", "set[1]{x}/0.tar", "set[2]/0.tar"]),
    ],
)
def test_a_path_that_exists_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str] | None
) -> None:
    for number, name in enumerate(("set[1]{x}/0.tar", "set[1]{x}/[2]{3}.tar", "set1/0.tar", "set[2]/0.tar")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [sample(number)])
    monkeypatch.chdir(tmp_path)
    for place, start in (("a", f"{tmp_path}/"), ("b", "")):
        out = tmp_path / place
        index_shards(start + pattern, out, workers=1, progress=False)
        opened = open_index(source(start + pattern, out))
        assert [row.name for row in opened.rows] == (names or ["set[2]/0.tar"])
        assert all(Path(opened.shard_file(shard).address).is_file() for shard in range(len(opened.rows)))


def test_indexing_another_pattern_keeps_what_is_known(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0", "val-0")):
        write_shard(tmp_path / f"{name}.tar", [sample(number), {"__key__": f"no_text_{name}", "jpg": picture(0)}])
    index_shards(str(tmp_path / "train-*.tar"), None, workers=1, progress=False)
    index_shards(str(tmp_path / "val-*.tar"), None, workers=1, progress=False)
    index_shards(str(tmp_path / "val-*.tar"), None, workers=1, progress=False)
    assert [row.name for row in open_index(source(tmp_path)).rows] == ["train-0.tar", "val-0.tar"]
    assert [row.name for row in open_index(source(tmp_path / "val-*.tar")).rows] == ["val-0.tar"]
    assert [fault["key"] for fault in rejected(tmp_path)] == ["no_text_train-0", "no_text_val-0"]


def test_faults_are_counted_and_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample(0), {"__key__": "lonely", "jpg": picture(1)}, sample(2)])
    torn = write_shard(tmp_path / "1.tar", [sample(3), sample(4)])
    torn.write_bytes(torn.read_bytes()[: scan_shard(torn).entries[1].text_offset])
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, report.torn) == (3, 1)
    assert dict(report.rejected) == {"no text (.json, .txt)": 2}
    lines = rejected(tmp_path)
    assert [(line["shard"], line["key"]) for line in lines] == [
        ("0.tar", "lonely"),
        ("1.tar", "000004"),
        ("1.tar", None),
    ]
    assert str(lines[2]["reason"]).startswith("truncated: member 000004.json should end at byte")
    assert "1 shard breaks off" in report.describe()
    assert "2 samples rejected: no text" in report.describe()


def test_a_shard_without_samples_is_stepped_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample(0)])
    (tmp_path / "1.tar").write_bytes(b"garbage")
    write_shard(tmp_path / "2.tar", [sample(1)])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert [open_folder(tmp_path).locate(number).entry.key for number in range(2)] == ["000000", "000001"]


def test_nothing_to_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar shards match"):
        index_shards(str(tmp_path), None, progress=False)
    with pytest.raises(UserError, match=r"no \.tar shards match"):
        index_shards(str(tmp_path / "*.tar"), None, progress=False)
    write_shard(tmp_path / "0.tar", [sample(0)])
    with pytest.raises(UserError, match=r"nowhere: no such shard or folder of shards"):
        index_shards(str(tmp_path / "nowhere"), None, progress=False)
    with pytest.raises(UserError, match=r"2 of its shards do not exist, the first is .*1\.tar"):
        index_shards(str(tmp_path / "{0..2}.tar"), None, progress=False)
    (tmp_path / "0.tar").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"no usable sample in 1 shard; see .*rejected\.jsonl"):
        index_shards(str(tmp_path), None, workers=1, progress=False)
    (tmp_path / "1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.tar\.gz: is compressed"):
        index_shards(str(tmp_path), None, progress=False)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [1])
    with pytest.raises(UserError, match=r"deep: cannot be made: Not a directory; name another folder with --out"):
        index_shards(str(folder), folder / "00000.tar" / "deep", workers=1, progress=False)
    (folder / "index.json").unlink()
    (folder / "index.json").mkdir()
    with pytest.raises(UserError, match=r"index\.json: (not a shard index|cannot be written)"):
        index_shards(str(folder), None, workers=1, progress=False)


@pytest.mark.parametrize("pattern", ["", "{,}", "{a.tar,}"])
def test_an_empty_path_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^'.*': means an empty path; name a folder") as error:
        index_shards(pattern, None, workers=1, progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="means an empty path"):
        open_index(source(pattern))


def test_damaged_lines_of_rejects_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "0.tar", [sample(0), {"__key__": "lonely", "jpg": picture(1)}])
    other = {"shard": "1.tar", "key": "k", "reason": "r"}
    damaged = [b'{"shard": "1.t', b"[1]", b"\xff\xfe", b'{"shard": ["0.tar"]}']
    (tmp_path / "rejected.jsonl").write_bytes(b"\n".join([json.dumps(other).encode(), *damaged]))
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert rejected(tmp_path) == [other, {"shard": "0.tar", "key": "lonely", "reason": "no text (.json, .txt)"}]
    assert capsys.readouterr().err == f"{tmp_path / 'rejected.jsonl'}: 4 unreadable lines are dropped\n"


def test_an_error_in_a_worker_process_arrives_as_it_is(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(UserError, match=r"0\.tar: is gzip-compressed"):
        index_shards(str(tmp_path), None, workers=2, progress=False)


def test_missing_and_stale_indexes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        open_sources([])
    with pytest.raises(UserError, match=r"data source test: no \.tar shards match"):
        open_index(source(tmp_path / "nowhere"))
    write_shard(tmp_path / "0.tar", [sample(0), sample(1)])
    with pytest.raises(UserError, match=r"no index at .*index\.json; run `cosmos-scale data index "):
        open_index(source(tmp_path))
    index_shards(str(tmp_path), None, workers=1, progress=False)
    write_shard(tmp_path / "1.tar", [sample(2)])
    with pytest.raises(UserError, match=r"1 shard is not in .*index\.json, the first is 1\.tar"):
        open_index(source(tmp_path))
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"no shard in .* matches"):
        open_index(source(tmp_path / "x*.tar"))
    with pytest.raises(UserError, match=r"2 shards are not in .*index\.json, the first is 3\.tar"):
        open_index(source(tmp_path / "{0,3,4}.tar"))
    (tmp_path / "0.index.npy").unlink()
    with pytest.raises(
        UserError, match=r"0\.tar: shard .*0\.index\.npy cannot be read: No such file or directory; run "
    ):
        open_folder(tmp_path).locate(0)
    shutil.copy(write_shards(tmp_path / "other", [5]) / "00000.index.npy", tmp_path / "0.index.npy")
    with pytest.raises(UserError, match=r"holds 5 samples, but index\.json says 2"):
        open_folder(tmp_path).locate(0)


def test_keys_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    """Old tars have such names: they must not end a run, and messages must be printable."""
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for kind in ("jpg", "json"):
            info = tarfile.TarInfo(f"caf\udce9.{kind}")
            info.size = len(sample(0)[kind])
            shard.addfile(info, io.BytesIO(sample(0)[kind]))
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert open_folder(tmp_path).locate(0).entry.key == "caf\\xe9"
    assert main(["data", "verify", str(tmp_path), "--quiet", "--workers", "1"]) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', f'{{"format": "{FORMAT}", "shards": [1]}}'])
def test_a_broken_summary_is_an_error(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: not a shard index"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", f'{{"format": "{FORMAT}", "shards": [1]}}'])
def test_a_broken_summary_is_made_anew(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [2, 1])
    (tmp_path / "index.json").write_text(content)
    assert index_shards(str(tmp_path), None, workers=1, progress=False).samples == 3
    assert len(open_folder(tmp_path)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'index.json'}: not a shard index (")


def test_the_fingerprint_tells_what_the_order_depends_on(tmp_path: Path) -> None:
    first = open_folder(write_shards(tmp_path / "a", [2, 3])).fingerprint()
    assert open_folder(write_shards(tmp_path / "b", [2, 3])).fingerprint() == first  # moved, not changed
    assert open_folder(write_shards(tmp_path / "c", [3, 2])).fingerprint() != first


def test_an_index_needs_no_shards_until_a_sample_is_read(tmp_path: Path) -> None:
    """30 million samples in 6,388 shards: the tables of two shards suffice to reach samples in these shards."""
    folder = write_shards(tmp_path, [4])
    table = np.load(folder / "00000.index.npy")
    count = 4697
    rows = [[f"{shard:05d}.tar", count, 1_000_000] for shard in range(6388)]
    (folder / "index.json").write_text(json.dumps({"format": FORMAT, "shards": rows}))
    (folder / "00000.tar").unlink()
    index = open_folder(folder)
    assert len(index) == 6388 * count
    sample_id = EpochOrder(index.source_shards(), 0, 65536).sample(1, int(0.9 * len(index)))
    np.save(folder / f"{sample_id // count:05d}.index.npy", np.resize(table, count))
    location = index.locate(sample_id)
    assert location.shard == str(folder / f"{sample_id // count:05d}.tar")
    assert location.entry.key == f"{sample_id % count % 4:06d}"
    with pytest.raises(UserError, match="cannot be opened"):
        ShardReader().check([location.file])


def test_damage_inside_a_picture_is_left_to_the_decoder(tmp_path: Path) -> None:
    """The index reads headers and texts: a flipped bit between a JPEG's ends must not slow or stop it."""
    path = write_shard(tmp_path / "0.tar", [sample(0)])
    entry = scan_shard(path).entries[0]
    flip_bytes(path, entry.image_offset + entry.image_size // 2, 8)
    assert scan_shard(path).entries == [entry]


def test_an_index_of_other_shards_is_not_replaced(tmp_path: Path) -> None:
    """Two datasets with shards of the same names, or of others, in one folder of index files."""
    first, second = write_shards(tmp_path / "a", [3, 2]), write_shards(tmp_path / "b", [4])
    third = tmp_path / "c"
    third.mkdir()
    write_shard(third / "x.tar", [sample(9)])
    out = tmp_path / "index"
    index_shards(str(first), out, workers=1, progress=False)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    for other, held in ((second, "1 shard of the same names"), (third, r"other shards \(00000\.tar, \.\.\.\)")):
        with pytest.raises(UserError, match=rf"index: has the index of {held}.*another folder with --out"):
            index_shards(str(other), out, workers=1, progress=False)
        with pytest.raises(UserError, match=r"not in .*index\.json|no shard in"):
            open_sources([source(third, out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    # The same shards at another place are no other shards, nor are shards of which some have changed.
    copied = tmp_path / "copied"
    shutil.copytree(first, copied)
    write_shard(copied / "00000.tar", [sample(7)])
    assert index_shards(str(copied), out, workers=1, progress=False).samples == 3
    assert index_shards(str(copied), out, workers=1, progress=False).samples == 3


def test_a_shard_of_the_same_name_and_size_is_told_from_the_indexed_one(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", [2, 1])
    size = (folder / "00001.tar").stat().st_size
    merged = open_folder(folder)
    write_shard(folder / "00001.tar", [sample(77)])
    assert (folder / "00001.tar").stat().st_size == size
    with closing(ShardReader()) as reader, pytest.raises(UserError, match=r"00001\.tar: is another shard than the one"):
        reader.check(merged.shard_files())
    # An index from before there were marks is read as before.
    summary = json.loads((folder / "index.json").read_text())
    del summary["marks"]
    (folder / "index.json").write_text(json.dumps(summary))
    with closing(ShardReader()) as reader:
        reader.check(open_folder(folder).shard_files())


def test_damage_at_one_place_does_not_make_another_shard(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", [sample(number) for number in range(4)])
    head = path.read_bytes()[:HEAD]
    mark = mark_of(head)
    assert len(mark) == 32
    for block in range(8):
        damaged = bytearray(head)
        damaged[block * 512 : block * 512 + 512] = bytes(512)
        assert not is_other(mark, bytes(damaged))
    assert not is_other(mark, bytes(HEAD))  # nothing of it is left: damage, and no other tar
    other = write_shard(tmp_path / "1.tar", [sample(number) for number in range(4, 8)]).read_bytes()
    assert is_other(mark, other[:HEAD])
    assert is_other(mark, other[:512])  # of a server's shard one block is read


def test_no_index_is_written_into_the_current_folder_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [1])
    monkeypatch.chdir(tmp_path)
    for pattern in ("{a,b}/00000.tar", "*/00000.tar"):
        with pytest.raises(UserError, match=r"^--out: must name a folder for the index"):
            index_shards(pattern, None, workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert index_shards("{a,b}/00000.tar", tmp_path / "index", workers=1, progress=False).samples == 3
    monkeypatch.chdir(tmp_path / "a")
    assert index_shards("*.tar", None, workers=1, progress=False).samples == 2  # beside the shards, which lie here


def test_members_that_share_no_key_are_explained(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("1/image.jpg", picture(1)), ("1/caption.txt", b"a text")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    key = r"members of one sample share the name before the first dot: 1\.jpg and 1\.txt, not image\.jpg and"
    with pytest.raises(UserError, match=rf"no usable sample in 1 shard; see .*; {key}"):
        index_shards(str(tmp_path), None, workers=1, progress=False)
    write_shard(tmp_path / "1.tar", [sample(0)])
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert "members of one sample share the name before the first dot" in report.describe()


def test_shards_that_changed_are_indexed_anew_beside_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "a", [2, 2])
    monkeypatch.chdir(tmp_path)
    for number, out in enumerate((None, Path("a"), tmp_path / "a"), 1):
        for name in ("00000.tar", "00001.tar"):
            write_shard(tmp_path / "a" / name, [sample(10 * number)])
        assert index_shards("a", out, workers=1, progress=False).samples == 2


def test_a_table_that_is_cut_off_is_found_before_a_run(tmp_path: Path) -> None:
    index_shards(str(write_shards(tmp_path, [3, 4])), None, progress=False)
    open_folder(tmp_path).check_tables([0, 1])
    table = sorted(tmp_path.glob("*.index.npy"))[1]
    table.write_bytes(table.read_bytes()[:-20])
    open_folder(tmp_path).check_tables([0])
    with pytest.raises(UserError, match=r"its index .*.index.npy cannot be read: damaged; run `cosmos-scale"):
        open_folder(tmp_path).check_tables([0, 1])


def test_a_refused_indexing_leaves_the_index_before_it(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [2, 3])
    before = {path.name: path.read_bytes() for path in folder.glob("*index*")}
    assert main(["data", "index", str(folder), "--captions", "mistyped", "--quiet"]) == 2
    assert {path.name: path.read_bytes() for path in folder.glob("*index*")} == before
