"""FIFOs, sockets, devices and folders where files are expected: one line at once, and no read that never ends."""

import ast
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from cosmos_scale.checkpoint.files import BrokenCheckpoint, FileRecord, TensorFile
from cosmos_scale.checkpoint.inspect import total_size
from cosmos_scale.checkpoint.state import MANIFEST, RunState, read_manifest, saved_folders, write_manifest
from cosmos_scale.config import SourceConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.prepare import parquet
from cosmos_scale.data.prepare.images import ImageShard, read_listing
from cosmos_scale.data.samples.file_kind import refuse_no_text
from cosmos_scale.data.shards.index import index_shards, open_index
from cosmos_scale.data.shards.reader import ShardFile, ShardReader
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.shards.summary import SUMMARY, read_index_summary
from cosmos_scale.data.shards.table import open_table
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.captions_file import count_lines, read_rows
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular
from cosmos_scale.testing.shard_files import picture, write_shards
from tests.conftest import REPOSITORY

SAID = "a FIFO, not a regular file"

# What this process reads of the machine or of its own package, and what `fsspec` opens.
MAY_OPEN = {
    "cosmos_scale/cli/configs.py",
    "cosmos_scale/cli/leave.py",
    "cosmos_scale/cli/main.py",
    "cosmos_scale/cli/output.py",
    "cosmos_scale/config/shipped.py",
    "cosmos_scale/data/shards/store.py",
    "cosmos_scale/demo.py",
    "cosmos_scale/engine/comm_memory.py",
    "cosmos_scale/engine/rank_variables.py",  # /sys/class/net
    "cosmos_scale/evaluation/prompts/texts.py",  # the package's own names and templates
    "cosmos_scale/files.py",
    "cosmos_scale/host.py",
    "cosmos_scale/interfaces.py",  # /proc
    "cosmos_scale/launch/look.py",  # /proc
    "cosmos_scale/launch/printer.py",  # /dev/null
    "cosmos_scale/run/lock.py",  # /proc
    "cosmos_scale/run/supervisor.py",  # /proc
    "cosmos_scale/versions.py",  # the package's own sources
}


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """End a test that hangs in an open or a read."""

    def end(number: int, frame: FrameType | None) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def _linked(fifo: Path, name: str) -> Path:
    """The FIFO under a name of the kind that a reader takes."""
    path = fifo.with_name(name)
    path.symlink_to(fifo)
    return path


def _read_shard(fifo: Path) -> None:
    ShardReader().check([ShardFile("source", str(fifo), 0, str(fifo), mark="00" * 10)])


READERS: dict[str, Callable[[Path], object]] = {
    "run": load_config,
    "shard to index": lambda fifo: scan_shard(fifo),
    "shards to index": lambda fifo: index_shards(str(_linked(fifo, "a.tar").parent), None, workers=1, progress=False),
    "a shard by name": lambda fifo: index_shards(str(_linked(fifo, "a.tar")), None, workers=1, progress=False),
    "shard to read": _read_shard,
    "summary": lambda fifo: read_index_summary(str(fifo)),
    "table": lambda fifo: open_table(str(fifo)),
    "captions": lambda fifo: next(read_rows(_linked(fifo, "a.csv"))),
    "json lines": lambda fifo: next(read_rows(_linked(fifo, "a.jsonl"))),
    "lines": count_lines,
    "images": lambda fifo: read_listing(ImageShard("a", fifo, None), "url"),
    "schema": parquet.column_names,
    "rows": parquet.count_rows,
    "columns": lambda fifo: next(parquet.read_columns(fifo, ["a"])),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_no_reader_waits_for_a_fifo(reader: Callable[[Path], object], fifo: Path) -> None:
    with pytest.raises(UserError, match=SAID) as refusal:
        reader(fifo)
    assert "\n" not in str(refusal.value)


def test_a_picture_that_is_a_fifo_is_a_rejected_row(fifo: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "sound.jpg").write_bytes(picture(1))
    os.mkfifo(images / "fifo.jpg")
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\nsound.jpg,one\nfifo.jpg,two\n")
    report = build_shards(images, captions, tmp_path / "out", samples_per_shard=10, workers=1, progress=False)
    assert (report.samples, report.rejected.total()) == (1, 1)


def test_captions_of_a_preparation_that_are_a_fifo_are_refused(fifo: Path) -> None:
    with pytest.raises(OSError, match=SAID):
        refuse_no_text(fifo)


def test_an_index_of_fifos_is_refused(fifo: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [2])
    (folder / SUMMARY).unlink()
    (folder / SUMMARY).symlink_to(fifo)
    with pytest.raises(UserError, match=SAID):
        open_index(SourceConfig(name="a", shards=str(folder)))


@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero", "folder", "loop"])
def test_a_manifest_of_another_kind_breaks_the_checkpoint_only(kind: str, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    said = _make(kind, path)
    with pytest.raises(BrokenCheckpoint, match=said):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero", "folder", "loop"])
def test_a_part_of_another_kind_breaks_the_checkpoint_only(kind: str, tmp_path: Path) -> None:
    said = _make(kind, tmp_path / "part")
    with pytest.raises(BrokenCheckpoint, match=said):
        TensorFile(tmp_path, FileRecord("part", 8, [0]))


def _make(kind: str, path: Path) -> str:
    """Make a file of a kind; return what is said where it is read."""
    if kind == "fifo":
        os.mkfifo(path)
        return SAID
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = Path.cwd()
            os.chdir(path.parent)  # the path of a socket may have about 100 characters
            server.bind(path.name)
            os.chdir(before)
        return "a socket, not a regular file"
    if kind == "folder":
        path.mkdir()
        return "a folder, not a regular file"
    if kind == "loop":
        path.symlink_to(path)
        return "symbolic links"
    path.symlink_to(kind)
    return "a device, not a regular file"


def test_redirected_input_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: from-stdin")
    with path.open() as file:
        assert read_regular(f"/dev/fd/{file.fileno()}") == b"name: from-stdin"
        assert os.get_blocking(file.fileno())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "", "{"])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_json(text)


