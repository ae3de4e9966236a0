"""The command `cosmos-scale checkpoint inspect`: its arguments, and the call of the function that does the work."""

import argparse
import json
from pathlib import Path

from cosmos_scale.cli.arguments import path, with_examples

EXAMPLES = """\
examples:
  cosmos-scale checkpoint inspect runs/demo
  cosmos-scale checkpoint inspect runs/demo --verify
  cosmos-scale checkpoint inspect runs/demo/checkpoints/step-00001000
  cosmos-scale checkpoint inspect runs/demo/checkpoints/step-00001000 --verify --json
  cosmos-scale checkpoint inspect cosmos_vitb16_merged30m.pt
"""


def add_checkpoint_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add every checkpoint command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    inspect = with_examples(
        commands.add_parser("inspect", help="what is in a checkpoint, and whether it is whole"), EXAMPLES
    )
    inspect.description = (
        "Print what is in a checkpoint, or list those of a run. Looks at the manifest and at the files' presence, "
        "sizes and headers; --verify reads every byte. Of weights of others (COSMOS .pt, OpenCLIP, Hugging Face's "
        "CLIPModel) it looks at names and shapes, and says what is assumed. "
        "Exit status: 0 whole, 1 something is broken, 2 wrong use."
    )
    inspect.add_argument(
        "path", type=path, metavar="PATH", help="a step-N folder, a run's folder, or a file or folder of others"
    )
    inspect.add_argument(
        "--verify", action="store_true", help="read all, and check checksums or that numbers are finite"
    )
    inspect.add_argument("--json", action="store_true", help="print one line of JSON, for a run an array")
    inspect.add_argument("--quiet", action="store_true", help="no progress bar")
    inspect.set_defaults(command="checkpoint inspect", run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    import sys

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cosmos_scale.checkpoint.inspect import find_folders, inspect, show, show_all, total_size
    from cosmos_scale.checkpoint.interchange.reading import is_public
    from cosmos_scale.console import make_console
    from cosmos_scale.errors import UserError
    from cosmos_scale.files import whole_path

    if is_public(arguments.path):
        return _inspect_public(arguments.path, arguments)
    folders = find_folders(arguments.path)
    hidden = arguments.quiet or not arguments.verify or not sys.stderr.isatty()
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("verify", total=total_size(folders))
        found = [
            inspect(folder, verify=arguments.verify, advance=lambda count: bar.advance(task, count))
            for folder in folders
        ]
    # A run under way deletes its old checkpoints; such a one is not broken.
    gone = [one.folder for one in found if not one.whole and not one.folder.exists()]
    if len(gone) == len(found):
        raise UserError(f"{whole_path(gone[0])}: was deleted while it was looked at; rule: look again")
    for folder in gone:
        print(f"{folder}: was deleted while it was looked at", file=sys.stderr)
    found = [one for one in found if one.folder not in gone]
    if arguments.json:
        of_a_run = [one.as_json() for one in found]
        print(json.dumps(of_a_run[0] if folders == [arguments.path] else of_a_run))
    elif folders == [arguments.path]:
        show(found[0], make_console())
    else:
        show_all(found, make_console())
    return 0 if all(one.whole for one in found) else 1


def _inspect_public(checkpoint: Path, arguments: argparse.Namespace) -> int:
    from cosmos_scale.checkpoint.interchange.inspect import inspect_public, show_public
    from cosmos_scale.console import make_console

    found = inspect_public(checkpoint, verify=arguments.verify)
    if arguments.json:
        print(json.dumps(found.as_json()))
    else:
        show_public(found, make_console())
    return 1 if found.errors else 0
