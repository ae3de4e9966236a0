"""The command `cosmos-scale eval classification`: its own arguments."""

import argparse
from typing import Any

from cosmos_scale.cli.arguments import place
from cosmos_scale.cli.eval_command import EvalCommand

EXAMPLES = """\
examples:
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --data pictures/by_class
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --data pictures/by_class --weights both
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=place, required=True, metavar="DIR", help="folder of the set")
    parser.add_argument("--classes", type=place, metavar="FILE", help="names, a line a class; default: the set's own")
    parser.add_argument(
        "--templates", type=place, metavar="FILE", help="templates, {} for the name; default: the set's own"
    )


def _keys(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"data": arguments.data, "classes": arguments.classes, "templates": arguments.templates}


CLASSIFICATION = EvalCommand(
    kind="classification",
    help="zero-shot top-1, top-5 and mean per class of labelled pictures",
    examples=EXAMPLES,
    batch=64,
    writes=False,
    add_arguments=_add_arguments,
    keys=_keys,
)
