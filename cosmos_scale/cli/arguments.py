"""What the commands' parsers share: types of arguments, and examples below the help."""

import argparse


def positive(text: str) -> int:
    """Return the whole number that a text holds; argparse refuses it where it is below 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def with_examples(parser: argparse.ArgumentParser, examples: str) -> argparse.ArgumentParser:
    """Return the parser, which now shows the examples, as they are written, below its help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples
    return parser
