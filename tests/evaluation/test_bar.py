"""The bar of long work: drawn at a terminal where it is asked for, and nothing elsewhere."""

import io

import pytest
from rich.console import Console

from cosmos_scale.evaluation import bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("show", "terminal"), [(True, True), (False, True), (True, False)])
def test_work_is_drawn_at_a_terminal_only(monkeypatch: pytest.MonkeyPatch, show: bool, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(bar, "make_console", lambda stderr: Console(file=stream, force_terminal=terminal, width=80))
    with bar.WorkBar(show=show) as work:
        for done in (1, 2, 3):
            work.report("texts", done, 3)
        work.report("pictures", 5, 5)
    shown = stream.getvalue()
    assert ("texts" in shown, "3/3" in shown, "5/5" in shown) == (show and terminal,) * 3
