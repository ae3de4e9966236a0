"""The manifest that `data build` writes: checksums for `data verify`, in the way of nothing that reads shards."""

import errno
import io
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosmos_scale.cli.main import main
from cosmos_scale.data.prepare.datasets import DREAMLIP
from cosmos_scale.data.prepare.prepare import prepare_dataset
from cosmos_scale.data.shards import checksums
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.tools import build as build_module
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.verify import CHANGED
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import open_folder, picture, write_shard


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Six pictures, two a shard; no row of the second shard can be used."""
    (tmp_path / "images").mkdir()
    for number in (0, 1, 4, 5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    rows = [{"image": f"{number}.jpg", "caption": f"a cat {number}"} for number in range(6)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def build(folder: Path, out: str = "out") -> Path:
    captions = folder / "captions.jsonl"
    build_shards(folder / "images", captions, folder / out, samples_per_shard=2, workers=1, progress=False)
    return folder / out


def as_json(capsys: pytest.CaptureFixture[str], command: str, *arguments: object) -> dict[str, Any]:
    status = main(["data", command, *map(str, arguments), "--json", "--quiet", "--workers=1"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if found.get("sound", True) else 1)
    return found


def test_the_manifest_has_each_shards_size_and_digest(inputs: Path) -> None:
    out = build(inputs)
    manifest = json.loads((out / "manifest.json").read_text())
    data = {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}
    assert list(data) == ["000000.tar", "000002.tar"]
    assert len(manifest.pop("made_of")) == len(manifest.pop("pictures_digest")) == 16
    assert str(inputs) not in json.dumps(manifest)  # shards are handed on, and paths are of this machine
    assert manifest.pop("options")["samples-per-shard"] == 2
    assert manifest == {
        "format": build_module.MANIFEST_FORMAT,
        "samples": 4,
        "bytes": sum(map(len, data.values())),
        "shards": [
            {"shard": name, "samples": 2, "bytes": len(content), "sha256": sha256(content).hexdigest()}
            for name, content in data.items()
        ],
    }


def test_a_caption_rewritten_at_equal_length_is_named(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = build(inputs)
    found = as_json(capsys, "verify", out)
    assert (found["sound"], found["checksums"]) == (True, 2)
    shard = out / "000002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a cat 5", b"a dog 5"))
    for _ in range(2):  # an index that is made anew changes nothing
        found = as_json(capsys, "verify", out)
        assert (found["damaged"], found["shards_damaged"], found["checksums"]) == (0, 1, 2)
        assert [(fault["shard"], fault["reason"]) for fault in found["first"]] == [(str(shard), CHANGED)]
        index_shards(str(out), None, workers=1, progress=False)


def test_the_manifest_is_in_the_way_of_no_listing(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = build(inputs)
    for pattern in ("", "/{000000,000002}.tar", "/*.tar", "/00000?.tar"):
        index = index_shards(f"{out}{pattern}", None, workers=1, progress=False)
        assert (index.shards, index.samples) == (2, 4)
        assert as_json(capsys, "verify", f"{out}{pattern}")["checksums"] == 2
    assert len(open_folder(out)) == 4
    assert as_json(capsys, "inspect", f"{out}/*.tar")["samples"] == 4
    with pytest.raises(UserError, match=r"manifest\.json: .*data prepare"):
        prepare(inputs, out)


def test_a_shard_that_only_the_manifest_or_the_former_index_names_is_told(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = build(inputs)
    said = "1 shard is no longer there (000002.tar), which manifest.json or the index before names: not indexed"
    (out / "000002.tar").rename(inputs / "moved.tar")
    for pattern, manifest in ((out, True), (out, True), (out / "000000.tar", False), (out, False)):
        if not manifest:
            (out / "manifest.json").unlink(missing_ok=True)
        assert main(["data", "index", str(pattern), "--quiet", "--workers=1"]) == 0
        assert (said in capsys.readouterr().out.splitlines()) == manifest
    (inputs / "moved.tar").rename(out / "000002.tar")
    for told in (False, True):  # by the index before
        assert index_shards(str(out), None, workers=1, progress=False).gone == ["000002.tar"] * told
        (out / "000002.tar").unlink(missing_ok=True)


def prepare(inputs: Path, out: Path) -> None:
    (inputs / "captions.csv").write_text("Image Path,raw_caption\n")
    (inputs / "downloads").mkdir()
    write_shard(inputs / "downloads" / "00000.tar", [])
    captions, images = [inputs / "captions.csv"], [inputs / "downloads"]
    prepare_dataset(DREAMLIP, captions, images, out, join="url", split="sentences", progress=False)


def test_an_older_versions_reports_get_their_digests(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that an older version began has reports without the shard's digest: those shards are read for it."""

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shard_sums", stop)
        with pytest.raises(InterruptedError):
            build(inputs)
    out = inputs / "out"
    assert not (out / "manifest.json").exists()
    for report in (out / ".build" / "shards").glob("*.json"):
        report.write_text(json.dumps(json.loads(report.read_text())[:9]))
    read: list[Path] = []

    def counted_sha256(path: Path) -> str:
        read.append(path)
        return checksums.file_sha256(path)

    monkeypatch.setattr(build_module, "file_sha256", counted_sha256)
    build(inputs)
    assert [path.name for path in read] == ["000000.tar", "000002.tar"]
    whole = build(inputs, "whole")
    assert len(read) == 2  # an unbroken build reads no shard again
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.mark.parametrize("content", ['{"name": "an app", "start_url": "/"}', "no json", "[]"])
def test_a_manifest_of_another_program_is_kept(inputs: Path, content: str) -> None:
    theirs = inputs / "out" / "manifest.json"
    theirs.parent.mkdir()
    theirs.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: is the file of another program; move it away, or name"):
        build(inputs)
    assert theirs.read_text() == content
    assert not list(theirs.parent.glob("*.tar"))


