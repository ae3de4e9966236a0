"""Writing beside the training: what stays, what ends with an error, and that no rank is left waiting."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.checkpoint import writer as writing
from cosmos_scale.checkpoint.files import FileRecord, write_tensors
from cosmos_scale.checkpoint.state import MANIFEST, checkpoints, load_checkpoint
from cosmos_scale.checkpoint.unfinished import SavingLock, remove_unfinished
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.test_state import fragments, keep, save_all, state


def writer_of(rank: int, world_size: int, root: Path, config: CheckpointConfig | None = None) -> CheckpointWriter:
    group = dist.group.WORLD
    assert group is not None
    return CheckpointWriter(root, fragments(rank, world_size), group, config or keep(9))


def message_of(call: Callable[[], object]) -> str:
    """The text of the UserError that a call ends with."""
    try:
        call()
    except UserError as error:
        return str(error)
    return "no error"


def test_multiples_are_kept_for_good(tmp_path: Path) -> None:
    run_ranks(save_all, 1, tmp_path, [0, 2, 4, 6, 8, 10], keep(1, every=4))
    assert sorted(folder.name[-2:] for folder in tmp_path.iterdir()) == ["00", "04", "08", "10"]


def save_twice(rank: int, world_size: int, root: Path) -> None:
    with writer_of(rank, world_size, root) as writer:
        writer.save(state(3))
        writer.save(state(3))  # still under way
        folder = writer.wait()
        assert folder is not None
        before = (folder / MANIFEST).stat().st_mtime_ns
        writer.save(state(3))
        assert writer.wait() == folder
        assert (folder / MANIFEST).stat().st_mtime_ns == before


def test_a_stop_right_after_a_checkpoint_does_not_write_it_again(tmp_path: Path) -> None:
    """With keep_last 1 a kill while the only checkpoint is replaced by itself would leave none."""
    run_ranks(save_twice, 2, tmp_path)


def save_over_another(rank: int, world_size: int, root: Path) -> None:
    with writer_of(rank, world_size, root) as writer:
        writer.save(state(6))


def test_what_is_in_the_way_is_replaced(tmp_path: Path) -> None:
    """A folder of this step without a manifest, and what runs that were killed while they saved left behind."""
    for name in ("step-00000006", "step-00000006.tmp", "step-00000003.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fragments-00000.safetensors").write_bytes(b"torn")
    run_ranks(save_over_another, 1, tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000006"]
    assert load_checkpoint(tmp_path / "step-00000006", fragments(0, 1, filled=False)) == state(6)


def save_while_the_folder_is_removed(rank: int, world_size: int, root: Path) -> str:
    def remove_then_write(path: Path, tensors: object) -> FileRecord:
        time.sleep(0.3)  # the first rank is waiting for this file by now
        shutil.rmtree(path.parent)
        return FileRecord(path.name, 0, [])

    if rank == 1:
        writing.write_tensors = remove_then_write  # type: ignore[attr-defined]
    with writer_of(rank, world_size, root) as writer:
        writer.save(state(3))
        return message_of(writer.wait)


def test_folder_removed_while_writing_ends_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(save_while_the_folder_is_removed, 2, tmp_path)
    assert len(set(messages)) == 1
    assert str(tmp_path / "step-00000003") in messages[0]
    assert list(tmp_path.iterdir()) == []


def save_unseen(rank: int, world_size: int, roots: list[Path]) -> str:
    """Ranks whose folders are not the same one, as on machines without a shared file system."""
    writing.SEEN_WITHIN = 0.1
    (roots[1] / "step-00000003.tmp").mkdir(parents=True, exist_ok=True)
    with writer_of(rank, world_size, roots[rank]) as writer:
        writer.save(state(3))
        return message_of(writer.wait)


def test_files_that_the_first_rank_never_sees_end_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(save_unseen, 2, [tmp_path / "0", tmp_path / "1"])
    assert len(set(messages)) == 1
    assert "fragments-00001.json is not seen here; rule: all ranks share one folder" in messages[0]
    assert checkpoints(tmp_path / "0") == []


def save_what_json_cannot_hold(rank: int, world_size: int, root: Path) -> str:
    with writer_of(rank, world_size, root) as writer:
        writer.save(replace(state(3), loss_scaler={"scale": object()}))
        first = message_of(writer.wait)
        writer.save(state(6))
        assert writer.wait() == root / "step-00000006"
        return first


def test_an_error_of_any_kind_is_reported_by_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    messages = run_ranks(save_what_json_cannot_hold, 2, tmp_path)
    assert len(set(messages)) == 1
    assert "step-00000003" in messages[0]
    assert "not JSON serializable" in messages[0]
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000006"]


class UnspeakableError(BaseException):
    """An error whose description fails too, as all may where memory has run out."""

    def __repr__(self) -> str:
        raise MemoryError


def save_where_the_thread_fails(rank: int, world_size: int, root: Path, where: str) -> tuple[str, list[str]]:
    """Save while a rank's thread cannot be started, or fails with an error that cannot be described."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread") if where == "start" else UnspeakableError

    with pytest.MonkeyPatch.context() as patch, writer_of(rank, world_size, root) as writer:
        if where == "commit":
            patch.setattr(writing, "write_manifest", fail)
        elif rank == 1 and where == "start":
            patch.setattr(threading.Thread, "start", fail)
        elif rank == 1:
            patch.setattr(writing, "write_tensors", fail)
        writer.save(state(3))
        said = message_of(writer.wait)
        patch.undo()
        writer.save(state(6))
        writer.wait()
    return said, [folder.name for folder in root.iterdir()]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("start", "step-00000003.tmp: can't start new thread (rank 1); "),
        ("write", "step-00000003.tmp/fragments-00001.safetensors: cannot be written (rank 1); "),
        ("commit", "step-00000003: cannot be made whole; "),
    ],
)
def test_nobody_waits_for_a_thread_that_fails_in_any_way(tmp_path: Path, where: str, said: str) -> None:
    for message, folders in run_ranks(save_where_the_thread_fails, 2, tmp_path, where):
        assert said in message
        assert folders == ["step-00000006"]


