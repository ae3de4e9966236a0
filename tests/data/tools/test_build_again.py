"""A build that is stopped, continued, or asked for something else; what is said of an unfinished one."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.tools import build as build_module
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.work import BUILD, Work, close_work, open_work
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import open_folder, picture

PICTURES, PER_SHARD, SHARDS = 20, 3, 7


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Twenty pictures; a row of each shard but the last is rejected, and some pictures are transparent or missing."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(PICTURES):
        kind = "PNG" if number % 4 == 0 else "JPEG"
        if number % PER_SHARD or number == 18:
            (tmp_path / "images" / f"{number}.{kind.lower()}").write_bytes(picture(number, kind))
        rows.append({"image": f"{number}.{kind.lower()}", "caption": f"picture {number}"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    named = ["--images", str(folder / "images"), "--captions", str(folder / "captions.jsonl"), "--out"]
    return ["data", "build", *named, str(folder / out), "--samples-per-shard", str(PER_SHARD), "--quiet", *more]


def build(folder: Path, out: str = "out", *, per_shard: int = PER_SHARD, workers: int = 1, **options: Any) -> None:
    build_shards(
        folder / "images",
        folder / "captions.jsonl",
        folder / out,
        samples_per_shard=per_shard,
        workers=workers,
        progress=False,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_slowly(folder: Path, workers: int) -> "subprocess.Popen[bytes]":
    """A build that writes shards and their index slowly, so that a test on any machine can stop it there."""
    program = (
        "import sys, time\n"
        "from cosmos_scale.data.tools import build\n"
        "from cosmos_scale.data.shards import index\n"
        "read, scan = build._find, index.scan_shard\n"
        "build._find = lambda *place: (time.sleep(0.03), read(*place))[1]\n"
        "index.scan_shard = lambda *shard, **rules: (time.sleep(0.03), scan(*shard, **rules))[1]\n"
        "from cosmos_scale.cli import main as cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, *arguments(folder, "out", "--workers", str(workers))]
    return subprocess.Popen(command, start_new_session=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("place", "workers"), [("000001.tar", 1), ("000003.tar", 2), ("000002.index.npy", 1)])
def test_a_killed_build_goes_on_to_the_same_bytes(inputs: Path, place: str, workers: int) -> None:
    build(inputs, "whole")
    out = inputs / "out"
    process = start_slowly(inputs, workers)
    try:
        while not (out / place).exists():
            assert process.poll() is None, "it ended too soon"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert not (out / "index.json").exists()
    kept = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    with pytest.raises(UserError, match="out: unfinished `data build`; give the same command again"):
        index_shards(str(out), None, workers=1, progress=False)
    build(inputs, workers=2)
    assert contents(out) == contents(inputs / "whole")
    # A shard with a report stays the same file; the last shard of each worker may be written again.
    again = [name for name, inode in kept.items() if (out / name).stat().st_ino != inode]
    assert len(again) <= workers
    build(inputs)  # all is done
    assert contents(out) == contents(inputs / "whole")


def stopped(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that has written its shards and was stopped before their index."""

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "index_shards", stop)
        with pytest.raises(InterruptedError):
            build(inputs)
    return inputs / "out"


