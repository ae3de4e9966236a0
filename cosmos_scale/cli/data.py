"""The commands `cosmos-scale data ...`: their arguments, and the calls of the functions that do the work."""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import count, path, place, positive, run_file, with_examples
from cosmos_scale.cli.prepare import add_prepare_commands
from cosmos_scale.errors import UserError

if TYPE_CHECKING:  # the import takes a second, so functions import it
    from cosmos_scale.config import RunConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  cosmos-scale data prepare dreamlip --captions cc3m_captions.csv --images /data/cc3m_images --out /data/cc3m
  cosmos-scale data build --images photos --captions captions.csv --out shards --samples-per-shard 5000
  cosmos-scale data index /data/cc3m
  cosmos-scale data index '/data/cc3m/{000000..000331}.tar' --out /index/cc3m
  cosmos-scale data index 'https://host/cc3m/{000000..000331}.tar' --out /index/cc3m
  cosmos-scale data inspect /data/cc3m --out cc3m_inspected
  cosmos-scale data inspect cc3m_vitb16 data.sources.0.shards=/data/cc3m --epoch 3 --first 1000
  cosmos-scale data verify /data/cc3m --out damaged.jsonl
  cosmos-scale data verify '/data/pixelprose/*.tar' --captions textcrop_pixelprose
"""

# More tokens than any caption needs; a longer text counts as one of this length.
LONGEST_CAPTION = 2048


def add_data_commands(commands: "Commands") -> None:
    """Add every data command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    add_prepare_commands(commands)

    build = _add(commands, "build", _build, "pictures and a captions file to shards")
    build.add_argument("--images", type=path, required=True, metavar="DIR", help="folder of pictures")
    build.add_argument("--captions", type=path, required=True, metavar="FILE", help=".jsonl or .csv")
    # The names are written out here, since to import them takes a second; a test compares them.
    build.description = (
        "Pack pictures and their captions into indexed shards. Columns (or json keys) of captions: raw_caption,\n"
        "shortIB_captions, shortSV_captions, shortLLA_captions, longIB_captions, longSV_captions, longLLA_captions,\n"
        "original_caption, vlm_caption, caption; where there is none of these: captions, text, title. Columns of\n"
        "pictures: image, image_path, file_name, filename, filepath, file, path, key. Capital letters do not\n"
        "matter, and a space is as good as an underscore. A sample's json says its origin under the key `origin`.\n"
        "Stopped at any time, the same command goes on."
    )
    build.add_argument("--image-column", metavar="NAME", help="column of pictures, if it has another name")
    build.add_argument("--caption-column", metavar="NAME", help="the only column to read captions from")
    build.add_argument(
        "--key", metavar="NAME", help="column of the samples' keys in the shards; default: the rows' numbers"
    )
    build.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help="behind transparent pixels: white (default), black, #rrggbb, or keep, which shows hidden colours",
    )
    build.add_argument(
        "--orientation",
        choices=("upright", "keep"),
        default="upright",
        help="of pictures whose EXIF tag says to turn them: upright (default) turns them, keep leaves them as they are",
    )
    build.add_argument("--join-rows", action="store_true", help="rows of one picture become one sample's captions")
    build.add_argument("--out", type=path, required=True, metavar="DIR", help="folder of the shards")
    build.add_argument("--samples-per-shard", type=positive, default=5000, metavar="N", help="default: 5000")

    index = _add(commands, "index", _index, "index shards without repacking them")
    index.add_argument(
        "pattern", type=place, metavar="PATTERN", help="folder, or glob or brace pattern of .tar files (in quotes)"
    )
    index.add_argument(
        "--out", type=path, metavar="DIR", help="folder of the index; default: beside the shards, if they are files"
    )

    index.add_argument(
        "--captions", nargs="+", default=(), metavar="KEY", help="the only json keys that hold captions (see below)"
    )
    index.add_argument(
        "--last-dot", action="store_true", help="keys of samples end at the last dot of a name, not at the first"
    )
    # The names are written out here, since to import them takes a second; a test compares them.
    index.description = (
        "Index shards: where each sample lies, and which samples can be used. A caption stands in the json under one\n"
        "of raw_caption, shortIB_captions, shortSV_captions, shortLLA_captions, longIB_captions, longSV_captions,\n"
        "longLLA_captions, original_caption, caption; else in the txt; else in the json under captions, text or\n"
        "title. Capital letters do not matter. Samples whose captions are all null or empty are left out. Shards\n"
        "with other keys: --captions KEY here, and data.captions.keys in the run's file."
    )

    inspect = _add(commands, "inspect", _inspect, "what indexed shards hold, and what training makes of it")
    inspect.description = (
        "Count samples, captions and image sizes of indexed shards (statistics.png), and draw\n"
        "the views and captions that training makes of some of them (views.png): those of\n"
        "--rows visits from position --first of epoch --epoch on."
    )
    _add_data(inspect)
    read = inspect.add_mutually_exclusive_group()
    read.add_argument("--samples", type=positive, default=2000, metavar="N", help="drawn at random; default: 2000")
    read.add_argument("--all", action="store_true", help="read every sample")
    inspect.add_argument("--rows", type=positive, default=8, metavar="N", help="samples in views.png; default: 8")
    inspect.add_argument("--epoch", type=count, default=0, metavar="N", help="whose draws; default: 0")
    inspect.add_argument("--first", type=count, default=0, metavar="N", help="position in the epoch; default: 0")
    inspect.add_argument("--seed", type=count, metavar="N", help="of the draws; default: the run's")
    inspect.add_argument(
        "--out",
        type=path,
        default=Path("inspect_out"),
        metavar="DIR",
        help="folder of the pictures; default: inspect_out",
    )

    verify = _add(commands, "verify", _verify, "find every damaged sample of indexed shards")
    verify.description = (
        "Read every sample of indexed shards whole, and say where the damaged ones lie. Of a run: the\n"
        "shards of its sources, and those of the evaluations that it makes.\n"
        "Exit status: 0 all are sound, 1 some are damaged, 2 wrong use."
    )
    _add_data(verify)
    verify.set_defaults(seed=None)  # no random draw decides whether a sample is sound
    verify.add_argument("--out", type=path, metavar="FILE", help=".jsonl for all that is found, a line each")

    for command in (build, index, inspect, verify):
        command.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core")
        command.add_argument("--quiet", action="store_true", help="no progress bar")


