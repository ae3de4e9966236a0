"""The command `cosmos-scale eval retrieval`: its own arguments."""

import argparse
from typing import Any

from cosmos_scale.cli.arguments import place
from cosmos_scale.cli.eval_command import EvalCommand

EXAMPLES = """\
examples:
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out --weights teacher --json
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=place, required=True, metavar="PATTERN", help="indexed shards: folder, glob or brace pattern"
    )
    parser.add_argument("--index", type=place, metavar="DIR", help="folder of the index; default: beside the shards")
    parser.add_argument(
        "--captions",
        metavar="KEY",
        help="json key (.txt: caption); default: raw_caption where there is one, else the only key there is",
    )


def _keys(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"shards": arguments.data, "index": arguments.index, "captions": arguments.captions}


RETRIEVAL = EvalCommand(
    kind="retrieval",
    help="recall at 1, 5, 10 between images and texts",
    examples=EXAMPLES,
    batch=64,
    writes=False,
    caches=False,
    add_arguments=_add_arguments,
    keys=_keys,
)
