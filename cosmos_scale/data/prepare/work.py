"""One preparation: what it was asked for, and the files of what it has done so far."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.prepare.datasets import DREAMLIP, PIXELPROSE, Dataset, Join
from cosmos_scale.data.prepare.images import ImageShard
from cosmos_scale.data.samples.sentences import Split
from cosmos_scale.data.work import PREPARATION, Work
from cosmos_scale.errors import UserError


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
        return self.as_work.folder

    @property
    def as_work(self) -> Work:
        """The preparation as work that can be stopped."""
        return Work(PREPARATION, self.out)

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
        return self.as_work.report(shard)

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
def reading_work(path: Path) -> Iterator[None]:
    """Turn the errors of a block that reads a file of the work under way into a UserError which says the way on."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        folder = next(parent for parent in path.parents if parent.name == PREPARATION.folder)
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {said}; delete {folder.parent} and begin anew") from error
