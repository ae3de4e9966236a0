"""Types of command-line arguments."""

import argparse


def positive(text: str) -> int:
    """Return the whole number that a text holds; argparse refuses it where it is below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)
