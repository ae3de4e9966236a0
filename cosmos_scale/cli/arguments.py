"""What the parsers of several commands use: types of arguments, and examples below the help."""

import argparse
import os
import sys
from pathlib import Path

from cosmos_scale.errors import UserError


def positive(text: str) -> int:
    """Return the whole number that a text holds; a number below 1, or another text, is refused."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
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
    """Return a path or URL with ~ and $VARIABLES put in; an unset variable is refused."""
    from cosmos_scale.config.paths import expand_path  # here: --help need not wait for it

    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> Path:
    """Return a path with ~ and $VARIABLES put in; an unset variable is refused."""
    return Path(place(text))


def run_file(text: str) -> Path:
    """Return the file of a run that a command names by its path, or by the bare name of a shipped run.

    The main rank says on stderr which file was taken where the user named none. Raises UserError where there is none.
    """
    from cosmos_scale.config.shipped import find_run  # here: --help need not wait for it

    found = find_run(text)
    if found.said and os.environ.get("RANK", "0") == "0":
        print(found.said, file=sys.stderr)
    return found.file


def with_examples(parser: argparse.ArgumentParser, examples: str) -> argparse.ArgumentParser:
    """Return the parser, changed to print the examples below its help, line by line as they are written."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples
    return parser