def save_where_a_file_is_in_the_way(rank: int, world_size: int, root: Path) -> str:
    with writer_of(rank, world_size, root) as writer:
        writer.save(state(3))
        return message_of(writer.wait)


def test_folder_that_cannot_be_made_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    messages = run_ranks(save_where_a_file_is_in_the_way, 2, tmp_path / "checkpoints")
    assert len(set(messages)) == 1
    assert "checkpoints/step-00000003.tmp: File exists; " in messages[0]
    assert (tmp_path / "checkpoints").read_text() == "a file"


def leave_with(rank: int, world_size: int, root: Path, error: Exception, wrong: bool) -> str:
    """Leave the writer's context by an error while a checkpoint is under way, which cannot be written if `wrong`."""
    step = replace(state(3), loss_scaler={"scale": object()}) if wrong else state(3)
    try:
        with writer_of(rank, world_size, root) as writer:
            writer.save(step)
            raise error
    except (UserError, RuntimeError) as raised:
        return str(raised)


def test_an_error_of_the_run_lets_the_checkpoint_under_way_be_finished(tmp_path: Path) -> None:
    for number, error in enumerate([JointError("the loss is not finite"), RuntimeError("gloo: connection closed")]):
        root = tmp_path / str(number)
        assert run_ranks(leave_with, 2, root, error, False) == [str(error)] * 2
        assert load_checkpoint(root / "step-00000003", fragments(0, 1, filled=False)) == state(3)


def test_an_error_of_the_run_stays_the_first_thing_said(tmp_path: Path) -> None:
    for message in run_ranks(leave_with, 2, tmp_path, JointError("the loss is not finite"), True):
        assert message.startswith("the loss is not finite; and checkpoint ")
        assert "\n" not in message


def leave_while_another_rank_never_writes(rank: int, world_size: int, root: Path) -> str:
    writing.LAST_SECONDS = 0.2
    if rank == 1:

        def stuck(path: Path, tensors: object) -> FileRecord:
            time.sleep(3600)
            raise AssertionError

        writing.write_tensors = stuck  # type: ignore[attr-defined]
    return leave_with(rank, world_size, root, RuntimeError("gloo: connection closed"), False)


def test_a_rank_that_is_gone_does_not_keep_the_others(tmp_path: Path) -> None:
    messages = run_ranks(leave_while_another_rank_never_writes, 2, tmp_path)
    assert messages == ["gloo: connection closed"] * 2
    assert checkpoints(tmp_path) == []


