"""The command `cosmos-scale eval segmentation`: its own arguments."""

import argparse
from typing import Any, get_args

from cosmos_scale.cli.arguments import place, positive
from cosmos_scale.cli.eval_command import EvalCommand
from cosmos_scale.errors import UserError
from cosmos_scale.set_names import MaskedSet

EXAMPLES = """\
examples:
  cosmos-scale eval segmentation --checkpoint runs/demo/checkpoints --set voc20 --root data/VOC2012 --csa
  cosmos-scale eval segmentation --checkpoint runs/demo/checkpoints --set ade20k --root data --overlays 20 --out ade
  cosmos-scale eval segmentation --checkpoint runs/demo/checkpoints --images photos --masks masks --classes names.txt
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    public = parser.add_argument_group("a public set")
    public.add_argument(
        "--set",
        "--dataset",
        dest="dataset",
        metavar="SET",
        help=f"one of {', '.join(get_args(MaskedSet))}",
    )
    public.add_argument(
        "--root", "--data", dest="data", type=place, metavar="DIR", help="folder of the set (docs/evaluation.md)"
    )
    public.add_argument(
        "--names",
        default="corrected",
        metavar="SPELLING",
        help="corrected or published (trafficlight); default: corrected",
    )
    own = parser.add_argument_group("a set of one's own")
    own.add_argument("--images", type=place, metavar="DIR", help="folder of pictures")
    own.add_argument("--masks", type=place, metavar="DIR", help="folder of PNG masks, named as the pictures")
    own.add_argument(
        "--classes", type=place, metavar="FILE", help="names, a line a class, several of a class separated by a comma"
    )
    own.add_argument("--background", action="store_true", help="class 0 is the background")
    own.add_argument("--reduce-zero", action="store_true", help="0 in a mask means ignored, 1 class 0, and so on")
    how = parser.add_argument_group("how pictures are segmented")
    how.add_argument("--csa", action="store_true", help="correlative self-attention in the last block")
    how.add_argument("--short-side", type=int, metavar="N", help="pixels; default: the set's; own sets: 336")
    how.add_argument("--crop", type=int, metavar="N", help="side of the window; 0: whole picture; default: image size")
    how.add_argument("--stride", type=int, metavar="N", help="pixels between windows; default: half of the window")
    how.add_argument("--logit-scale", type=float, metavar="X", help="default: the set's; own sets: 40")
    how.add_argument("--prob-threshold", type=float, metavar="X", help="default: the set's; own sets: 0")
    how.add_argument("--area-threshold", type=float, metavar="X", help="default: the set's; own sets: 0")
    how.add_argument("--pamr-steps", type=int, default=0, metavar="N", help="steps of refinement; default: 0")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--max-samples", type=positive, metavar="N", help="only the first N pictures")
    shown.add_argument("--per-class", action="store_true", help="the IoU of each class too")
    shown.add_argument("--overlays", type=int, default=0, metavar="N", help="draw N pictures into --out")


def _keys(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.overlays and arguments.out is None:
        raise UserError(f"--overlays: {arguments.overlays} needs --out DIR, the folder to draw into")
    given = vars(arguments)
    return {key: given[key] for key in _KEYS}


_KEYS = (
    "dataset",
    "data",
    "images",
    "masks",
    "classes",
    "background",
    "reduce_zero",
    "names",
    "csa",
    "short_side",
    "crop",
    "stride",
    "logit_scale",
    "prob_threshold",
    "area_threshold",
    "pamr_steps",
    "max_samples",
    "per_class",
    "overlays",
)

SEGMENTATION = EvalCommand(
    kind="segmentation",
    help="zero-shot mIoU of pictures with true masks",
    examples=EXAMPLES,
    batch=64,
    writes=True,
    caches=True,
    add_arguments=_add_arguments,
    keys=_keys,
)
