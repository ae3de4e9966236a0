"""A preparation that is stopped, continued, repeated or asked for something else; and inputs that cannot work."""

import errno
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.data.prepare import csv_records, prepare, table
from cosmos_scale.data.prepare.datasets import DREAMLIP
from cosmos_scale.data.prepare.table import build_table
from cosmos_scale.data.work import PREPARATION, Work
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture
from tests.conftest import REPOSITORY
from tests.data.prepare.downloads import (
    DREAMLIP_HEADER,
    Download,
    download,
    dreamlip_row,
    url,
    write_dreamlip,
    write_folder,
    write_listing,
    write_parquet,
    write_tar,
)
from tests.data.prepare.test_prepare import read_all, run

SHARDS, PER_SHARD = 12, 3


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Twelve shards of three images; some rows have no image, and one row and one image come twice."""
    (tmp_path / "captions").mkdir()
    rows = [dreamlip_row(number) for number in range(SHARDS * PER_SHARD + 3)]
    write_dreamlip(tmp_path / "captions" / "cc3m.csv", [*rows, dreamlip_row(5)])
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        items = [download(number, key=shard * 10_000 + place) for place, number in enumerate(numbers)]
        again = [download(1, key=shard * 10_000 + 9)] if shard in (3, 7) else []
        write_tar(tmp_path / "images", f"{shard:05d}", [*items, *again])
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    inputs = ["--captions", str(folder / "captions"), "--images", str(folder / "images")]
    return ["data", "prepare", "dreamlip", *inputs, "--out", str(folder / out), "--quiet", *more]


def test_workers_make_the_same_bytes(inputs: Path) -> None:
    one, two = run(inputs, out="one"), run(inputs, workers=2, out="two")
    assert one[1:] == two[1:]
    assert one.samples == SHARDS * PER_SHARD
    assert one.rejected == {"no image": 3, "duplicate image": 2, "duplicate captions row": 1}
    assert contents(inputs / "one") == contents(inputs / "two")


def start_slowly(folder: Path, workers: int) -> "subprocess.Popen[bytes]":
    """A preparation that writes shards slowly, so that a test on any machine can stop it there."""
    program = (
        "import sys, time\n"
        "from cosmos_scale.data.prepare import writing\n"
        "check = writing._check\n"
        "writing._check = lambda image: (time.sleep(0.03), check(image))\n"
        "from cosmos_scale.cli import main as cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, *arguments(folder, "out", "--workers", str(workers))]
    return subprocess.Popen(command, start_new_session=True)


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.002)


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(60)
def test_only_one_process_prepares_a_folder(inputs: Path) -> None:
    process = start_slowly(inputs, 1)
    try:
        wait_for(inputs / "out" / "00000.tar", process)
        with pytest.raises(UserError, match="out: another process is preparing it now"):
            run(inputs)
        assert process.wait(timeout=40) == 0
    finally:
        process.kill()
        process.wait()
    assert len(list((inputs / "out").glob("*.tar"))) == SHARDS


def test_a_file_system_without_locks_is_named(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(
        UserError, match="out: cannot be locked: No locks available: its file system has no locks; rule"
    ):
        run(inputs)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("stop_at", "workers"),
    [(".prepare/table/table.json", 1), (".prepare/states.npy", 1), ("00001.tar", 2), ("00008.tar", 1)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(inputs: Path, stop_at: str, workers: int) -> None:
    """A killed preparation's workers end by themselves, and do not disturb the preparation that goes on at once."""
    whole = run(inputs, out="whole")
    out = inputs / "out"
    process = start_slowly(inputs, workers)
    try:
        wait_for(out / stop_at, process)
    finally:
        process.kill()
        process.wait()
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(kept) < SHARDS
    report = run(inputs, workers=2)
    assert report[1:] == whole[1:]
    assert contents(out) == contents(inputs / "whole")
    # A shard with a report stays the same file; the last shard of each worker may be written again.
    again = [name for name, inode in kept.items() if (out / name).stat().st_ino != inode]
    assert len(again) <= workers
    while group_lives(process.pid):  # the test's time limit ends the loop
        time.sleep(0.05)


def first_three(function: Callable[[Any], Any], jobs: list[Any], workers: int | None) -> Iterator[Any]:
    yield from map(function, jobs[:3])
    raise InterruptedError


def test_a_finished_one_is_left_alone_and_other_options_are_refused(inputs: Path) -> None:
    report = run(inputs)
    before = {path: path.stat().st_mtime_ns for path in (inputs / "out").iterdir()}
    assert run(inputs) == report
    assert {path: path.stat().st_mtime_ns for path in (inputs / "out").iterdir()} == before
    with pytest.raises(UserError, match='out: its preparation was done with split "sentences", not "published"; go on'):
        run(inputs, split="published")
    with (inputs / "captions" / "cc3m.csv").open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match="its preparation was done with captions"):
        run(inputs)


