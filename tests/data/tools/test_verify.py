"""`data verify`: every kind of damage is found where it lies, and nothing else."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.tools import verify as verify_module
from cosmos_scale.testing.shard_files import Member, picture, sample, write_shard, write_shards
from tests.data.prepare.downloads import download, dreamlip_row, write_dreamlip, write_tar
from tests.data.web_server import web_server


def verify(
    capsys: pytest.CaptureFixture[str], *arguments: object, workers: int = 1, warned: str = ""
) -> tuple[int, str]:
    status = cli.main(["data", "verify", *map(str, arguments), "--quiet", f"--workers={workers}"])
    captured = capsys.readouterr()
    assert captured.err == "" if not warned else captured.err.startswith(f"warning: {warned}")
    return status, captured.out


def as_json(
    capsys: pytest.CaptureFixture[str], *arguments: object, workers: int = 1, warned: str = ""
) -> dict[str, Any]:
    status, out = verify(capsys, *arguments, "--json", workers=workers, warned=warned)
    found: dict[str, Any] = json.loads(out)
    assert status == (0 if found["sound"] else 1)
    return found


def starts(path: Path) -> dict[str, int]:
    """Where each sample's first member starts."""
    found: dict[str, int] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            found.setdefault(info.name.split(".")[0], info.offset)
    return found


def data_of(path: Path, name: str) -> tuple[int, int]:
    """Where a member's data lies: (first byte, bytes)."""
    with tarfile.open(path) as archive:
        info = archive.getmember(name)
        return info.offset_data, info.size


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def replace_json(path: Path, key: str, document: Any) -> None:
    offset, size = data_of(path, f"{key}.json")
    overwrite(path, offset, json.dumps(document).encode().ljust(size))


def end_early(path: Path, key: str) -> None:
    """Put an end marker into the picture's data: other flipped bits of a JPEG may decode to other pixels."""
    offset, size = data_of(path, f"{key}.jpg")
    overwrite(path, offset + 3 * size // 4, b"\xff\xd9")


def break_header(path: Path, key: str) -> None:
    """Put another size into the header: members behind it are found by the index, but not by walking the tar."""
    offset, _ = data_of(path, f"{key}.json")
    overwrite(path, offset - 512 + 124, b"77777777777")


def test_sound_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, [5, 130, 3])
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    status, out = verify(capsys, folder)
    assert (status, out) == (0, f"138 samples in 3 shards, {size:,} bytes: all are sound\n")
    found = as_json(capsys, folder, workers=2)
    assert (found["shards"], found["samples"], found["size"], found["sound"], found["first"]) == (
        3,
        138,
        size,
        True,
        [],
    )


# Damage to sample 000003 after indexing, and the beginning of the reason.
DAMAGE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "a picture that ends early": (end_early, "the picture does not decode"),
    "no picture": (lambda path, key: overwrite(path, data_of(path, f"{key}.jpg")[0], b"GIF89a"), "the picture is a"),
    "json of another type": (lambda path, key: replace_json(path, key, [1]), "json is a list"),
    "broken json": (lambda path, key: overwrite(path, data_of(path, f"{key}.json")[0], b"]"), "unreadable json"),
    "no captions": (lambda path, key: replace_json(path, key, {"raw_caption": [], "url": "x"}), "no caption text"),
    "captions of another type": (
        lambda path, key: replace_json(path, key, {"raw_caption": 3}),
        "raw_caption is a number",
    ),
    "other captions": (lambda path, key: replace_json(path, key, {"original_caption": "x"}), "sampling textcrop needs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("workers", [1, 2])
def test_damage_behind_the_index_is_named_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, workers: int
) -> None:
    folder = write_shards(tmp_path / "shards", [2, 6, 2])
    shard = folder / "00001.tar"
    start = starts(shard)["000003"]
    apply, reason = DAMAGE[damage]
    apply(shard, "000003")
    found = as_json(capsys, folder, workers=workers)
    assert (found["damaged"], found["left_out"], found["unreadable"], found["shards_damaged"]) == (1, 0, 0, 0)
    (fault,) = found["first"]
    assert (fault["shard"], fault["key"], fault["byte"], fault["indexed"]) == (str(shard), "000003", start, True)
    assert fault["reason"].startswith(reason)
    assert sum(found["reasons"].values()) == 1
    status, out = verify(capsys, folder)
    assert status == 1
    assert f"\n{shard}, 000003, {start}: {fault['reason']}\n" in out
    assert "\nsamples that training cannot use: 1 (10.00%)\n\ntimes  reason\n" in out


