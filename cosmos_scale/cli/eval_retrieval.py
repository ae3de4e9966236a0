"""The command `cosmos-scale eval retrieval`: its own arguments."""

import argparse
from pathlib import Path
from typing import Any, get_args

from cosmos_scale.cli.arguments import place
from cosmos_scale.cli.eval_command import EvalCommand
from cosmos_scale.errors import UserError
from cosmos_scale.set_names import CaptionedLayout

EXAMPLES = """\
examples:
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out --weights teacher --json
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --dataset coco_val2017 --data /data/coco --cache
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --dataset pairs --data mine/pairs.jsonl
"""
DATASETS = get_args(CaptionedLayout)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="shards",
        metavar="NAME",
        help=f"a set, or a layout of your own pairs: {', '.join(DATASETS)}; default: shards, which are indexed",
    )
    parser.add_argument(
        "--data",
        type=place,
        required=True,
        metavar="PLACE",
        help="shards: folder, glob or brace pattern; pairs: a .jsonl, .csv or .tsv file; others: folder of the set",
    )
    parser.add_argument("--index", type=place, metavar="DIR", help="folder of the index; default: beside the shards")
    parser.add_argument(
        "--captions",
        metavar="KEY",
        help="key of the captions in json (.txt: caption) or in pairs; default: raw_caption where there is one, else "
        "the only key there is",
    )


def _keys(arguments: argparse.Namespace) -> dict[str, Any]:
    where = "shards" if arguments.dataset == "shards" else "data"
    if where == "shards" and _has_no_shards(Path(arguments.data)):
        others = ", ".join(name for name in DATASETS if name != "shards")
        raise UserError(
            f"--data: {arguments.data} has no .tar shards; rule: for another layout --dataset NAME: {others}"
        )
    return {where: arguments.data, **{name: getattr(arguments, name) for name in ("dataset", "index", "captions")}}


def _has_no_shards(data: Path) -> bool:
    """Whether a place is a folder of this machine without tar files, compressed ones too, or a file that is none."""
    if data.is_dir():
        return not any(data.glob("*.tar*"))
    return data.is_file() and ".tar" not in data.name


RETRIEVAL = EvalCommand(
    kind="retrieval",
    help="recall at 1, 5, 10 and ranks between images and texts",
    examples=EXAMPLES,
    batch=64,
    writes=False,
    caches=True,
    add_arguments=_add_arguments,
    keys=_keys,
)
