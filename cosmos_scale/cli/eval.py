"""The command `cosmos-scale eval NAME`: its arguments, and calling the evaluator of that name on a checkpoint."""

import argparse
import json

from cosmos_scale.cli.arguments import path, place, positive, with_examples

EXAMPLES = """\
examples:
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out --weights teacher --json
"""


def add_eval_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add every evaluation; each parser's defaults say its name (`command`) and what runs it (`run`)."""
    retrieval = with_examples(
        commands.add_parser("retrieval", help="recall at 1, 5, 10 between images and texts"), EXAMPLES
    )
    retrieval.add_argument(
        "--checkpoint", type=path, required=True, metavar="DIR", help="a step-N folder, or their parent"
    )
    retrieval.add_argument(
        "--data", type=place, required=True, metavar="PATTERN", help="indexed shards: folder, glob or brace pattern"
    )
    retrieval.add_argument("--weights", choices=("student", "teacher"), default="student", help="default: student")
    retrieval.add_argument("--index", type=place, metavar="DIR", help="folder of the index; default: beside the shards")
    retrieval.add_argument(
        "--captions",
        metavar="KEY",
        help="json key (.txt: caption); default: raw_caption where there is one, else the only key there is",
    )
    retrieval.add_argument("--batch", type=positive, default=64, metavar="N", help="default: 64")
    retrieval.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    retrieval.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    retrieval.set_defaults(command="eval retrieval", run=_retrieval)


def _retrieval(arguments: argparse.Namespace) -> int:
    from cosmos_scale.checkpoint import find_checkpoint
    from cosmos_scale.config import RetrievalConfig
    from cosmos_scale.console import make_console
    from cosmos_scale.evaluation.evaluator import measure
    from cosmos_scale.evaluation.loading import load_encoder
    from cosmos_scale.evaluation.retrieval import Retrieval

    checkpoint = find_checkpoint(arguments.checkpoint)
    encoder = load_encoder(checkpoint, arguments.weights, arguments.device)
    section = RetrievalConfig(
        kind="retrieval",
        shards=arguments.data,
        index=arguments.index,
        captions=arguments.captions,
        batch=arguments.batch,
    )
    evaluator = Retrieval(section, encoder.setting)
    numbers = measure(evaluator, encoder)
    if arguments.json:
        named = {"checkpoint": str(checkpoint), "weights": arguments.weights}
        print(json.dumps({**named, "data": arguments.data, "captions": evaluator.captions, **numbers}))
    else:
        console = make_console()
        console.print(str(checkpoint), style="italic", highlight=False, soft_wrap=True)
        console.print(evaluator.table({arguments.weights: numbers}, ""))
    return 0
