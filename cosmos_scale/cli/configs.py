"""The command `cosmos-scale configs`: the configs that travel in the package, listed, or one written as a start."""

import argparse
from pathlib import Path

from cosmos_scale.cli.arguments import with_examples
from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of

EXAMPLES = """\
examples:
  cosmos-scale configs
  cosmos-scale configs --write cc3m_vitb16 my_run.yaml
  cosmos-scale train cc3m_vitb16 data.sources.0.shards=/data/cc3m
"""
COLUMNS = 80


def add_configs_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(commands.add_parser("configs", help="list the shipped configs, or write one"), EXAMPLES)
    parser.description = (
        "List the configs that travel in the package: runs, which `train` takes by their bare names, and bases, which\n"
        "a run names under `extends`. --write copies one into a new file, to be changed."
    )
    parser.add_argument(
        "--write", nargs=2, metavar=("NAME", "FILE"), help="write the config NAME to FILE, which must not exist"
    )
    parser.set_defaults(command="configs", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.write is None:
        print(_table())
    else:
        name, file = arguments.write
        print(_write(name, file))
    return 0


def _table() -> str:
    """Return two tables, of runs and of bases, with the descriptions in lines of at most 80 columns."""
    import textwrap

    from cosmos_scale.config.shipped import is_shipped_name, shipped_configs

    found = shipped_configs()
    width = max(len(one.name) for one in found) + 4
    lines = []
    for title, bases in (("runs, for `cosmos-scale train NAME`:", False), ("bases, for `extends` in a run:", True)):
        lines.append(title)
        for one in found:
            if is_shipped_name(one.name) == bases:
                row = f"  {one.name:<{width - 2}}{one.description}"
                lines += textwrap.wrap(row, COLUMNS, subsequent_indent=" " * width)
    return "\n".join(lines)


def _write(name: str, file: str) -> str:
    """Copy a config into a new file; return what was done. Raises UserError where the file exists."""
    from cosmos_scale.config.paths import expand_path
    from cosmos_scale.config.shipped import SUFFIXES, shipped_file

    text, path = shipped_file(name).read_bytes(), Path(expand_path(file))
    if path.suffix not in SUFFIXES:
        raise UserError(f"--write: {path} must end in .yaml; rule: commands know a run's file by its suffix")
    try:
        with path.open("xb") as opened:
            try:
                opened.write(text)
                opened.flush()
            except OSError:
                path.unlink()  # on a full disk: what is left would be in the way of the next try
                raise
    except FileExistsError:
        raise UserError(f"--write: {path} exists; rule: name a new file, since nothing is written over") from None
    except OSError as error:
        raise UserError(f"--write: {path} cannot be written: {reason_of(error)}") from error
    return f"{path}: a copy of {name}. Change it, then: cosmos-scale train --dry-run {path}"
