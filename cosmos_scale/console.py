"""The console that every command and table prints on: texts of users stand there as they are, and whole."""

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.table import Table

from cosmos_scale.words import COLUMNS


class _WholeCells(RenderHook):
    """Breaks a long word of a table's cell over lines, where rich would cut the word off."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        for table in renderables:
            for column in table.columns if isinstance(table, Table) else ():
                column.overflow = "fold"
        return renderables


class _PassingOn(Console):
    """A console of standard output: where its reader leaves early, the command ends, not rich with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled."""
        raise  # rich calls this while it handles the error


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that reads no markup (`[red]`) and no names of emoji (`:dog:`) out of what it prints.

    Cells and titles of tables count too: they may hold names and paths. Styles are given as `style=`. Lines of
    standard output are COLUMNS long at least: a narrower terminal breaks them itself, and loses no number of a table.
    """
    console = Console(stderr=True, markup=False, emoji=False) if stderr else _PassingOn(markup=False, emoji=False)
    if not stderr:  # where progress bars are drawn, which must not be broken
        console.width = max(console.width, COLUMNS)
    console.push_render_hook(_WholeCells())
    return console
