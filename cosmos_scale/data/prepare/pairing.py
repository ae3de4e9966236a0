"""Which of its shard's listed entries an image is.

A key names one image of a shard. Where shards or lists were joined, a key comes twice, and where a list is that of
another download, it says other things than the image's own .json: then the wrong entry would give an image the captions
of another one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cosmos_scale.data.prepare.datasets import Join
from cosmos_scale.data.prepare.images import SUCCESS, Image, Listed


class ListedEntry(NamedTuple):
    """What is listed of an image, and the position in the join table of the row that it takes."""

    listed: Listed
    position: int


class Pairing:
    """The listed entries of a shard that no image took yet."""

    def __init__(self, listed: list[Listed], plan: list[int], join: Join) -> None:
        self._join = join
        self._by_key: dict[str, list[ListedEntry]] = {}
        for image, position in zip(listed, plan, strict=True):
            self._by_key.setdefault(image.key, []).append(ListedEntry(image, position))

    def take(self, image: Image) -> tuple[list[ListedEntry], str | None]:
        """Return the entry of an image, and why it cannot be used, if so: then there may be several entries, or none.

        The entry has the image's key and the join value that the image's .json says. Without such a .json, the key
        alone decides, if all its entries mean the same.
        """
        entries = self._by_key.get(image.key)
        if not entries:
            return [], "image not listed: the parquet beside its shard does not have it"
        same = [entry for entry in entries if entry.listed.value == image.value]
        if not same and image.value is not None:
            theirs = ", ".join(sorted({str(entry.listed.value) for entry in entries}))
            what = f"{self._join} {theirs}, its .json {image.value}"
            return [], f"contradiction: the parquet beside its shard says {what}"
        chosen = same or entries
        self._by_key[image.key] = [entry for entry in entries if entry not in chosen]
        downloaded = [entry for entry in chosen if entry.listed.status == SUCCESS]
        if not downloaded:
            status = chosen[0].listed.status
            return chosen, f"contradiction: its shard has it, the parquet beside it says {status}"
        if (values := len({entry.listed.value for entry in downloaded})) > 1:
            return chosen, f"duplicate key: the parquet beside its shard lists it with {values} {self._join}s"
        return downloaded[:1], None

    def left(self) -> Iterator[ListedEntry]:
        """Yield the entries that no image took, in the order of their keys' first entries."""
        for entries in self._by_key.values():
            yield from entries


def absent(image: Listed) -> str:
    """Return why a listed image is not in its shard."""
    if image.status == SUCCESS:
        return "image not in its shard: the parquet beside it has it"
    return f"not downloaded: {image.status}{f': {image.error}' if image.error else ''}"
