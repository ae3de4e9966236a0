"""The commands `cosmos-scale data ...`: their arguments, and calling what does the work."""

import argparse
from pathlib import Path

from cosmos_scale.arguments import positive, with_examples

EXAMPLES = """\
examples:
  cosmos-scale data build --images photos --captions captions.csv --out shards --samples-per-shard 5000
  cosmos-scale data index /data/cc3m
  cosmos-scale data index '/data/cc3m/{000000..000331}.tar' --out /index/cc3m
"""


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add every data command; each parser's defaults say its name (`command`) and what runs it (`run`)."""
    build = with_examples(commands.add_parser("build", help="pictures and a captions file to shards"), EXAMPLES)
    build.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures")
    build.add_argument("--captions", type=Path, required=True, metavar="FILE", help=".jsonl or .csv")
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    build.add_argument("--samples-per-shard", type=positive, default=5000, metavar="N", help="default: 5000")
    build.set_defaults(command="data build", run=_build)

    index = with_examples(commands.add_parser("index", help="index shards without repacking them"), EXAMPLES)
    index.add_argument("pattern", metavar="PATTERN", help="folder, or glob or brace pattern of .tar files (in quotes)")
    index.add_argument("--out", type=Path, metavar="DIR", help="folder of the index; default: beside the shards")
    index.set_defaults(command="data index", run=_index)

    for command in (build, index):
        command.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
        command.add_argument("--quiet", action="store_true", help="no progress bar")


def _build(arguments: argparse.Namespace) -> int:
    from cosmos_scale.data.build import build_shards

    report = build_shards(
        arguments.images,
        arguments.captions,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(report.describe())
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from cosmos_scale.data.index import index_shards

    report = index_shards(arguments.pattern, arguments.out, workers=arguments.workers, progress=not arguments.quiet)
    print(report.describe())
    return 0