def test_the_sampling_and_the_largest_picture_are_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = {**sample(2), "jpg": picture(2, size=(40, 50))}
    write_shard(tmp_path / "0.tar", [sample(0), sample(1), large])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert as_json(capsys, tmp_path)["sound"]
    found = as_json(capsys, tmp_path, "data.max_pixels=1999")
    assert found["reasons"] == {"the picture has N x N pixels, more than max_pixels N": 1}
    found = as_json(capsys, tmp_path, "--captions", "long")
    assert found["damaged"] == 3
    assert all("sampling long needs one of longIB_captions" in fault["reason"] for fault in found["first"])
    run = tmp_path / "run.yaml"
    run.write_text(f"data: {{sources: [{{name: a, shards: {tmp_path}}}], captions: {{sampling: long}}}}\n")
    assert as_json(capsys, run)["damaged"] == 3
    assert as_json(capsys, run, "--captions", "raw")["sound"]


def test_what_the_index_left_out_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: list[Member] = [sample(number) for number in range(6)]
    del members[1]["json"]
    del members[2]["jpg"]
    members[3]["jpg"] = members[3]["jpg"][:-200]
    members[4]["json"] = b"{"
    shard = write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    found = as_json(capsys, tmp_path)
    assert (found["samples"], found["damaged"], found["left_out"]) == (2, 0, 4)
    first = starts(shard)
    for fault, (number, reason) in zip(
        found["first"],
        [(1, "no text"), (2, "no picture"), (3, "damaged JPEG"), (4, "unreadable json")],
        strict=True,
    ):
        assert (fault["key"], fault["byte"], fault["indexed"]) == (f"{number:06d}", first[f"{number:06d}"], False)
        assert fault["reason"].startswith(reason)
    end_early(shard, "000005")
    assert (as_json(capsys, tmp_path)["damaged"], as_json(capsys, tmp_path)["left_out"]) == (1, 4)


def test_a_walk_that_breaks_off_is_the_shards_own_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, [5])
    shard = folder / "00000.tar"
    start = starts(shard)["000002"]
    break_header(shard, "000002")
    found = as_json(capsys, folder)
    # The samples behind the damage are read by their offsets, and are sound.
    assert (found["damaged"], found["shards_damaged"], found["unreadable"]) == (1, 1, 0)
    of_shard, of_sample = found["first"]
    assert (of_shard["key"], of_shard["byte"]) == (None, None)
    assert of_shard["reason"].startswith(("truncated", "damaged: no tar header"))
    assert (of_sample["key"], of_sample["byte"]) == ("000002", start)
    assert of_sample["reason"].startswith("no member of ")


