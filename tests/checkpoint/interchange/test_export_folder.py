"""An export's folder is written whole or not at all; --force replaces what an export wrote, and nothing else."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from cosmos_scale.checkpoint.interchange import export_folder
from cosmos_scale.checkpoint.interchange.export_files import ExportedFile, text_file
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
    assert card == "# A card\n\n<!-- files of cosmos-scale convert: a.json, b.txt, README.md -->\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert sum(told) == sum(path.stat().st_size for path in (tmp_path / "new" / "out").iterdir())


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link", {"a": "1"})
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "empty") == {"a": "1"}


def test_what_killed_exports_left_is_deleted_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
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
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "out"])


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
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", {"a": "1"})
    (tmp_path / "out" / "mine").write_text("own")
    (tmp_path / "out").rename(tmp_path / ".out.5.before")
    if taken:
        write(tmp_path / "out", {"a": "2"})
    assert (tmp_path / ".out.5.before").exists()  # it may be that of a live export
    monkeypatch.setattr(export_folder, "_LOCKED_AFTER", -1)
    write(tmp_path / "out", {"a": "3"}, force=True)
    assert held(tmp_path / "out") == {"a": "3", "mine": "own"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
