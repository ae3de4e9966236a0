"""The console that every command and table prints on: texts of users stand there as they are."""

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that reads no markup (`[red]`) and no names of emoji (`:dog:`) out of what it prints.

    Cells and titles of tables count too: they may hold names and paths. Styles are given as `style=`.
    """
    return Console(stderr=stderr, markup=False, emoji=False)