def test_bytes_that_still_decode_are_found_by_a_manifests_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path, [4, 3])
    shards = sorted(folder.glob("*.tar"))
    rows = [{"shard": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in shards]
    (folder / "manifest.json").write_text(json.dumps({"shards": rows}))
    status, out = verify(capsys, folder)
    assert (status, out.endswith("; 2 shards compared with the checksums of manifest.json: all are sound\n")) == (
        0,
        True,
    )
    offset, size = data_of(shards[1], "000005.json")
    document = json.loads(sample(5)["json"])
    document["raw_caption"][0] = document["raw_caption"][0].replace("picture", "pictore")
    overwrite(shards[1], offset, json.dumps(document).encode().ljust(size))
    found = as_json(capsys, folder)
    assert (found["damaged"], found["shards_damaged"], found["checksums"]) == (0, 1, 2)
    assert found["first"][0] == {
        "shard": str(shards[1]),
        "key": None,
        "byte": None,
        "reason": verify_module.CHANGED,
        "indexed": True,
    }
    (folder / "manifest.json").write_text("[]")  # a manifest of another program
    assert as_json(capsys, folder)["checksums"] == 0


def test_a_preparations_own_checksums_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dreamlip(tmp_path / "captions.csv", [dreamlip_row(number) for number in range(8)])
    for shard in range(2):
        write_tar(tmp_path / "images", f"{shard:05d}", [download(number) for number in range(4 * shard, 4 * shard + 4)])
    inputs = ["--captions", tmp_path / "captions.csv", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert cli.main(["data", "prepare", "dreamlip", *map(str, inputs), "--quiet", "--workers=1"]) == 0
    capsys.readouterr()
    found = as_json(capsys, tmp_path / "out")
    assert (found["samples"], found["checksums"], found["sound"]) == (8, 2, True)


@pytest.mark.parametrize("change", ["missing", "cut", "no table"])
def test_shards_that_cannot_be_read_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    folder = write_shards(tmp_path, [2, 300, 2])
    shard = folder / "00001.tar"
    if change == "missing":
        shard.unlink()
    elif change == "cut":
        shard.write_bytes(shard.read_bytes()[:5000])
    else:
        (folder / "00001.index.npy").unlink()
    reason = {"missing": "No such file", "cut": "has 5000 bytes, but its index", "no table": "00001.index.npy"}
    for workers in (1, 2):
        found = as_json(capsys, folder, workers=workers)
        assert (found["damaged"], found["unreadable"], found["shards_damaged"]) == (0, 300, 1)
        (fault,) = found["first"]
        assert (fault["shard"], fault["key"]) == (str(shard), None)
        assert reason[change] in fault["reason"]


def test_an_index_of_other_shards_of_the_same_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def same_size(number: int) -> Member:
        return {**sample(number % 3), "__key__": f"{number:06d}"}

    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        write_shard(folder / f"{shard}.tar", [same_size(3 * shard + place) for place in range(3)])
    index_shards(str(folder), None, workers=1, progress=False)
    shutil.copy(folder / "1.tar", folder / "0.tar")
    found = as_json(capsys, folder)
    assert found["reasons"] == {"in the index but not in the shard": 3, "in the shard but not in the index": 3}
    assert {fault["key"] for fault in found["first"] if fault["indexed"]} == {"000000", "000001", "000002"}
    assert {fault["key"] for fault in found["first"] if not fault["indexed"]} == {"000003", "000004", "000005"}


def test_a_sample_at_another_place_than_the_index_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [{**sample(0), "__key__": f"{number:06d}"} for number in range(4)]
    shard = write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    write_shard(shard, [members[0], members[2], members[1], members[3]])
    found = as_json(capsys, tmp_path)
    assert found["reasons"] == {"the index places it elsewhere": 2}
    assert {fault["key"] for fault in found["first"]} == {"000001", "000002"}


def test_shards_elsewhere_come_once_and_are_checked_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [3, 200])
    end_early(folder / "00001.tar", "000100")
    start = starts(folder / "00001.tar")["000100"]
    with web_server(folder, tmp_path / "log") as server:
        pattern = f"{server.url}/{{00000..00001}}.tar"
        found = as_json(capsys, pattern, "--index", folder, workers=2)
        assert sum(request.path.endswith(".tar") for request in server.requests()) == 2
        (fault,) = found["first"]
        assert (fault["shard"], fault["byte"]) == (f"{server.url}/00001.tar", start)
        (folder / "00000.tar").unlink()
        found = as_json(capsys, pattern, "--index", folder, "data.remote.retries=1", "data.remote.backoff_s=0.01")
    assert (found["damaged"], found["unreadable"], found["shards_damaged"]) == (1, 3, 1)


def test_the_terminal_names_some_and_a_file_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [30, 4])
    for number in range(25):
        replace_json(folder / "00000.tar", f"{number:06d}", {"raw_caption": [], "number": number})
    status, out = verify(capsys, folder)
    assert status == 1
    assert out.count(f"\n{folder / '00000.tar'}, 0000") == 20
    assert "\n... and 5 more; --out FILE names them all\n" in out
    assert "\n   25  no caption text for sampling textcrop in keys raw_caption, number\n" in out
    log = tmp_path / "new" / "damaged.jsonl"
    status, out = verify(capsys, folder, "--out", log)
    assert f"\n... and 5 more\nall are in {log}\n" in out
    faults = [json.loads(line) for line in log.read_text().splitlines()]
    assert [fault["key"] for fault in faults] == [f"{number:06d}" for number in range(25)]
    assert [fault["byte"] for fault in faults] == [starts(folder / "00000.tar")[fault["key"]] for fault in faults]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none"], "no .tar shards match"),
        (["{folder}"], "no index at"),
        (["{folder}", "--captions", "best"], "data.captions.sampling"),
        (["none.yaml"], "no such config file"),
        (["{folder}/empty.yaml"], "data.sources is empty"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "0.tar", [sample(0)])
    (tmp_path / "empty.yaml").touch()
    assert cli.main(["data", "verify", *(argument.format(folder=tmp_path) for argument in arguments), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cosmos-scale data verify: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, [1])
    assert cli.main(["data", "verify", str(folder), "--quiet", "--out", str(folder / "00000.tar" / "log")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "00000.tar/log: cannot be written" in captured.err


@pytest.mark.parametrize("name", ["00000.tar", "index.json", "captions.jsonl", "rejected.jsonl"])
def test_a_log_replaces_no_other_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, [1])
    (folder / "captions.jsonl").write_text('{"image": "1.jpg", "caption": "a"}\n')
    (folder / "rejected.jsonl").write_text('{"shard": "00000.tar", "key": "1", "reason": "a"}\n')
    before = (folder / name).read_bytes()
    assert cli.main(["data", "verify", str(folder), "--quiet", "--out", str(folder / name)]) == 2
    assert f"{name}: holds something else than a report" in capsys.readouterr().err
    assert (folder / name).read_bytes() == before


def test_a_log_on_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, [2])
    replace_json(folder / "00000.tar", "000001", {"raw_caption": []})
    assert cli.main(["data", "verify", str(folder), "--quiet", "--out", "/dev/full"]) == 2
    error = capsys.readouterr().err
    assert error == "cosmos-scale data verify: /dev/full: cannot be written: No space left on device\n"


def test_a_runs_galleries_are_verified_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, gallery = write_shards(tmp_path / "shards", [3]), tmp_path / "gallery"
    gallery.mkdir()
    members = [{**sample(number), "json": b'{"alt": "x"}'} for number in range(2)]  # no key that a sampling reads
    shard = write_shard(gallery / "0.tar", [*members, sample(2)])
    index_shards(str(gallery), None, workers=1, progress=False)
    cut_short = data_of(shard, "000002.jpg")
    overwrite(shard, cut_short[0] + 200, bytes(100))
    run = tmp_path / "run.yaml"
    evaluators = f"[{{kind: retrieval, every: 5, shards: {gallery}}}, {{kind: retrieval, name: b, shards: nowhere}}]"
    run.write_text(f"data: {{sources: [{{name: a, shards: {folder}}}]}}\neval: {evaluators}\n")
    found = as_json(capsys, run)
    assert (found["shards"], found["samples"], found["damaged"]) == (2, 6, 1)
    assert found["first"][0]["key"] == "000002"
    warned = "eval.retrieval: reads 1 shard that the run trains on, "
    assert as_json(capsys, run, f"eval.0.shards={folder}", warned=warned)["samples"] == 3  # read once


def test_one_reason_is_one_line_whatever_a_sample_holds_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents: list[dict[str, str]] = [{"sha256": "x"}, {"url": "x", "sha256": "y"}, {"width_1": "z"}]
    members = [{**sample(number), "json": json.dumps(document).encode()} for number, document in enumerate(documents)]
    write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    status, out = verify(capsys, tmp_path)
    assert status == 1
    (reason,) = out.partition("times  reason\n")[2].partition("\n\n")[0].splitlines()
    assert reason.startswith("    3  sampling textcrop needs one of raw_caption")
    assert "sha256" in out
    assert "shaN" not in out


def test_a_log_is_whole_or_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, log = write_shards(tmp_path / "shards", [3, 3]), tmp_path / "log.jsonl"
    index_shards(str(shards), None, progress=False)
    log.write_text('{"shard": "a", "indexed": true}\n')

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "_read", broken)
    assert cli.main(["data", "verify", str(shards), "--out", str(log), "--quiet", "--workers", "1"]) == 130
    assert log.read_text() == '{"shard": "a", "indexed": true}\n'
    monkeypatch.undo()
    capsys.readouterr()
    verify(capsys, shards, "--out", log)
    assert log.read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "shards"]
