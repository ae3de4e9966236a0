"""What a run says of data that it could not use: damaged.jsonl, with a line for each damaged sample and lost shard."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular
from cosmos_scale.line_file import LineFile

# The damaged share is taken of at least so many samples: one damaged picture in the first batch proves nothing.
FEWEST_JUDGED = 1000


class Damage(NamedTuple):
    """One line of damaged.jsonl: a damaged sample, or a lost shard, whose `sample` and `key` are None.

    origin: where the sample was built from; the line has it only where it is known.
    """

    step: int
    epoch: int
    sample: int | None
    source: str
    shard: str
    key: str | None
    reason: str
    origin: str | None = None


class DamageLog:
    """Appends damage to a file that all ranks share, each line once however often a run is resumed."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._file = LineFile(path)
        self._rank = rank
        self._listed: set[Damage] = set()

    def start(self, step: int) -> None:
        """Take note of the file's lines on a step and the steps after it, since a resumed run meets their damage again.

        `append` then leaves this damage out. The lines are not deleted: other ranks may be appending already.
        """
        self._listed.clear()
        try:
            lines = read_regular(self.path).splitlines()
        except OSError:  # there is none yet; a file that cannot be read costs nothing but lines written twice
            return
        for line in lines:
            try:
                record = load_json(line)
                damage = Damage(*({"origin": None, **record}[field] for field in Damage._fields))
                if damage.step >= step:
                    self._listed.add(damage)
            except (ValueError, KeyError, TypeError):
                continue  # a torn line

    def append(self, damages: Sequence[Damage]) -> None:
        """Write the damages that are not in the file yet; they wait in memory where the file cannot be written."""
        records = [{**damage._asdict(), "rank": self._rank} for damage in damages if damage not in self._listed]
        for record in records:
            if record["origin"] is None:
                del record["origin"]
        self._file.append([json.dumps(record) for record in records])  # and lines that wait, where there are no new


class DamageCount:
    """Counts the samples that this rank has tried, and those among them that are damaged, up to a limit."""

    def __init__(self, limit: float, log: Path | None) -> None:
        """limit: data.max_damaged. log: the file that names the damage, for the message."""
        self._limit = limit
        self._log = log
        self._tried = 0
        self._damaged = 0

    def add(self, sound: int, damages: Sequence[Damage], lost_share: float) -> None:
        """Count a batch; raises UserError where more is damaged than the limit allows beside what lost shards hold."""
        self._tried += sound + len(damages)
        self._damaged += len(damages)
        allowed = max(0.0, self._limit - lost_share)
        if damages and self._damaged > allowed * max(self._tried, FEWEST_JUDGED):
            last = damages[-1]
            are = "is" if self._damaged == 1 else "are"
            raise UserError(
                f"{self._damaged} of {self._tried} samples {are} damaged, more than data.max_damaged {self._limit:g} "
                + (f"allows beside {lost_share:.2%} in lost shards" if lost_share else "allows")
                + f"; the last is {last.key} in {last.shard}: {last.reason}"
                + (f"; all are in {self._log}" if self._log else "")
            )
