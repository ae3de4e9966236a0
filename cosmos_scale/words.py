"""Numbers and nouns in sentences ("2 shards", "an int"), rows of text as wide as a terminal, and texts in figures."""

import sys
import textwrap

COLUMNS = 80


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the plural unless the number is 1. plural: where an s more is not enough."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def with_article(noun: str) -> str:
    """Return a noun with a or an: "an int", "a list"; a u is spoken as in "a uint8"."""
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def first_frame(animated: int) -> str:
    """Return what is said of the frames of so many animated pictures, before the verb (read, packed)."""
    return "its first frame is" if animated == 1 else "the first frame of each is"


def print_row(label: str, text: str) -> None:
    """Print the row of a table, as `table_row` makes it."""
    print(table_row(label, text))


def table_row(label: str, text: str) -> str:
    """Return a label and beside it a text, broken between words into lines of COLUMNS; a long path stays whole.

    Signs that standard output lacks become codes.
    """
    encoding = sys.stdout.encoding or "ascii"
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    width = COLUMNS - len(label)
    lines = textwrap.wrap(shown, width, break_on_hyphens=False, break_long_words=False) or [""]
    return "\n".join([f"{label}{lines[0]}", *(" " * len(label) + line for line in lines[1:])])


def figure_text(text: str) -> str:
    """Return a text as matplotlib draws it as it stands.

    A dollar sign would begin a formula. Bytes of a file's name that are not UTF-8, which no font has, become codes.
    """
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")
