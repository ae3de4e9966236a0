"""The command `cosmos-scale eval classification`: its own arguments."""

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from cosmos_scale.cli.arguments import count, place
from cosmos_scale.cli.eval_command import EvalCommand
from cosmos_scale.errors import UserError
from cosmos_scale.set_names import LabelledLayout

EXAMPLES = """\
examples:
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --data pictures/by_class
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --dataset imagenet --data /data/imagenet/val
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --dataset pets --data /data --weights both \\
      --confusions 10 --out pets_pictures
"""
DATASETS = get_args(LabelledLayout)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="folders",
        metavar="NAME",
        help=f"a set, or a layout of your own pictures: {', '.join(DATASETS)}; default: folders, a folder a class",
    )
    parser.add_argument("--data", type=place, required=True, metavar="DIR", help="folder of the set")
    parser.add_argument("--classes", type=place, metavar="FILE", help="names, a line a class; default: the set's own")
    parser.add_argument(
        "--templates", type=place, metavar="FILE", help="templates, {} for the name; default: the set's own"
    )
    parser.add_argument(
        "--names",
        choices=("corrected", "published"),
        default="corrected",
        help="published: with the misspelt names of the published evaluation (default: corrected)",
    )
    parser.add_argument("--split", type=place, metavar="FILE", help="sun397: pictures that count, a path a line")
    parser.add_argument(
        "--confusions", type=count, default=0, metavar="N", help="print the N worst confusions, draw all to --out"
    )


def _keys(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.out is not None and arguments.dataset in ("folders", "imagenet"):
        _require_apart(arguments.out, arguments.data)
    names = ("dataset", "data", "classes", "templates", "names", "split", "confusions")
    return {name: getattr(arguments, name) for name in names}


def _require_apart(out: Path, data: str) -> None:
    """Raise UserError where what is drawn would be a class of the folders at the next evaluation."""
    place, folders = Path(os.path.realpath(out)), Path(os.path.realpath(data))
    if place.is_relative_to(folders) and not any(part.startswith(".") for part in place.relative_to(folders).parts):
        raise UserError(
            f"--out: {out} lies in --data {data}, where each folder is a class, with all pictures below it; rule: "
            "a folder elsewhere"
        )


CLASSIFICATION = EvalCommand(
    kind="classification",
    help="zero-shot top-1, top-5 and mean per class of labelled pictures",
    examples=EXAMPLES,
    batch=64,
    writes=True,
    caches=True,
    add_arguments=_add_arguments,
    keys=_keys,
)
