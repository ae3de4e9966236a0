"""One preparation: what it was asked for, and the files of what it has done so far."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.prepare.datasets import DREAMLIP, PIXELPROSE, Dataset, Join
from cosmos_scale.data.prepare.images import ImageShard, folder_files
from cosmos_scale.data.samples.sentences import Split
from cosmos_scale.data.work import PREPARATION, Work
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only


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

    @property
    def states(self) -> Path:
        """The file that says what became of each row of the table."""
        return self.work / "states.npy"

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
        """Return, as json values, what must stay the same for a preparation to go on.

        Captions count by what they hold; images, too many to be read for this, by their sizes and times.
        """
        captions, images = sha256(), sha256()
        for path in self.captions:
            captions.update(_digest_now(path))
        for shard in self.images:
            images.update(f"{shard.name}\n".encode())
            for line in _seen(shard):
                images.update(f"{line}\n".encode())
        return {
            "dataset": self.dataset,
            "split": self.split,
            "join": self.join,
            "captions": [{"file": path.name, "bytes": path.stat().st_size} for path in self.captions],
            "captions_digest": captions.hexdigest()[:16],
            "image_shards": len(self.images),
            "images_digest": images.hexdigest()[:16],
        }


def _digest_now(path: Path) -> bytes:
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _digest(path: Path, size: int, time: int) -> bytes:
    """Return the digest of a captions file; a file whose size and time (ns) stay is read once."""
    digest = sha256()
    try:
        with open(path, "rb", opener=regular_only) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.digest()


def _seen(shard: ImageShard) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of each file of a shard of images, and of the parquet beside it."""
    yield _size_and_time(shard.path, shard.path.name)
    if shard.path.is_dir():
        for path in folder_files(shard.path):
            yield _size_and_time(path, str(path.relative_to(shard.path)))
    if shard.listing is not None:
        yield _size_and_time(shard.listing, shard.listing.name)


def _size_and_time(path: Path, name: str) -> tuple[str, int, int]:
    status = path.stat() if path.exists() else path.lstat()  # a link may lead nowhere
    return name, status.st_size, status.st_mtime_ns


@contextmanager
def reading_work(path: Path) -> Iterator[None]:
    """Turn the errors of a block that reads a file of the work under way into a UserError which says the way on."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        folder = next(parent for parent in path.parents if parent.name == PREPARATION.folder)
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {said}; delete {folder.parent} and begin anew") from error
