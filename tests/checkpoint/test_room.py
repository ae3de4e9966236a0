"""A disk too full for one more checkpoint: old ones go before the new one is written, the newest one never."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosmos_scale.checkpoint import room, writer
from cosmos_scale.checkpoint.room import delete_checkpoint, make_room, prunable, superfluous
from cosmos_scale.checkpoint.state import MANIFEST, checkpoint_name, checkpoints, step_of
from cosmos_scale.checkpoint.unfinished import SavingLock, remove_unfinished
from cosmos_scale.cli.main import main
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.run.folder import check_disk_room
from cosmos_scale.testing.runs import write_run

MIB = 2**20


def write_checkpoints(root: Path, *steps: int, updates: Sequence[int] = ()) -> None:
    """Folders that count as checkpoints, each of one MiB; the manifest says how many updates were done, if anything."""
    for n, step in enumerate(steps):
        folder = root / checkpoint_name(step)
        folder.mkdir(parents=True)
        manifest = json.dumps({"state": {"updates": updates[n]}} if updates else {})
        (folder / MANIFEST).write_text(manifest)
        (folder / "fragments-00000.safetensors").write_bytes(bytes(MIB - len(manifest)))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "free", "gone"),
    [
        (3, None, 1.0, []),  # there is room
        (3, None, 0.5, [2]),
        (3, None, -9.0, [2]),  # two of three stay, until the new one is whole
        (1, None, -9.0, [2, 4]),
        (1, 4, -9.0, [2]),  # that of step 4 is kept for good
        (2, None, 0.5, [2]),  # one is enough
    ],
)
def test_old_checkpoints_go_as_far_as_room_is_short(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep_last: int,
    keep_every: int | None,
    free: float,
    gone: list[int],
) -> None:
    write_checkpoints(tmp_path, 2, 4, 6)
    disk = 3 * MIB + free * MIB
    monkeypatch.setattr(room, "free_bytes", lambda root: disk - MIB * len(checkpoints(root)))
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    assert [step_of(folder) for folder in make_room(tmp_path, config)] == gone
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [step for step in (2, 4, 6) if step not in gone]


@pytest.mark.parametrize(
    ("updates", "keep", "keep_every", "gone"),
    [
        ((2, 4, 6, 8), 2, None, [2, 4]),
        ((2, 4, 4, 4), 2, None, [4, 6]),  # the last three hold the same weights: one of them is enough
        ((2, 4, 4, 4), 2, 4, [6]),  # those of steps 4 and 8 are kept for good
        ((2, 2, 4, 4), 1, None, [2, 4, 6]),
        ((2, 2, 4, 4), 3, None, [2]),
        ((2, 4, 4, 4), 4, None, []),
    ],
)
def test_checkpoints_of_skipped_steps_push_out_no_others(
    tmp_path: Path, updates: tuple[int, ...], keep: int, keep_every: int | None, gone: list[int]
) -> None:
    write_checkpoints(tmp_path, 2, 4, 6, 8, updates=updates)
    config = CheckpointConfig(keep_every=keep_every)
    assert [step_of(folder) for folder in superfluous(tmp_path, config, keep)] == gone


def test_what_may_go_counts_as_room_at_the_start(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2)
    write_checkpoints(tmp_path / "checkpoints", 2, 4, 6)
    assert [step_of(folder) for folder in prunable(tmp_path / "checkpoints", config)] == [2, 4]
    check_disk_room(tmp_path, int(room.free_bytes(tmp_path)) + MIB // 2, config)


def test_a_run_on_a_short_disk_goes_on_with_fewer(
    tmp_path: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path, scenes, train={"max_steps": 5}, checkpoint={"every": 1, "keep_last": 2})
    monkeypatch.setattr(room, "free_bytes", lambda root: 0.0)
    assert main(["train", str(run)]) == 0
    assert [step_of(folder) for folder in checkpoints(tmp_path / "tiny" / "checkpoints")] == [4, 5]
    assert caplog.text.count(": deleted, since the disk has no room for the next one beside it") == 3


def test_a_read_only_checkpoint_stays_for_good(tmp_path: Path) -> None:
    """Users protect one so. It was renamed, and out of all lists, where its files could not be deleted."""
    write_checkpoints(tmp_path, 2, 4, 6, 8)
    (tmp_path / checkpoint_name(2)).chmod(0o555)
    config = CheckpointConfig(keep_last=2)
    assert [step_of(folder) for folder in superfluous(tmp_path, config, 2)] == [4]
    assert [step_of(folder) for folder in prunable(tmp_path, config)] == [4, 6]
    (tmp_path / checkpoint_name(2)).chmod(0o755)
    assert [step_of(folder) for folder in superfluous(tmp_path, config, 2)] == [2, 4]


def test_what_a_user_has_put_into_a_checkpoints_folder_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a run went back and deletes the checkpoint of that step once more."""
    for text in ("first", "second"):
        write_checkpoints(tmp_path, 2)
        folder = tmp_path / checkpoint_name(2)
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").write_text(text)
        (folder / "notes.txt").touch()
        (folder / ".DS_Store").touch()
        delete_checkpoint(folder)
    kept = [folder.with_name(f"{folder.name}.others{number}") for number in ("", ".0")]
    assert sorted(tmp_path.iterdir()) == kept
    assert [(one / "hf" / "model.safetensors").read_text() for one in kept] == ["first", "second"]
    assert [sorted(path.name for path in one.iterdir()) for one in kept] == [["hf", "notes.txt"]] * 2
    assert f"{folder}: deleted; what else lay in its folder (hf, notes.txt) is in {kept[1]} now" in caplog.text
    assert checkpoints(tmp_path) == []


def test_links_in_the_place_of_checkpoints_go_and_their_targets_stay(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    root.mkdir()
    write_checkpoints(elsewhere, 2)
    target = elsewhere / checkpoint_name(2)
    for name in (checkpoint_name(2), "step-00000003.tmp", "step-00000001.old.tmp"):
        (root / name).symlink_to(target)
    (root / "step-00000004.tmp").symlink_to(tmp_path / "nowhere")
    delete_checkpoint(root / checkpoint_name(2))
    assert len(list(root.iterdir())) == 3
    lock = SavingLock(root)
    remove_unfinished(root, lock)
    lock.release()
    assert list(root.iterdir()) == []
    assert (target / MANIFEST).is_file()


@pytest.mark.parametrize(("files", "free", "none_left"), [(40, 0, True), (40, 3, False), (0, 0, False)])
def test_a_disk_without_room_for_a_further_file_is_told_from_one_without_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, free: int, none_left: bool
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=files, f_favail=free))
    assert room.no_file_is_left(tmp_path) == none_left
    failure = OSError(errno.ENOSPC, "No space left on device")
    assert ("no inode is left" in writer._reason(failure, tmp_path)) == none_left
    assert writer._reason(OSError(errno.EIO, "I/O error"), tmp_path) == "I/O error"