def test_an_unfinished_build_is_named_as_such_everywhere(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(inputs, monkeypatch)
    said = f"{out}: unfinished `data build`; give the same command again, which goes on where it was, or delete the "
    run = inputs / "run.yaml"
    run.write_text(f"name: r\noutput: {inputs}/runs\ndata: {{sources: [{{name: s, shards: '{out}/*.tar'}}]}}\n")
    for command in (
        ["data", "index", str(out), "--out", str(inputs / "index")],
        ["data", "verify", str(out)],
        ["data", "inspect", f"{out}/00000*.tar", "--out", str(inputs / "inspected")],
        ["train", str(run), "--dry-run"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert main(arguments(inputs, "out", "--workers", "1")) == 0
    assert "14 samples in 7 indexed shards" in capsys.readouterr().out
    assert len(open_folder(out)) == 14


def test_other_options_and_changed_inputs_are_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(inputs, monkeypatch)
    with pytest.raises(UserError, match='out: its build was begun with background "white", not "keep"; go on with'):
        build(inputs, background="keep")
    with pytest.raises(UserError, match="its build was begun with samples-per-shard 3, not 4"):
        build(inputs, per_shard=4)
    changed = inputs / "images" / "7.jpeg"
    sound, times = changed.read_bytes(), changed.stat()
    changed.write_bytes(picture(99))
    with pytest.raises(UserError, match=r"pictures of .*000002\.tar have changed since it was built; go on with the"):
        build(inputs)
    changed.write_bytes(sound)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    captions = inputs / "captions.jsonl"
    whole = captions.read_text()
    captions.write_text(whole.replace("picture 5", "picture 6"))
    with pytest.raises(UserError, match="its build was begun with captions_digest"):
        build(inputs)
    captions.write_text(whole)
    build(inputs, "whole")
    build(inputs)
    assert contents(inputs / "out") == contents(inputs / "whole")


def test_files_that_a_power_failure_emptied_do_no_harm(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stopped(inputs, monkeypatch)
    work = Work(BUILD, out)
    for shard in ("000000", "000004"):
        work.report(shard).write_bytes(b"")
    (out / "000002.tar").write_bytes(b"")
    options = work.folder / "options.json"
    whole = options.read_bytes()
    options.write_bytes(b"")
    with pytest.raises(UserError, match=r"options\.json: cannot be read: .*; delete .*out and begin anew"):
        build(inputs)
    options.write_bytes(whole)
    build(inputs)
    build(inputs, "whole")
    assert contents(out) == contents(inputs / "whole")


def test_a_build_without_a_shard_begins_anew_with_other_options(inputs: Path) -> None:
    (inputs / "captions.jsonl").write_text('{"image": "none.jpg", "caption": "a"}\n')
    with pytest.raises(UserError, match="no row of 1 can be used"):
        build(inputs)
    (inputs / "captions.jsonl").write_text('{"image": "1.jpeg", "caption": "a"}\n')
    build(inputs)
    assert len(open_folder(inputs / "out")) == 1


def test_without_locks_a_build_goes_on_and_says_so(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    build(inputs)
    assert re.search(r"out: cannot be locked: .* only one process may write there now\n$", capsys.readouterr().err)


def test_an_interrupted_deletion_leaves_the_build_finished(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(inputs, monkeypatch)
    work = Work(BUILD, inputs / "out")
    index_shards(str(work.out), None, finishing=True, workers=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("cosmos_scale.data.work.shutil.rmtree", lambda *_, **__: None)
        close_work(work)
    assert not work.is_unfinished
    assert len(open_folder(work.out)) == 14


def test_what_a_killed_worker_began_after_the_build_went_on_is_deleted(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def index_later(*arguments: Any, **options: Any) -> Any:
        (inputs / "out" / "000005.tar.30694.part").touch()
        return index_shards(*arguments, **options)

    monkeypatch.setattr(build_module, "index_shards", index_later)
    build(inputs)
    assert not list((inputs / "out").glob("*.part"))


def test_a_build_deletes_no_file_of_the_user(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (inputs / "out").mkdir()
    download = inputs / "out" / "movie.tar.part"
    download.write_bytes(b"half")
    out = stopped(inputs, monkeypatch)
    (out / "000005.tar.123.part").write_bytes(b"of a build that was killed")
    build(inputs)
    assert [path.name for path in out.glob("*.part")] == [download.name]


@pytest.mark.parametrize("name", ["000000.tar", "cc3m-train-0000.tar"])
@pytest.mark.parametrize("background", ["white", "black"])
def test_shards_that_came_into_an_unfinished_build_are_kept(inputs: Path, name: str, background: str) -> None:
    out = inputs / "out"
    with open_work(Work(BUILD, out), {"background": "white"}):
        pass
    (out / name).write_bytes(b"a shard of the user")
    with pytest.raises(UserError, match=f"{name}: lies in the folder of an unfinished build that did not write it"):
        build(inputs, background=background)
    assert (out / name).read_bytes() == b"a shard of the user"


def test_a_shard_that_was_written_without_its_report_is_written_again(inputs: Path) -> None:
    work = Work(BUILD, inputs / "out")
    with open_work(work, {"background": "black"}):
        work.claim("000000")
        (work.out / "000000.tar").write_bytes(b"of the build that was killed")
    build(inputs)
    build(inputs, "whole")
    assert contents(inputs / "out") == contents(inputs / "whole")


def test_an_index_json_of_another_program_is_kept(inputs: Path) -> None:
    theirs = inputs / "out" / "index.json"
    theirs.parent.mkdir()
    theirs.write_text('{"__kind__": "wids-shard-index-v1", "shardlist": []}')
    with pytest.raises(UserError, match=r"index\.json: is the file of another program; move it away, or name another"):
        build(inputs)
    (theirs.parent / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"index\.json: is the file of another program"):
        index_shards(str(theirs.parent), None, workers=1, progress=False)
    assert "wids" in theirs.read_text()


@pytest.mark.parametrize("join_rows", [False, True])
def test_a_finished_build_is_left_as_it_is(
    inputs: Path, capsys: pytest.CaptureFixture[str], *, join_rows: bool
) -> None:
    more = ["--join-rows"] if join_rows else []
    command = arguments(inputs, "out", "--workers", "1", *more)
    assert main(command) == 0
    capsys.readouterr()
    out = inputs / "out"
    before = contents(out)
    assert main(command) == 0
    said = f"14 samples in 7 indexed shards in {out}: built before, of the same files with the same options\n"
    assert capsys.readouterr().out == said
    for option, then, now in (("background", "white", "black"), ("orientation", "upright", "keep")):
        assert main([*command, f"--{option}", now]) == 2
        assert capsys.readouterr().err == (
            f'cosmos-scale data build: {out}: its build was done with {option} "{then}", not "{now}"; go on with the '
            "same options and files, or name another folder with --out\n"
        )
    assert contents(out) == before


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "captions.jsonl").open("a").write('{"image": "1.jpeg", "caption": "x"}\n'),
            r"captions\.jsonl has changed since this build \(its digest is \w+, then \w+\); rule: {anew}",
        ),
        (
            lambda folder: os.utime(folder / "images" / "1.jpeg", (1, 1)),
            r"pictures in {images} have changed since this build \(their sizes or times\); rule: {anew}",
        ),
        (
            lambda folder: (folder / "out" / "000001.tar").unlink(),
            r"its build was done, but since then shard 000001\.tar of its manifest\.json is missing; "
            "rule: copy it back, {anew}",
        ),
        (
            lambda folder: (folder / "out" / "000002.tar").write_bytes(b"cut"),
            r"its build was done, but since then shard 000002\.tar of its manifest\.json has 3 bytes, not [\d,]+; "
            "rule: copy it back, {anew}",
        ),
        (
            lambda folder: (folder / "out" / "index.json").unlink(),
            r"its build was done, but since then its index\.json is missing; "
            "rule: run `cosmos-scale data index {out}`, {anew}",
        ),
        (
            lambda folder: (folder / "out" / "000003.index.npy").unlink(),
            r"its build was done, but since then its 000003\.index\.npy is missing; "
            "rule: run `cosmos-scale data index {out}`, {anew}",
        ),
    ],
    ids=["captions", "pictures", "shard gone", "shard cut", "index gone", "table gone"],
)
def test_what_has_changed_since_a_build_is_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], change: Change, said: str
) -> None:
    command = arguments(inputs, "out", "--workers", "1")
    out = inputs / "out"
    assert main(command) == 0
    change(inputs)
    before = contents(out)
    capsys.readouterr()
    assert main(command) == 2
    anew = f"name another folder with --out, or delete {out} to build anew"
    said = said.format(anew=anew, images=inputs / "images", out=out)
    assert re.fullmatch(f"cosmos-scale data build: {out}: {said}\n", capsys.readouterr().err)
    assert contents(out) == before
    assert main(arguments(inputs, "other", "--workers", "1")) == 0


def test_another_folder_of_the_same_pictures_is_named(inputs: Path) -> None:
    build(inputs)
    (inputs / "images").rename(inputs / "moved")
    (inputs / "images").mkdir()
    with pytest.raises(UserError, match=f"its build was done with another folder of pictures than {inputs}/moved; "):
        build_shards(
            inputs / "moved",
            inputs / "captions.jsonl",
            inputs / "out",
            samples_per_shard=PER_SHARD,
            workers=1,
            progress=False,
        )


def test_a_manifest_of_an_older_version_still_tells_a_finished_build(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the digest of all that the build was made of, but not the options that a difference could be told by."""
    command = arguments(inputs, "out", "--workers", "1")
    assert main(command) == 0
    manifest = inputs / "out" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: content[key] for key in content if key not in ("options", "pictures_digest")}))
    capsys.readouterr()
    assert main(command) == 0
    assert "built before, of the same files with the same options" in capsys.readouterr().out
    assert main([*command, "--background", "black"]) == 2
    assert "its build was done by an older version, of other files or with other options" in capsys.readouterr().err


def test_a_folder_whose_shards_are_all_gone_is_built_anew(inputs: Path) -> None:
    build(inputs)
    before = contents(inputs / "out")
    for shard in (inputs / "out").glob("*.tar"):
        shard.unlink()
    build(inputs)
    assert contents(inputs / "out") == before