def _build(arguments: argparse.Namespace) -> int:
    from cosmos_scale.data.samples.caption_keys import plain_column
    from cosmos_scale.data.tools.build import build_shards
    from cosmos_scale.data.tools.captions_file import Columns

    named = (arguments.image_column, arguments.caption_column, arguments.key)
    report = build_shards(
        arguments.images,
        arguments.captions,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        columns=Columns(*(None if name is None else plain_column(name) for name in named)),
        background=arguments.background,
        orientation=arguments.orientation,
        join_rows=arguments.join_rows,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(report.describe())
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from cosmos_scale.data.shards.index import index_shards
    from cosmos_scale.data.shards.members import ScanRules

    report = index_shards(
        arguments.pattern,
        arguments.out,
        rules=ScanRules(tuple(arguments.captions), arguments.last_dot),
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(report.describe())
    return 0


def _add(
    commands: "Commands", name: str, run: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    """Add one command, with the examples of this command below its help."""
    own = [line for line in EXAMPLES.splitlines(keepends=True) if line.startswith(f"  cosmos-scale data {name} ")]
    parser = with_examples(commands.add_parser(name, help=help), "".join(["examples:\n", *own]))
    parser.set_defaults(command=f"data {name}", run=run)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=place,
        metavar="PATTERN|RUN.yaml",
        help="indexed shards (folder, glob or brace pattern), or a run: its YAML file, or a shipped run's name",
    )
    # argparse requires a list of positional arguments that has no default.
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    parser.add_argument(
        "--index", type=place, metavar="DIR", help="folder of the index, with a PATTERN; default: beside the shards"
    )
    parser.add_argument("--captions", metavar="SAMPLING", help="caption sampling; default: the run's, else textcrop")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of tables")


def _config(arguments: argparse.Namespace) -> "RunConfig":
    """The run that a command looks at: the run of a YAML file, or the default run on a pattern of shards."""
    from cosmos_scale.config.load import load_config, make_config
    from cosmos_scale.config.section import redact_urls

    overrides = list(arguments.overrides)
    if arguments.captions is not None:
        overrides.append(f"data.captions.sampling={arguments.captions}")
    if arguments.seed is not None:
        overrides.append(f"seed={arguments.seed}")
    if more := [text for text in arguments.overrides if "=" not in text]:
        raise UserError(f"{more[0]}: one pattern of shards is expected, in quotes, and then only key=value")
    if not _is_run(arguments.data):
        source = {"name": redact_urls(arguments.data), "shards": arguments.data, "index": arguments.index}
        shown = {key: text and text.encode("utf-8", "backslashreplace").decode() for key, text in source.items()}
        config = make_config({"data": {"sources": [shown]}}, overrides)
        if shown == source:
            return config
        # All texts of a run are UTF-8, but the names of files need not be: they stand in the config as they were given.
        given = config.data.sources[0].model_copy(update={"shards": arguments.data, "index": arguments.index})
        return config.model_copy(update={"data": config.data.model_copy(update={"sources": (given,)})})
    if arguments.index is not None:
        raise UserError(f"--index {arguments.index}: goes with a pattern; in a run's file it is data.sources.0.index")
    return load_config(run_file(arguments.data), overrides)


def _is_run(text: str) -> bool:
    """Tell whether a text names a run: a YAML file, or a shipped run where no file or folder has the name."""
    from cosmos_scale.config.shipped import SUFFIXES, is_shipped_name, is_shipped_run

    return text.endswith(SUFFIXES) or is_shipped_name(text) or (is_shipped_run(text) and not Path(text).exists())


def _inspect(arguments: argparse.Namespace) -> int:
    from cosmos_scale.console import make_console
    from cosmos_scale.data.tools import inspect, inspect_report
    from cosmos_scale.data.tools.own_pictures import refuse_foreign_picture
    from cosmos_scale.files import make_output_folder
    from cosmos_scale.model.tokenizer import Tokenizer

    config = _config(arguments)
    is_new = not arguments.out.exists()
    make_output_folder(arguments.out)
    context_length = config.model.text.context_length
    statistics, views = arguments.out / "statistics.png", arguments.out / "views.png"
    for picture in (statistics, views):
        refuse_foreign_picture(picture)
    try:
        inspect.draw_visits(
            config, Tokenizer(context_length), views, epoch=arguments.epoch, first=arguments.first, count=arguments.rows
        )
    except BaseException:
        if is_new:
            with suppress(OSError):  # a folder that holds something stays
                arguments.out.rmdir()
        raise
    found = inspect.survey(
        config,
        Tokenizer(LONGEST_CAPTION),
        samples=None if arguments.all else arguments.samples,
        epoch=arguments.epoch,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    inspect_report.draw_survey(found, context_length, statistics)
    if arguments.json:
        report = inspect_report.as_json(found, context_length)
        print(json.dumps({**report, "pictures": [str(statistics), str(views)]}))
        return 0
    sampling = config.data.captions.sampling
    inspect_report.print_survey(found, sampling, context_length, config.seed, arguments.epoch, make_console())
    print(f"\nhistograms: {statistics}\nviews and captions: {views}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cosmos_scale.config import RetrievalConfig, SourceConfig
    from cosmos_scale.data.tools import verify

    config = _config(arguments)
    galleries = [
        SourceConfig(name=f"eval.{section.name}", shards=section.shards, index=section.index)
        for section in config.eval
        if section.every and isinstance(section, RetrievalConfig)
    ]
    verdict = verify.verify_shards(
        config.data,
        galleries=galleries,
        log=arguments.out,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    if arguments.json:
        print(json.dumps(verdict.as_json()))
    else:
        print(verdict.describe(arguments.out))
    return 0 if verdict.sound else 1
