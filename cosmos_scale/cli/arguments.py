"""What the parsers of several commands use: types of arguments, and examples below the help."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmos_scale.errors import UserError

MOST = 2**63 - 1  # of a number on the command line


def positive(text: str) -> int:
    """Return the whole number that a text holds; a number below 1 or above MOST, or another text, is refused."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return _bounded(text)


def count(text: str) -> int:
    """Return the whole number that a text holds; one above MOST, or another text, is refused."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0")
    return _bounded(text)


def _bounded(text: str) -> int:
    if len(text) > 20 or int(text) > MOST:  # thousands of digits are no number for Python
        raise argparse.ArgumentTypeError(f"{text[:20]}{'...' * (len(text) > 20)} must be at most {MOST:,}")
    return int(text)


def natural(text: str) -> int:
    """Return the whole number of at least 0 that a text holds; another text is refused."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """Return the seconds, more than 0, that a text holds; another text is refused."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds, more than 0")
    return number


def place(text: str) -> str:
    """Return a path or URL with ~ and $VARIABLES put in; an unset variable and an empty path are refused."""
    if not text.strip():  # pathlib would take it for the current folder, as where a shell's variable is not set
        raise argparse.ArgumentTypeError("the path is empty; rule: . is the current folder")
    from cosmos_scale.config.paths import expand_path  # here: --help need not wait for it

    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> Path:
    """Return a path with ~ and $VARIABLES put in; an unset variable is refused, and a URL, which would be a folder."""
    if "://" in text:  # not shown: it may hold secrets
        raise argparse.ArgumentTypeError("a URL is given; rule: a path of this machine")
    return Path(place(text))


def result_file(text: str) -> Path:
    """Return the path of a file that a long work is to write at its end; one that cannot be written is refused now."""
    from cosmos_scale.files import make_folder, writing

    file = path(text)
    try:
        if file.is_dir():
            raise UserError(f"{file}: is a folder; rule: name a file")
        make_folder(file.parent)
        with writing(file), open(file, "ab") if file.exists() else tempfile.TemporaryFile(dir=file.parent):
            pass
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return file


def run_file(text: str) -> Path:
    """Return the file of a run that a command names by its path, or by the bare name of a shipped run.

    The main rank says on stderr which file was taken where the user named none. Raises UserError where there is none.
    """
    from cosmos_scale.config.paths import refuse_unseen_end  # here: --help need not wait for it
    from cosmos_scale.config.shipped import find_run

    refuse_unseen_end(text)
    found = find_run(text)
    if found.said and os.environ.get("RANK", "0") == "0":
        print(found.said, file=sys.stderr)
    return found.file


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, for a checkpoint of ours or a public one, and --activation, for what a public one may lack."""
    parser.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        metavar="PATH",
        help="a step-N folder, or their parent; or weights of others: COSMOS .pt, OpenCLIP file or folder, folder of "
        "Hugging Face's CLIPModel",
    )
    parser.add_argument(
        "--activation",
        choices=("gelu", "quick_gelu"),
        help="of weights of others that do not tell theirs; default: gelu, or quick_gelu by the file's name",
    )


def say_notes(checkpoint: Path, notes: Sequence[str]) -> None:
    """Say on stderr, a line each, what there is to know of the weights of a public checkpoint."""
    for note in notes:
        print(f"{checkpoint}: {note}", file=sys.stderr)


def say(line: str) -> None:
    """Say a line on stderr."""
    print(line, file=sys.stderr)


def say_repeats(overrides: Sequence[str]) -> None:
    """Say on stderr, on the main rank, which dotted keys are given twice with two values, and which without any.

    Of two values the last one counts. No value, as where a shell's variable is not set, means null.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:  # what has none is no key, and is refused later
            values.setdefault(key, []).append(text)
    for key, texts in values.items():
        if os.environ.get("RANK", "0") != "0":
            continue
        if texts[-1] == "":
            print(f"{key}= stands without a value, which means null", file=sys.stderr)
        if len(set(texts)) > 1:
            from cosmos_scale.config.section import redact_urls  # here: --help need not wait for it

            shown = [redact_urls(text) for text in texts]
            # Of hundreds of shards the first and the last tell enough, and most likely why there are so many.
            named = shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]]
            why = "; braces need quotes, or the shell parts them" if key.endswith(".shards") else ""
            print(f"{key} is given {len(shown)} times ({', '.join(named)}): {shown[-1]} counts{why}", file=sys.stderr)


class CommandParser(argparse.ArgumentParser):
    """A parser that refuses an option given twice with two values: argparse would drop the first without a word.

    Its default `parser` is itself: that of the command which was parsed refuses what is left over, with its own usage.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_defaults(parser=self)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)


class _StoreOnce(argparse._StoreAction):
    """Stores an argument. One object parses one command line: what it met before was an option given twice."""

    _met: list[Any] | None = None

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if self.option_strings and self._met not in (None, [values]):
            before, now = (shown if isinstance(shown, list) else [shown] for shown in ((self._met or [])[0], values))
            both = f"{' '.join(map(str, before))} and {' '.join(map(str, now))}"
            raise argparse.ArgumentError(self, f"given twice: {both}; give it once")
        self._met = [values]
        super().__call__(parser, namespace, values, option_string)


def with_examples(parser: argparse.ArgumentParser, examples: str) -> argparse.ArgumentParser:
    """Return the parser, changed to print the examples below its help, line by line as they are written."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples
    return parser