def wait_for_a_rank_that_ended(rank: int, world_size: int, root: Path) -> str:
    """Rank 1 leaves without waiting, so that rank 0 waits for it alone, and in vain."""
    writing.LAST_SECONDS = 0.2
    writer = writer_of(rank, world_size, root)
    writer.save(state(3))
    if rank == 1:
        dist.destroy_process_group()
        return "left"
    try:
        writer.wait()
    except RuntimeError as error:
        return type(error).__name__
    return "no error"


def test_waiting_ends_where_contact_is_lost(tmp_path: Path) -> None:
    first, second = run_ranks(wait_for_a_rank_that_ended, 2, tmp_path)
    assert first != "no error"
    assert second == "left"


def save_with_failures(rank: int, world_size: int, root: Path, failing: set[int], steps: list[int]) -> list[str]:
    """Save steps as the loop does while some writes of rank 1 fail, counted from 0; what was said, and the end."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cosmos_scale").addHandler(handler)
    write, count = write_tensors, iter(range(100))

    def failing_write(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
        if next(count) in failing and rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(path, tensors)

    writing.write_tensors = failing_write  # type: ignore[attr-defined]
    try:
        with writer_of(rank, world_size, root, CheckpointConfig(keep_last=9)) as writer:
            for step in steps:
                writer.save(state(step))
                writer._written.wait()
                flags = [False] * world_size
                dist.all_gather_object(flags, writer.unsaved())  # as Lookahead's message does
                if any(flags):
                    writer.save_again()
            writer.finish()
    except UserError as error:
        said.append(str(error))
    return said


def saved_steps(root: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in checkpoints(root)]


def test_one_failed_write_is_made_good_at_once(tmp_path: Path) -> None:
    first, second = run_ranks(save_with_failures, 2, tmp_path, {1}, [3, 6, 9])
    assert saved_steps(tmp_path) == [3, 6, 9]
    assert second == []
    assert len(first) == 2
    assert "step-00000006.tmp/fragments-00001.safetensors: Input/output error (rank 1); the previous" in first[0]
    assert first[1].endswith("step-00000006: could be written now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006", "step-00000009"]


def test_a_second_failure_waits_for_the_interval_and_a_third_ends_all_ranks(tmp_path: Path) -> None:
    run_ranks(save_with_failures, 2, tmp_path / "two", {0, 1}, [3, 6])
    assert saved_steps(tmp_path / "two") == [6]
    first, second = run_ranks(save_with_failures, 2, tmp_path / "three", {0, 1, 2}, [3, 6, 9])
    assert first[-1] == second[-1]
    assert first[-1].endswith("; no checkpoint was saved before; 3 failed in a row (checkpoint.failures)")
    assert saved_steps(tmp_path / "three") == []


def test_the_last_checkpoint_is_tried_as_often_as_may_fail(tmp_path: Path) -> None:
    run_ranks(save_with_failures, 2, tmp_path / "saved", {1, 2}, [3, 6])
    assert saved_steps(tmp_path / "saved") == [3, 6]
    first, _ = run_ranks(save_with_failures, 2, tmp_path / "lost", {1, 2, 3}, [3, 6])
    assert saved_steps(tmp_path / "lost") == [3]
    assert "the previous checkpoints are untouched" in first[-1]


def hold_the_lock(rank: int, world_size: int, root: Path) -> tuple[bool, bool]:
    """Rank 0 saves there; rank 1 is another run that starts: what is unfinished before and after rank 0 has ended."""
    lock = SavingLock(root)
    if rank == 0:
        lock.take()
    (root / f"step-0000000{rank}.tmp").mkdir()
    found = []
    for _ in range(2):
        dist.barrier()
        if rank == 1:
            remove_unfinished(root, lock)
            found.append((root / "step-00000000.tmp").exists())
        dist.barrier()
        if rank == 0:
            lock.release()
    return found[0] if found else True, found[-1] if found else True


def test_what_a_live_run_has_not_finished_stays(tmp_path: Path) -> None:
    assert run_ranks(hold_the_lock, 2, tmp_path)[1] == (True, False)


def test_what_a_dead_run_left_goes_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "step-00000003.tmp").mkdir()
    run_ranks(enter_and_leave, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def enter_and_leave(rank: int, world_size: int, root: Path) -> None:
    with writer_of(rank, world_size, root):
        pass
