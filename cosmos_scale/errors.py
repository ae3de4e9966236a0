"""Errors that a user can mend, shown as one line without a traceback; and what all ranks must settle together."""

from collections.abc import Mapping


class UserError(Exception):
    """A wrong input; its text is one line that names the key, file or rank, the value and the rule."""


class ShardsToGiveUp(Exception):
    """Shards cannot be read any more, after all retries; what becomes of their samples is for all ranks to agree on.

    shards: reasons by the shards' names.
    """

    def __init__(self, shards: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in shards.items()))
        self.shards = dict(shards)
