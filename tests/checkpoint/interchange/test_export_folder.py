"""An export's folder is written whole or not at all; --force replaces what an export wrote, and nothing else."""

import fcntl
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from cosmos_scale.checkpoint.interchange import export_folder
from cosmos_scale.checkpoint.interchange.export_files import ExportedFile, text_file, torch_file
from cosmos_scale.checkpoint.interchange.export_folder import check_target, write_export
from cosmos_scale.errors import UserError


def write(folder: Path, texts: dict[str, str], *, force: bool = False) -> None:
    write_export(folder, [text_file(name, text) for name, text in texts.items()], "# A card\n", force=force)


def held(folder: Path) -> dict[str, str]:
    """What a folder's files hold, without the card."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}


def refused(folder: Path, names: Sequence[str], *, force: bool) -> str:
    with pytest.raises(UserError) as caught:
        check_target(folder, names, force=force)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_written_with_its_card_and_nothing_beside_it(tmp_path: Path) -> None:
    told: list[int] = []
    files = [text_file("a.json", "{}"), text_file("b.txt", "hello")]
    write_export(tmp_path / "new" / "out", files, "# A card\n", force=False, advance=told.append)
    assert held(tmp_path / "new" / "out") == {"a.json": "{}", "b.txt": "hello"}
    card = (tmp_path / "new" / "out" / "README.md").read_text()
    sums = (
        re.escape("# A card\n\n<!-- their sums: ")
        + "a.json [0-9a-f]{16}, b.txt [0-9a-f]{16}, README.md [0-9a-f]{16} -->\n"
    )
    assert re.fullmatch(sums + "<!-- files of cosmos-scale convert: a.json, b.txt, README.md -->\n", card)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert sum(told) == sum(path.stat().st_size for path in (tmp_path / "new" / "out").iterdir())


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link", {"a": "1"})
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "empty") == {"a": "1"}


@pytest.fixture(params=[True, False], ids=["locks", "no lock above"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the folder above the export can be locked, so that no other export is between two steps."""

    @contextmanager
    def never(folder: Path) -> Iterator[bool]:
        yield False

    if not request.param:
        monkeypatch.setattr(export_folder, "_alone_in", never)
    return bool(request.param)


def test_what_killed_exports_left_is_deleted_and_what_a_live_one_writes_is_not(tmp_path: Path, locks: bool) -> None:
    """Each leftover is as large as a model, and hidden."""
    names = (".out.1.part", ".out.2.part", ".out.3.part", ".other.4.part")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
        if name != ".out.3.part":  # begun this moment
            os.utime(tmp_path / name, (0, 0))
    live = os.open(tmp_path / ".out.2.part", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    write(tmp_path / "out", {"a": "1"})
    os.close(live)
    kept = [name for name in names[1:] if name != ".out.3.part" or not locks]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_a_folder_where_a_disk_is_mounted_cannot_be_replaced() -> None:
    assert "/proc: a disk is mounted there; rule: name a folder in it" in refused(Path("/proc"), [], force=False)


def test_the_folder_above_is_named_where_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path}/file: cannot be written: File exists$"):
        write(tmp_path / "file" / "out", {"a": "1"})


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": "1"})
    assert "with --force" in refused(tmp_path / "out", ["b"], force=False)
    with pytest.raises(UserError, match="with --force"):
        write(tmp_path / "out", {"a": "2"})
    assert held(tmp_path / "out") == {"a": "1"}


def test_force_replaces_own_files_and_keeps_those_of_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"a": "1", "old": "1"})
    (out / "notes.txt").write_text("mine")
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("mine too")
    write(out, {"a": "2", "new": "2"}, force=True)
    assert held(out) == {"a": "2", "new": "2", "notes.txt": "mine"}
    assert (out / ".git" / "config").read_text() == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_touch_folders_and_files_that_no_export_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("mine")
    assert "convert did not fill it" in refused(out, ["b"], force=True)
    (out / "README.md").write_text("my own\n")
    assert "convert did not fill it" in refused(out, ["b"], force=True)
    write(tmp_path / "other", {"b": "1"})
    (tmp_path / "other" / "a").write_text("mine")
    assert "convert did not write it" in refused(tmp_path / "other", ["a", "b"], force=True)
    (tmp_path / "file").write_text("mine")
    assert "is no folder" in refused(tmp_path / "file", [], force=True)
    (tmp_path / "current" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "current" / "below")
    assert "the current folder lies in it" in refused(Path(".."), [], force=True)


@pytest.mark.parametrize(
    ("name", "change", "way_out"),
    [
        (
            "README.md",
            lambda text: text.replace("# A card", "---\nlicense: mit\n---\n# A card"),
            "rule: name another folder",
        ),
        ("README.md", lambda text: text + "\n## How I trained it\n", "rule: name another folder"),
        ("model.bin", lambda text: "2" * len(text), "rule: move it away, or name another folder"),  # trained on
    ],
    ids=["a licence in the card", "words below it", "a model"],
)
def test_force_does_not_replace_what_was_changed_since(
    name: str, change: Callable[[str], str], way_out: str, tmp_path: Path
) -> None:
    """A card is there to be edited, and transformers saves a model into the folder that it came from."""
    out = tmp_path / "out"
    write(out, {"model.bin": "1" * (3 << 20), "config.json": "{}"})
    changed = change((out / name).read_text())
    (out / name).write_text(changed)
    said = refused(out, ["model.bin"], force=True)
    assert said == f"{out / name}: was changed since convert wrote it, so --force does not replace it; {way_out}"
    with pytest.raises(UserError, match="was changed since"):
        write(out, {"model.bin": "3"}, force=True)
    assert (out / name).read_text() == changed
    if name != "README.md":
        (out / name).rename(tmp_path / "mine")
        write(out, {"model.bin": "3"}, force=True)
        assert held(out) == {"model.bin": "3"}


