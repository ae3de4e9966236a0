"""Pictures and lists that an earlier command left in an output folder, and that a new one did not replace."""

from collections.abc import Sequence
from pathlib import Path

from cosmos_scale.cli.arguments import say
from cosmos_scale.words import counted

_KINDS = ("*.png", "*.csv")


class EarlierFiles:
    """The pictures and lists of some folders before a command's work; a folder need not be there yet."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._before = self._files()

    def say(self, out: Path) -> None:
        """Say on stderr how many of them are as they were: nobody would see that they are of other work."""
        # A file that is replaced is another one of the same name, since `whole_file` moves it to its place.
        same = sorted(self._before.items() & self._files().items())
        if same:
            say(f"--out: {out} still holds {counted(len(same), 'file')} of an earlier command, such as {same[0][0]}")

    def _files(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for folder in self._folders:
            for path in (path for kind in _KINDS for path in folder.glob(kind)):
                status = path.lstat()
                found[path] = (status.st_ino, status.st_mtime_ns)
        return found
