"""The folder of a preparation that is under way: what it was asked for, and what it has done so far."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.prepare.datasets import DREAMLIP, PIXELPROSE, Dataset, Join
from cosmos_scale.data.prepare.images import ImageShard
from cosmos_scale.data.samples.sentences import Split
from cosmos_scale.errors import UserError
from cosmos_scale.files import make_folder, make_output_folder, no_locks, replace_file

MANIFEST = "manifest.json"
_WORK = ".prepare"


class Task(NamedTuple):
    """One preparation: everything that its output depends on. out: the folder of the shards."""

    dataset: str
    captions: list[Path]
    images: list[ImageShard]
    out: Path
    join: Join
    split: Split

    @property
    def form(self) -> Dataset:
        """The dataset's form of captions."""
        return {form.name: form for form in (DREAMLIP, PIXELPROSE)}[self.dataset]

    @property
    def work(self) -> Path:
        """The folder of work under way; it is deleted when all is done."""
        return self.out / _WORK

    @property
    def table(self) -> Path:
        """The folder of the join table."""
        return self.work / "table"

    def for_worker(self) -> "Task":
        """Return the task without its list of images, which no worker needs."""
        return self._replace(images=[])

    def plan(self, shard: str) -> Path:
        """Return the file that says which captions row each image of a shard takes."""
        return self.work / "plan" / f"{shard}.npy"

    def report(self, shard: str) -> Path:
        """Return the file that says how a shard was written; it is written after the shard."""
        return self.work / "shards" / f"{shard}.json"

    def options(self) -> dict[str, Any]:
        """Return, as json values, what must stay the same for a preparation to go on."""
        digest = sha256()
        for shard in self.images:
            size = shard.path.stat().st_size if shard.path.is_file() else 0
            digest.update(f"{shard.name} {size}\n".encode())
        return {
            "dataset": self.dataset,
            "split": self.split,
            "join": self.join,
            "captions": [{"file": path.name, "bytes": path.stat().st_size} for path in self.captions],
            "image_shards": len(self.images),
            "image_shards_digest": digest.hexdigest()[:16],
        }


@contextmanager
def open_work(task: Task) -> Iterator[None]:
    """Begin a preparation or go on with one, as its only process.

    Raises: UserError where the folder holds other shards or a preparation with other options, or another process
    prepares it now.
    """
    make_output_folder(task.out)
    if not task.work.exists() and any(task.out.glob("*.tar")):
        raise UserError(f"{task.out}: holds shards that no preparation made; name another folder with --out")
    make_folder(task.work)
    with (task.work / "lock").open("w") as lock:
        try:
            # Not flock: workers inherit such a lock, and would hold it after their parent was killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise UserError(f"{task.out}: another process is preparing it now") from error
            raise UserError(f"{task.out}: cannot be locked: {no_locks(error) or error.strerror or error}") from error
        path = task.work / "options.json"
        if path.exists() and not any(task.work.glob("shards/*.json")):
            _begin_anew(task, json.loads(path.read_text()))
        if path.exists():
            check_options(task, json.loads(path.read_text()), "begun")
        else:
            replace_file(path, json.dumps(task.options()).encode())
        for folder in ("plan", "shards"):
            make_folder(task.work / folder)
        for part in task.out.glob("*.part"):
            part.unlink()
        yield


def _begin_anew(task: Task, before: dict[str, Any]) -> None:
    """Forget a preparation with other options that has not written a shard: its loss is not worth an error."""
    if before == task.options():
        return
    for shard in task.out.glob("*.tar"):  # a whole shard whose writer was killed before the report
        shard.unlink()
    for item in task.work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != "lock":
            item.unlink()


def check_options(task: Task, before: dict[str, Any], done: str) -> None:
    """Raise UserError, naming the first difference, where a folder was prepared with other options."""
    for name, value in task.options().items():
        if before.get(name) != value:
            old, new = json.dumps(before.get(name)), json.dumps(value)
            raise UserError(
                f"{task.out}: its preparation was {done} with {name} {old}, not {new}; "
                "go on with the same options and files, or name another folder with --out"
            )
