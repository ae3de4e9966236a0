"""Which members make a sample, what breaks a shard, and reading by offset."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.samples.sample import DamagedSample, UnreachableShard
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.reader import Location, ShardFile, ShardReader
from cosmos_scale.data.shards.scan import ShardScan, scan_shard
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import flip_bytes, picture, sample, write_shard

JSON = b'{"raw_caption": ["a"]}'


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(scan: ShardScan) -> list[str]:
    return [entry.key for entry in scan.entries]


def location(path: Path, scan: ShardScan, place: int) -> Location:
    return Location(ShardFile("test", str(path), scan.size, str(path)), scan.entries[place])


def test_samples_are_read_back_byte_for_byte(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(5)]
    path = write_shard(tmp_path / "a.tar", samples)
    scan = scan_shard(path)
    assert keys(scan) == [members["__key__"] for members in samples]
    assert (scan.rejected, scan.torn) == ([], None)
    reader = ShardReader()
    for place in (3, 0, 4, 1, 2):
        image, document = reader.read(location(path, scan, place))
        assert image == samples[place]["jpg"]
        assert document == json.loads(samples[place]["json"])
    reader.close()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_grouped_by_webdatasets_rule(tmp_path: Path, tar_format: int) -> None:
    long_name = "folder/" + "n" * 90  # over 100 bytes with its extension: GNU and pax formats write an extra header
    webp, png = picture(1, "WEBP"), picture(2, "PNG")
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.JPEG", picture(0)),
            ("x/1.json", JSON),
            ("y/1.webp", webp),  # the folder belongs to the key
            ("y/1.txt", " ein Täxt \n".encode()),
            ("2.mask.png", b"left alone: its extension is mask.png"),
            ("2.png", png),
            ("2.txt", b"preferred is json"),
            ("2.json", JSON),
            (f"{long_name}.jpg", picture(3)),
            (f"{long_name}.json", JSON),
        ],
        tar_format,
    )
    scan = scan_shard(path)
    assert keys(scan) == ["x/1", "y/1", "2", long_name]
    assert scan.rejected == []
    reader = ShardReader()
    assert reader.read(location(path, scan, 1)) == (webp, {"caption": "ein Täxt"})
    assert reader.read(location(path, scan, 2)) == (png, json.loads(JSON))
    assert reader.read(location(path, scan, 3))[0] == picture(3)
    reader.close()


def test_unusable_samples_are_named(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("good.jpg", picture(0)),
            ("good.json", JSON),
            ("no_text.jpg", picture(0)),
            ("no_picture.json", JSON),
            ("gif.jpg", b"GIF89a" + bytes(50)),
            ("gif.json", JSON),
            ("empty.jpg", b""),
            ("empty.json", JSON),
            ("cut.jpg", picture(0)[:-200]),
            ("cut.json", JSON),
            ("broken.jpg", picture(0)),
            ("broken.json", b"{"),
            ("list.jpg", picture(0)),
            ("list.json", b"[1]"),
            ("blank.jpg", picture(0)),
            ("blank.txt", b" \n"),
            ("null.jpg", picture(0)),
            ("null.json", b'{"caption": null, "raw_caption": ["", {"x": []}], "label": 3}'),
            ("deep.jpg", picture(0)),
            ("deep.json", b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}"),
            ("class.jpg", picture(0)),
            ("class.json", b'{"classes": [{"name": "cat"}]}'),
            ("nan.jpg", picture(0)),
            ("nan.json", b'{"caption": NaN, "shortSV_captions": [" ", null], "Text": "", "url": "http://x/1"}'),
            ("trailer.jpg", picture(0) + bytes(10_000)),  # cameras append data of their own
            ("trailer.json", JSON),
        ],
    )
    scan = scan_shard(path)
    assert keys(scan) == ["good", "class", "trailer"]
    assert {fault.key: fault.reason.split(":")[0] for fault in scan.rejected} == {
        "no_text": "no text (.json, .txt)",
        "no_picture": "no picture (.jpg, .jpeg, .png, .webp)",
        "gif": "a GIF, not a JPEG, PNG or WebP picture",
        "empty": "not a JPEG, PNG or WebP picture",
        "cut": "damaged JPEG",
        "broken": "unreadable json",
        "list": "json is a list, not an object",
        "blank": "empty text",
        "null": "empty text",
        "deep": "empty text",
        "nan": "no caption",
    }


def test_samples_that_repeat_a_key_are_named(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", picture(0)),
            ("a.txt", b"first"),
            ("a.jpg", picture(1)),
            ("a.json", b'{"caption": "second"}'),
            ("a.JPG", picture(2)),
            ("b.cls", b"left alone"),
            ("b.cls", b"left alone"),
            ("b.jpg", picture(3)),
            ("b.json", JSON),
        ],
    )
    scan = scan_shard(path)
    assert keys(scan) == ["a", "b"]
    assert [(fault.key, fault.reason.split(":")[0]) for fault in scan.rejected] == [("a", "duplicate key")] * 2
    reader = ShardReader()
    assert reader.read(location(path, scan, 0)) == (picture(0), {"caption": "first"})
    reader.close()


def test_every_cut_keeps_the_whole_samples_before_it(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(3)])
    whole = path.read_bytes()
    entries = scan_shard(path).entries
    end = (entries[-1].text_offset + entries[-1].text_size + 511) // 512 * 512
    cut_path = tmp_path / "cut.tar"
    for size in range(256, len(whole) - 512, 256):
        cut_path.write_bytes(whole[:size])
        scan = scan_shard(cut_path)
        kept = [e for e in entries if max(e.image_offset + e.image_size, e.text_offset + e.text_size) <= size]
        assert scan.entries == kept
        assert (scan.torn is None) == (size >= end + 512)  # one block of zeros ends an archive


def test_a_damaged_header_is_told_from_the_end(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(3)])
    second = scan_shard(path).entries[1]
    flip_bytes(path, second.image_offset - 512, 300)
    scan = scan_shard(path)
    assert keys(scan) == ["000000"]
    assert scan.torn == f"damaged: no tar header at byte {second.image_offset - 512}; the rest cannot be reached"


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_is_torn_from_the_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    scan = scan_shard(path)
    assert scan.entries == []
    assert scan.torn is not None
    assert scan.torn.startswith("not a tar file")


def test_a_compressed_shard_is_refused_whatever_its_name(tmp_path: Path) -> None:
    plain = write_shard(tmp_path / "plain.tar", [sample(0)])
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar: is gzip-compressed"):
        scan_shard(path)


def test_a_pointer_of_git_lfs_is_no_shard_beside_others(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample(0)])
    (tmp_path / "1.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 102400\n")
    with pytest.raises(UserError, match=r"1\.tar: is a pointer of Git LFS, no shard; rule: fetch the file itself"):
        index_shards(str(tmp_path), None, workers=1, progress=False)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar: is a pointer of Git LFS, no shard"):
        index_shards(str(tmp_path), None, workers=1, progress=False)


def test_a_stale_or_missing_shard_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(2)])
    scan = scan_shard(path)
    write_shard(path, [sample(number) for number in range(9)])
    place = location(path, scan, 0)
    with pytest.raises(UnreachableShard, match=r"a\.tar: .*: has \d+ bytes, but its index was made when it had \d+"):
        ShardReader().read(place)
    with pytest.raises(UserError, match=r"a\.tar: has \d+ bytes, .* run `cosmos-scale data index` again") as error:
        ShardReader().check([place.file])
    assert not isinstance(error.value, UnreachableShard)
    path.unlink()
    place = location(path, scan, 0)
    with pytest.raises(UserError, match=r"a\.tar: shard of source test cannot be opened: No such file"):
        ShardReader().check([place.file])
    with pytest.raises(UnreachableShard, match=r"a\.tar: shard of source test cannot be opened any more: No such file"):
        ShardReader(RemoteConfig(retries=0)).read(place)


def test_a_changed_shard_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(2)])
    scan = scan_shard(path)
    members = [{**sample(number), "jpg": picture(number)[:-1]} for number in range(2)]
    write_shard(path, members)
    assert path.stat().st_size == scan.size
    reader = ShardReader()
    with pytest.raises(DamagedSample, match="the shard has changed or is damaged"):
        reader.read(location(path, scan, 0))
    reader.close()


@pytest.mark.parametrize("base_256", [False, True])
def test_sizes_in_headers_may_have_other_forms(tmp_path: Path, base_256: bool) -> None:
    """Some writers of tars pad digits with spaces, where Python's own pads with zeros; GNU's may write base 256."""
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(2)])
    entry = scan_shard(path).entries[1]
    data = bytearray(path.read_bytes())
    for offset, size in ((entry.image_offset, entry.image_size), (entry.text_offset, entry.text_size)):
        header = data[offset - 512 : offset]
        header[124:136] = b"\x80" + size.to_bytes(11, "big") if base_256 else b"%11o " % size
        header[148:156] = b" " * 8  # the checksum counts itself as spaces
        header[148:156] = b"%06o\0 " % sum(header)
        data[offset - 512 : offset] = header
    path.write_bytes(data)
    scan = scan_shard(path)
    assert keys(scan) == ["000000", "000001"]
    reader = ShardReader()
    assert reader.read(location(path, scan, 1))[0] == picture(1)
    reader.close()


def test_a_line_of_the_index_that_points_out_of_the_shard_costs_one_sample(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(2)])
    scan = scan_shard(path)
    place = location(path, scan, 0)
    reader = ShardReader()
    good = place.entry
    for entry in (
        good._replace(image_offset=-(2**60)),
        good._replace(image_offset=511),
        good._replace(text_offset=scan.size),
        good._replace(image_size=2**60),
        good._replace(image_size=-1),
        good._replace(text_size=-600),
    ):
        with pytest.raises(DamagedSample, match="the index is damaged"):
            reader.read(place._replace(entry=entry))
    reader.close()


def test_few_shards_stay_open(tmp_path: Path) -> None:
    paths = [write_shard(tmp_path / f"{number}.tar", [sample(number)]) for number in range(6)]
    reader = ShardReader(open_shards=2)
    for _ in range(2):
        for number, path in enumerate(paths):
            image, _ = reader.read(location(path, scan_shard(path), 0))
            assert image == picture(number)
    held = [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.resolve() in paths]
    assert len(held) == 2
    reader.close()