def test_an_export_of_an_earlier_version_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": "1"})
    card = tmp_path / "out" / "README.md"
    card.write_text("My words\n\n<!-- files of cosmos-scale convert: a, README.md -->\n")  # without sums
    write(tmp_path / "out", {"a": "2"}, force=True)
    assert held(tmp_path / "out") == {"a": "2"}


def test_an_edited_card_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    write(tmp_path / "out", {"a": "1"})
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text().replace("a, ", f"a, ../outside, {outside}, "))
    write(tmp_path / "out", {"a": "2"}, force=True)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_a_write_that_fails_leaves_all_as_it_was(
    before: bool, error: type[BaseException] | BaseException, tmp_path: Path
) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    if before:
        write(tmp_path / "out", {"a": "1"})
    files = [text_file("a", "2"), ExportedFile("b", 8, fail)]
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        write_export(tmp_path / "out", files, "card", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    assert not before or held(tmp_path / "out") == {"a": "1"}


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_folder, "free_bytes", lambda folder: 2.0**20)
    with pytest.raises(UserError, match=r"1 MiB are free there, the files take 3; rule: make room"):
        write_export(tmp_path / "out", [ExportedFile("a", 2 * 2**20, lambda file: None)], "card", force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [False, True], ids=["before the new folder", "after it"])
def test_what_a_killed_replacement_had_put_aside_comes_back(
    taken: bool, tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", {"a": "1"})
    (tmp_path / "out" / "mine").write_text("own")
    (tmp_path / "out").rename(tmp_path / "old")
    if taken:
        write(tmp_path / "out", {"a": "2"})
    (tmp_path / "old").rename(tmp_path / ".out.5.before")
    if not locks:
        if not taken:
            write(tmp_path / "out", {"a": "2"})
        assert (tmp_path / ".out.5.before").exists()  # it may be that of a live export
        monkeypatch.setattr(export_folder, "_LOCKED_AFTER", -1)
    write(tmp_path / "out", {"a": "3"}, force=True)
    assert held(tmp_path / "out") == {"a": "3", "mine": "own"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def in_a_child(work: Callable[[], None]) -> int:
    """Do some work in a copy of this process; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except UserError:
            os._exit(2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, folder: Path) -> None:
    """Replace an export; the process dies before so many changes of names, folders and files."""
    steps = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os._exit(9)
            return change(*arguments, **options)

        return call

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
        setattr(os, name, counted(getattr(os, name)))
    for name in ("_exchange", "_write", "_clear", "_move_along"):
        setattr(export_folder, name, counted(getattr(export_folder, name)))
    write(folder, {"a": "2", "c": "2"}, force=True)


@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_export_that_is_killed_at_any_moment_leaves_the_old_or_the_new_one(
    before: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ({"a": "1", "b": "1"} if before else {}), {"a": "2", "c": "2"}
    others = {"mine": "own"} if before else {}
    if not exchange:
        monkeypatch.setattr(export_folder, "_exchange", lambda one, other: False)
    for step in range(1, 60):
        folder = tmp_path / str(step) / "out"
        if before:
            write(folder, old)
            (folder / "mine").write_text("own")
        status = in_a_child(partial(killed_at, step, folder))
        assert status in (0, 9)
        found = held(folder) if folder.exists() else {}
        # What others had there moves along last. Where names cannot be exchanged, the old folder may be put aside.
        whole = [{**old, **others}, {**new, **others}, new]
        assert found in whole or (not exchange and not found), (step, found)
        write(folder, {"a": "3"}, force=True)
        assert held(folder) == {"a": "3", **others}, step
        assert [path.name for path in folder.parent.iterdir()] == ["out"], step
        if status == 0:
            break
    assert status == 0
    assert step > 5


@pytest.mark.parametrize("force", [False, True])
def test_of_two_exports_at_once_one_is_whole_and_the_other_is_told(force: bool, tmp_path: Path) -> None:
    statuses: list[int] = []

    def meanwhile(file: IO[bytes]) -> None:
        file.write(b"first")
        statuses.append(in_a_child(lambda: write(tmp_path / "out", {"b": "second"}, force=force)))

    def first() -> None:
        write_export(tmp_path / "out", [ExportedFile("a", 5, meanwhile)], "card", force=force)

    if force:
        first()
    else:
        with pytest.raises(UserError, match="convert has written there before"):
            first()
    assert statuses == [0]
    assert held(tmp_path / "out") == ({"a": "first"} if force else {"b": "second"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_under_torch_save_is_told_as_such(tmp_path: Path) -> None:
    """torch.save itself then raises an error of its own, of a position in the file."""
    file = torch_file("a.pt", {"student": {"a": torch.zeros(2**18)}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            write_export(tmp_path / "out", [file], "card", force=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