@pytest.mark.parametrize("text", ["[]", "3", '"format"', "null", "[" * 100_000, '["checksum"]'])
def test_a_manifest_of_another_form_breaks_the_checkpoint_only(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=MANIFEST) as refusal:
        read_manifest(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "rows",
    [
        "[[]]",
        "3",
        "null",
        '[["a", 1e999, 1]]',
        '[["a", -1, 1]]',
        f'[["a", {10**20}, 1]]',
        '[["a", "x", 1]]',
        '[["a", 1, 1], ["a", 1, 1]]',
        "[" * 9999,
    ],
)
def test_a_summary_of_another_form_is_refused(rows: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [1])
    (folder / SUMMARY).write_text(f'{{"format": "cosmos-scale shard index 1", "shards": {rows}}}')
    with pytest.raises(UserError, match="not a shard index"):
        read_index_summary(str(folder / SUMMARY))


def test_marks_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text('{"format": "cosmos-scale shard index 1", "shards": [], "marks": []}')
    with pytest.raises(UserError, match="not a shard index"):
        read_index_summary(str(tmp_path / SUMMARY))


def test_a_table_is_mapped_as_before(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [3])
    table = open_table(str(folder / "00000.index.npy"))
    assert len(table) == 3
    assert isinstance(table, np.memmap)


def test_every_file_is_opened_as_a_regular_file() -> None:
    """The package reads no file of a user by an open that would wait for a FIFO."""
    found = []
    for path in sorted((REPOSITORY / "cosmos_scale").rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        if name in MAY_OPEN or name.startswith("cosmos_scale/testing/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _reads_anything(node):
                found.append(f"{name}:{node.lineno}")
    assert not found, "use read_regular, or open(..., opener=regular_only), of cosmos_scale.files"


def _reads_anything(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        if call.func.attr in ("read_text", "read_bytes"):
            return True
        is_path, mode = call.func.attr == "open", call.args[:1]
        if isinstance(call.func.value, ast.Name):
            opens = f"{call.func.value.id}.{call.func.attr}"
            if opens in ("np.fromfile", "gzip.open", "os.open"):
                return True
            if opens in ("np.load", "np.memmap", "tarfile.open", "Image.open"):  # of a file that is open already
                return not isinstance(call.args[0] if call.args else call.keywords[0].value, (ast.Name, ast.Call))
    else:
        is_path, mode = isinstance(call.func, ast.Name) and call.func.id == "open", call.args[1:2]
    if not is_path or any(keyword.arg == "opener" for keyword in call.keywords):
        return False
    return not mode or not isinstance(mode[0], ast.Constant) or not set(str(mode[0].value)) & set("wxa+")


def _write_empty(folder: Path, step: int) -> Path:
    folder.mkdir()
    write_manifest(folder, RunState(step, 0, 0, 1, {}, "", {}), [])
    return folder


def test_a_checkpoint_under_the_name_of_another_step_is_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="it is of step 20, not of the step in the folder's name"):
        read_manifest(_write_empty(tmp_path / "step-00000010", 20))


@pytest.mark.parametrize("name", ["step-00000020", "step-20", "renamed"])
def test_a_checkpoint_under_its_own_name_or_a_free_one_is_read(name: str, tmp_path: Path) -> None:
    assert read_manifest(_write_empty(tmp_path / name, 20)).state.step == 20


def test_links_that_lead_nowhere_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "part.safetensors").write_bytes(b"12345")
    assert total_size([tmp_path]) == 5


def test_a_checkpoint_that_is_a_file_or_a_loop_is_broken(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("")
    (tmp_path / "step-00000002").symlink_to(tmp_path / "step-00000002")
    for folder in saved_folders(tmp_path):
        with pytest.raises(BrokenCheckpoint, match="no readable"):
            read_manifest(folder)
