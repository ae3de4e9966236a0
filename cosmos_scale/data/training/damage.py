"""What a run says of data that it could not use: one line a damaged sample or lost shard in damaged.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import writing

# The share of damaged samples is taken of at least so many: one damaged picture in the first batch proves nothing.
FEWEST_JUDGED = 1000


class Damage(NamedTuple):
    """One damaged sample, or where `sample` and `key` are None a lost shard, as it is written to damaged.jsonl."""

    step: int
    epoch: int
    sample: int | None
    source: str
    shard: str
    key: str | None
    reason: str


class DamageLog:
    """Appends damage to a file that all ranks share, each line once however often a run is resumed."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._rank = rank
        self._listed: set[Damage] = set()

    def start(self, step: int) -> None:
        """Take note of what the file says of steps from this one on: a resumed run comes upon it again.

        Left out when it comes again, rather than deleted now: other ranks may be appending by now.
        """
        self._listed.clear()
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                damage = Damage(*(record[field] for field in Damage._fields))
                if damage.step >= step:
                    self._listed.add(damage)
            except (ValueError, KeyError, TypeError):
                continue  # a torn line

    def append(self, damages: Sequence[Damage]) -> None:
        """Write what is not in the file yet; raises UserError where that is impossible."""
        new = [damage for damage in damages if damage not in self._listed]
        if not new:
            return
        lines = [json.dumps({**damage._asdict(), "rank": self._rank}) + "\n" for damage in new]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write: ranks that append at the same time do not cut each other's lines.
            with self.path.open("ab", buffering=0) as log:
                log.write("".join(lines).encode())


class DamageCount:
    """Counts samples tried and damaged by this rank, and says when these are too many."""

    def __init__(self, limit: float, log: Path | None) -> None:
        """limit: data.max_damaged. log: where the damage is named, for the message."""
        self._limit = limit
        self._log = log
        self._tried = 0
        self._damaged = 0

    def add(self, sound: int, damages: Sequence[Damage], lost_share: float) -> None:
        """Count a batch; raise UserError where more is damaged than what lost shards leave of the limit."""
        self._tried += sound + len(damages)
        self._damaged += len(damages)
        allowed = max(0.0, self._limit - lost_share)
        if damages and self._damaged > allowed * max(self._tried, FEWEST_JUDGED):
            last = damages[-1]
            raise UserError(
                f"{self._damaged} of {self._tried} samples are damaged, more than data.max_damaged {self._limit:g} "
                + (f"allows beside {lost_share:.2%} in lost shards" if lost_share else "allows")
                + f"; the last is {last.key} in {last.shard}: {last.reason}"
                + (f"; all are in {self._log}" if self._log else "")
            )