def test_an_unfinished_one_refuses_other_options_and_images(inputs: Path) -> None:
    listing = inputs / "images" / "00004.parquet"
    sound = (inputs / "images" / "00004.tar").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_scale.data.prepare.prepare.map_jobs", first_three)
        with pytest.raises(InterruptedError):
            run(inputs)
    with pytest.raises(UserError, match='begun with join "url", not "key"'):
        run(inputs, join="key")
    write_tar(inputs / "images", "00012", [download(50)])
    with pytest.raises(UserError, match="begun with image_shards 12, not 13"):
        run(inputs)
    (inputs / "images" / "00012.tar").unlink()
    write_listing(inputs / "images", listing.stem, [download(1)])
    with pytest.raises(UserError, match=r"begun with images_digest .* \(images changed since\); go on"):
        run(inputs)
    (inputs / "other").mkdir()
    (inputs / "other" / "00000.tar").write_bytes(sound)
    with pytest.raises(UserError, match="other: holds shards that no preparation made"):
        run(inputs, out="other")


def test_wrong_inputs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions, images = tmp_path / "captions", tmp_path / "images"
    captions.mkdir()

    def fails(match: str, *more: str) -> None:
        assert cli.main(arguments(tmp_path, "out", *more)) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert match in error

    fails("captions: holds no .csv or .parquet file of captions")
    path = write_dreamlip(captions / "cc3m.csv", [["x"] * 3], ["picture", "raw_caption", "Colour"])
    fails("images: no such folder or .tar of images")
    images.mkdir()
    fails("images: not img2dataset's output: it has neither 00000.tar nor a folder 00000 of images")
    (images / "7.jpg").write_bytes(picture(7))
    fails("images: holds images itself: name the folder above it")
    write_listing(images, "00000", [download(7)])
    fails("images: holds no .tar and no folder of images; run img2dataset with --output_format webdataset")
    write_tar(images, "00000", [download(7), Download("000000008", url(8), None)])
    fails(
        "cc3m.csv: no column for --join url: one of image_path, image_url, url is needed, "
        "it has picture, raw_caption, Colour"
    )
    write_dreamlip(path, [[url(7), "x"]], ["Image Path", "words"])
    fails("cc3m.csv: no column of captions: one of raw_caption, ")
    write_dreamlip(path, [[url(7), "x", "y"]], ["Image Path", "raw_caption", "Raw Caption"])
    fails("cc3m.csv: two columns are called raw_caption (raw_caption, Raw Caption)")
    path.write_text("Image Path,raw_caption\n", encoding="utf-16")
    fails("cc3m.csv: is UTF-16 or no text; save it as UTF-8")
    write_dreamlip(path, [])
    fails("cc3m.csv: none of 0 rows can be used; the first: there is none")
    write_dreamlip(path, [dreamlip_row(7, "0000000/0000008.jpg")])
    fails("cc3m.csv: row 1 names its image 0000000/0000008.jpg, which is no URL; take the release with URLs")
    write_dreamlip(path, [dreamlip_row(7, "0000001/0000008.jpg")])
    fails("the first: not a key: 0000001/0000008.jpg does not begin with its folder's name", "--join", "key")
    write_dreamlip(path, [dreamlip_row(1), dreamlip_row(2), dreamlip_row(3)])
    there, here = f"{url(1)}, {url(2)}", url(7)
    fails(f"1 image, but none has captions in cc3m.csv: urls there are such as {there}, here such as {here}")