def test_a_manifest_that_cannot_be_read_is_not_called_foreign(inputs: Path) -> None:
    (inputs / "out" / "manifest.json").mkdir(parents=True)
    said = r"out/manifest\.json: cannot be read: it is a folder, not a regular file; name another folder with --out"
    with pytest.raises(UserError, match=said):
        build(inputs)
    with pytest.raises(UserError, match=r"captions\.jsonl: cannot be made: "):
        build(inputs, "captions.jsonl")


def test_a_manifest_that_is_closed_to_the_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checksums, "read_regular", refuse)  # root may read all
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read: Permission denied; its checksums"):
        checksums.noted_checksums(tmp_path / "manifest.json")


def test_the_users_rejected_jsonl_is_kept(inputs: Path) -> None:
    theirs = inputs / "out" / "rejected.jsonl"
    theirs.parent.mkdir()
    rows = (inputs / "captions.jsonl").read_bytes()
    theirs.write_bytes(rows)  # a file of captions: the build would read it while it writes it
    for make in (build, lambda folder: prepare(folder, folder / "out")):
        with pytest.raises(UserError, match=r"rejected\.jsonl: is no report of rejects; move it away, or name another"):
            make(inputs)
    assert theirs.read_bytes() == rows
    theirs.write_text('{"shard": "0.tar", "key": "k", "reason": "of an index that is gone"}\n')
    build(inputs)


def test_a_report_of_rejects_is_no_file_of_captions(inputs: Path) -> None:
    """Its `captions` is the name of a file, which would become each sample's caption."""
    rejected = build(inputs) / "rejected.jsonl"
    with pytest.raises(UserError, match=r"rejected\.jsonl: is a report of rejects, which holds no captions"):
        build_shards(inputs / "images", rejected, inputs / "again", samples_per_shard=2, workers=1, progress=False)
    assert not (inputs / "again").exists()


def test_animated_pictures_in_shards_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    samples = []
    for number, kind in enumerate(("WEBP", "PNG", "PNG")):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:] if number < 2 else [])
        text = json.dumps({"caption": f"a picture {number}"}).encode()
        samples.append({"__key__": str(number), kind.lower(): buffer.getvalue(), "json": text})
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "0.tar", samples)
    index_shards(str(folder), None, workers=1, progress=False)
    assert (as_json(capsys, "verify", folder)["animated"], as_json(capsys, "inspect", folder)["animated"]) == (2, 2)
    assert main(["data", "verify", str(folder), "--quiet", "--workers=1"]) == 0
    assert "; 2 animated pictures, the first frame of each is read: all are sound" in capsys.readouterr().out
    assert main(["data", "inspect", str(folder), "--quiet", "--workers=1"]) == 0
    assert "; 2 animated pictures, the first frame of each is read\n" in capsys.readouterr().out
