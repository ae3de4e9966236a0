"""Errors that a user can mend, shown as one line without a traceback, and an error that all ranks settle together."""

from collections.abc import Mapping


class UserError(Exception):
    """A wrong input; its text is one line that names the key, file or rank, the value and the rule."""


class JointError(UserError):
    """A wrong input that all ranks refuse alike, with one text: none of them waits for another one any more."""


class ShardsToGiveUp(Exception):
    """Some shards cannot be read any more, after all retries. All ranks must agree to give these shards up.

    shards: by the shards' names, the reasons why they cannot be read.
    """

    def __init__(self, shards: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in shards.items()))
        self.shards = dict(shards)