def test_the_folder_of_the_images_is_no_place_for_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a folder 00000 of images, 00000.tar would be a second shard of images of its name."""
    (tmp_path / "images" / "00000").mkdir(parents=True)
    (tmp_path / "captions").mkdir()
    assert cli.main(arguments(tmp_path, "images")) == 2
    assert "images: is the folder of the images; name another folder for the shards\n" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00000"]


def test_wrong_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.parquet").write_bytes(b"PAR1 broken")
    write_tar(tmp_path / "images", "00000", [download(0)])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
        run(tmp_path)
    (tmp_path / "captions" / "a.parquet").unlink()
    write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(0)])
    write_folder(tmp_path / "images", "00001", [download(1)])
    write_folder(tmp_path / "more", "00000", [])
    (tmp_path / "more" / "00000").rename(tmp_path / "images" / "00000")
    with pytest.raises(UserError, match=r"have one name: prepare their folders one by one"):
        run(tmp_path, out="two")


def test_an_open_quotation_mark_loses_no_more_than_its_rows(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    path = write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(0)])
    with path.open("a") as file:
        file.write(f'{url(1)},"never closed,a,b,c,d,e,f\n')
    write_tar(tmp_path / "images", "00000", [download(0), download(1)])
    report = run(tmp_path)
    assert (report.samples, report.rows) == (1, 2)
    assert report.rejected == {"captions row cannot be read": 1, "image without captions": 1}


def test_a_byte_order_mark_and_extra_columns_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    path = write_dreamlip(tmp_path / "captions" / "a.csv", [["x", *dreamlip_row(0)]], ["Unnamed: 0", *DREAMLIP_HEADER])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    write_parquet(tmp_path / "captions" / "b.parquet", [{"Image Path": url(1), "raw_caption": ["One.", "Two"]}])
    write_tar(tmp_path / "images", "00000", [download(0), download(1)])
    assert run(tmp_path).samples == 2


def test_an_open_quote_loses_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    path = write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(0)])
    with path.open("a") as file:
        file.write(f'"{url(1)}","open,b,c,d,e,f,g\n')
        file.writelines(f'"{url(number)}",a,b,c,d,e,f,g\n' for number in (2, 3))
    write_tar(tmp_path / "images", "00000", [download(number) for number in range(4)])
    report = run(tmp_path)
    assert (report.samples, report.rows) == (3, 4)
    assert report.rejected == {"captions row cannot be read": 1, "image without captions": 1}
    assert "unclosed quote: opened on line 6, another quote follows" in (report.folder / "rejected.jsonl").read_text()


def test_cells_that_spell_lists_or_nothing_are_read_as_build_reads_them(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    cells = ["['One. Two.', 'three']", '["four"]', "nan", "[no list]", "", "NaN", "five"]
    write_dreamlip(tmp_path / "captions" / "a.csv", [[url(0), *cells]])
    typed = {"Image Path": url(1), "raw_caption": float("nan"), "shortIB_captions": "one"}
    write_parquet(tmp_path / "captions" / "b.parquet", [typed])
    write_tar(tmp_path / "images", "00000", [download(0), download(1)])
    documents = [document for _, document in read_all(run(tmp_path).folder).values()]
    assert documents == [
        {
            "raw_caption": ["One. Two.", "three"],
            "shortIB_captions": ["four"],
            "shortSV_captions": ["[no list]"],
            "longLLA_captions": ["five"],
            "url": url(0),
        },
        {"shortIB_captions": ["one"], "url": url(1)},
    ]


def test_a_huge_cell_or_one_of_a_wrong_type_loses_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions").mkdir()
    monkeypatch.setattr(csv_records, "CELL_LIMIT", 500)
    huge = [url(1), "x" * 600, *"abcdef"]
    write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(0), huge, dreamlip_row(2)])
    typed: list[dict[str, Any]] = [{"Image Path": url(3), "raw_caption": 7}, {"Image Path": None, "raw_caption": 8}]
    write_parquet(tmp_path / "captions" / "b.parquet", typed)
    write_tar(tmp_path / "images", "00000", [download(number) for number in range(4)])
    report = run(tmp_path)
    assert report.samples == 2
    assert report.rejected == {"captions row cannot be read": 2, "image without captions": 1, "wrong type": 1}


def test_the_commands_of_the_page_are_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("file", "name"):  # the page's loop sets these variables
        monkeypatch.setenv(variable, "00001")
    page = (REPOSITORY / "docs" / "datasets.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"cosmos-scale (data prepare .*)", page)
    assert len(commands) == 5
    for command in commands:
        assert cli.main(shlex.split(command)) == 2  # there are no such files here; argparse would exit
        assert re.search(r"no such captions file or folder\n$", capsys.readouterr().err), command
    # Each dataset is verified with the sampling of its captions; textcrop is the default.
    for name, sampling in (("cc3m", ""), ("pixelprose", " --captions textcrop_pixelprose")):
        assert f"$ cosmos-scale data verify /data/{name}{sampling}\n" in page


def test_a_refused_header_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "0.csv", [dreamlip_row(0)])
    write_dreamlip(tmp_path / "captions" / "1.csv", [["a", "b"]], header=["name", "raw_caption"])
    write_tar(tmp_path / "images", "00000", [download(0)])
    with pytest.raises(UserError, match="no column for --join url"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_by_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = write_dreamlip(tmp_path / "0.csv", [dreamlip_row(number) for number in range(3)])
    monkeypatch.setattr(table, "regular_only", lambda path, flags: os.open("/dev/full", flags))
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written: No space left on device$"):
        build_table(tmp_path, [captions], DREAMLIP, "url", progress=False)


@pytest.mark.parametrize(
    "name", ["table/hashes.bin", "table/places.bin", "table/table.json", "states.npy", "plan/00000.npy"]
)
@pytest.mark.parametrize("how", ["FIFO", "empty", "cut"])
def test_a_damaged_file_of_the_work_ends_it_by_its_name(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    work = Work(PREPARATION, inputs / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_prepared_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, out="out", workers=1)
    damaged = work.folder / name
    whole = damaged.read_bytes()
    damaged.unlink()
    if how == "FIFO":
        os.mkfifo(damaged)
    else:
        damaged.write_bytes(whole[: len(whole) // 2 // 26 * 26] if how == "cut" else b"")
    signal.alarm(60)  # instead of a wait for ever
    with pytest.raises(UserError, match=rf"{damaged.name}: cannot be read: .*; delete .*out and begin anew"):
        run(inputs, out="out", workers=1)
    signal.alarm(0)


def test_a_finished_preparation_that_has_lost_shards_says_so(inputs: Path) -> None:
    done = run(inputs)
    (inputs / "out" / "00003.tar").unlink()
    with open(inputs / "out" / "00005.tar", "ab") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"since then 2 shards of 12 went missing or changed size, first 00003\.tar"):
        run(inputs)
    assert done.shards == 12
