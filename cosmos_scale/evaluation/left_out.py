"""The words on pictures and samples that an evaluation leaves out: each on one line of stderr, once a process."""

import sys


class LeftOutWords:
    """Names what is left out of one set, which is read for student and teacher, and at many steps of a run."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, what: str) -> None:
        """Say that something is left out, unless the same was said before; what: its name and what is wrong with it."""
        if what not in self._said:
            self._said.add(what)
            print(f"left out: {what}", file=sys.stderr)
