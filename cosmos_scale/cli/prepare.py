"""The commands `cosmos-scale data prepare ...`."""

import argparse

from cosmos_scale.cli.arguments import path, positive, with_examples

DREAMLIP_EXAMPLES = """\
examples:
  cosmos-scale data prepare dreamlip --captions cc3m_3long_3short_1raw_captions_url.csv \\
      --images /data/cc3m_images --out /data/cc3m
  cosmos-scale data prepare dreamlip --captions cc12m_3long_3short_1raw_captions_url.csv \\
      --images /data/cc12m-wds/cc12m-train-*.tar --out /data/cc12m --split published --workers 16
"""
PIXELPROSE_EXAMPLES = """\
examples:
  cosmos-scale data prepare pixelprose --captions /data/pixelprose/data --images /data/pixelprose_images \\
      --out /data/pixelprose_shards
  cosmos-scale data prepare pixelprose --captions vlm_captions_cc12m_*.parquet --images /data/cc12m_images \\
      --join uid --out /data/pixelprose_cc12m
"""
DESCRIPTION = """\
Join {what} with the images that img2dataset downloaded, and write indexed shards.

Each shard of images becomes one shard of samples, images byte for byte, with captions as lists of sentences. Images
that are damaged and rows without image or caption are left out, and named with their reason in rejected.jsonl;
manifest.json has counts, options and a checksum for each shard. Stopped at any time, the same command goes on.
"""


def add_prepare_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `prepare` and its datasets; a parser's defaults are its name (`command`) and its function (`run`)."""
    prepare = commands.add_parser("prepare", help="published captions and downloaded images to shards")
    with_examples(prepare, DREAMLIP_EXAMPLES + PIXELPROSE_EXAMPLES.removeprefix("examples:\n"))
    datasets = prepare.add_subparsers(title="datasets", metavar="DATASET", required=True)
    _add(
        datasets.add_parser("dreamlip", help="DreamLIP's captions of CC3M, CC12M and YFCC15M"),
        what="DreamLIP's captions of CC3M, CC12M or YFCC15M",
        joins=("url", "key"),
        examples=DREAMLIP_EXAMPLES,
        name="dreamlip",
    )
    _add(
        datasets.add_parser("pixelprose", help="PixelProse's captions"),
        what="PixelProse's captions",
        joins=("url", "key", "uid"),
        examples=PIXELPROSE_EXAMPLES,
        name="pixelprose",
    )


def _add(parser: argparse.ArgumentParser, *, what: str, joins: tuple[str, ...], examples: str, name: str) -> None:
    with_examples(parser, examples)
    parser.description = DESCRIPTION.format(what=what)
    parser.add_argument(
        "--captions",
        type=path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".csv or .parquet files, or folders of them",
    )
    parser.add_argument(
        "--images",
        type=path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="img2dataset's output folders, or single .tar files of them",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--split",
        choices=("sentences", "published", "none"),
        default="sentences",
        help='captions into sentences: with care for "3.5" and "U.S." (default), at every full stop as the published '
        "code does, or not" + ("; training then splits as published" if name == "pixelprose" else ""),
    )
    parser.add_argument(
        "--join", choices=joins, default="url", help="what captions and images are joined by; default: url"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(command=f"data prepare {name}", run=_run, dataset=name)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.data.prepare.datasets import DREAMLIP, PIXELPROSE
    from cosmos_scale.data.prepare.images import list_images, unread_pictures
    from cosmos_scale.data.prepare.prepare import prepare_dataset
    from cosmos_scale.data.shards.index_report import describe_passed_over
    from cosmos_scale.data.shards.patterns import passed_over
    from cosmos_scale.words import counted

    report = prepare_dataset(
        {"dreamlip": DREAMLIP, "pixelprose": PIXELPROSE}[arguments.dataset],
        arguments.captions,
        arguments.images,
        arguments.out,
        join=arguments.join,
        split=arguments.split,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(report.describe())
    for folder in arguments.images:
        if others := passed_over(str(folder), {shard.path.name for shard in list_images([folder])}):
            print(f"{folder}: {describe_passed_over(others)} not read: its own .tar files are")
        if others := unread_pictures(folder):
            places = counted(len(others), "place")
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            print(f"{folder}: pictures in {places} ({shown}) are not read: .tar files and folders named by numbers are")
    return 0
