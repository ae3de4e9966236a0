"""The command `cosmos-scale convert`: a checkpoint in the formats of other programs."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import add_checkpoint, path, say, with_examples

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cosmos_scale.checkpoint.interchange.export_files import ExportedFile
    from cosmos_scale.checkpoint.interchange.formats import Format
    from cosmos_scale.checkpoint.interchange.model_card import Records
    from cosmos_scale.checkpoint.interchange.source import Source
    from cosmos_scale.checkpoint.interchange.weights import Which
    from cosmos_scale.evaluation.bar import WorkBar

EXAMPLES = """\
examples:
  cosmos-scale convert --checkpoint runs/demo --to hf exported/demo-hf
  cosmos-scale convert --checkpoint runs/demo --which teacher --to openclip exported/demo-openclip
  cosmos-scale convert --checkpoint runs/demo/checkpoints/step-00000120 --to cosmos exported/demo-cosmos
  cosmos-scale convert --checkpoint cosmos_vitb16_cc12m.pt --which teacher --to hf exported/cc12m-hf
  cosmos-scale convert --checkpoint exported/demo-hf --to openclip exported/demo-openclip --force
"""


def add_convert_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = commands.add_parser("convert", help="write a checkpoint in the format of OpenCLIP, Hugging Face or COSMOS")
    with_examples(parser, EXAMPLES)
    parser.description = (
        "Write a trained model for other programs, with a card (README.md) that says how\n"
        "it was trained and measured:\n"
        '  openclip  open_clip.create_model_and_transforms("local-dir:DIR") opens DIR\n'
        "  hf        CLIPModel, CLIPProcessor and the zero-shot pipeline of transformers\n"
        "            open DIR, without a network\n"
        "  cosmos    DIR/cosmos.pt has the layout of the published COSMOS files\n"
        "openclip and hf have no cross-modality heads: these are left out. The folder is\n"
        "written whole or not at all."
    )
    add_checkpoint(parser)
    parser.add_argument("--to", choices=("openclip", "hf", "cosmos"), required=True, help="the format")
    parser.add_argument(
        "--which",
        choices=("student", "teacher"),
        default="student",
        help="the model to write (default: student, though cosmos_scale.load takes the teacher); a COSMOS file holds "
        "both, whichever is named",
    )
    parser.add_argument("folder", type=path, metavar="DIR", help="folder for the files; must be absent or empty")
    parser.add_argument(
        "--force", action="store_true", help="replace what convert wrote to DIR before; files of others there stay"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(command="convert", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.checkpoint.interchange.export_folder import check_apart, check_target, write_export
    from cosmos_scale.checkpoint.interchange.formats import check_format
    from cosmos_scale.checkpoint.interchange.model_card import Card
    from cosmos_scale.checkpoint.interchange.reading import of_newest
    from cosmos_scale.checkpoint.interchange.source import open_source
    from cosmos_scale.evaluation.bar import WorkBar

    to, folder = arguments.to, arguments.folder
    models: tuple[Which, ...] = ("student", "teacher") if to == "cosmos" else (arguments.which,)
    check_target(folder, (), force=arguments.force)  # before anything takes time
    check_apart(folder, arguments.checkpoint)
    with WorkBar(show=True) as bar:

        def read(checkpoint: "Path") -> "tuple[Source, list[ExportedFile]]":
            source = open_source(checkpoint, models, arguments.activation)
            check_format(to, source)
            return source, _files(to, source, models, bar)

        source, files = of_newest(arguments.checkpoint, read, say)
        total, written = sum(file.size for file in files), 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            bar.report("MB written", written // 10**6, total // 10**6)

        card = Card(to, models if source.models else (), source, _records(source), _command(arguments), str(folder))
        write_export(folder, files, card.text(), force=arguments.force, advance=advance)
    if arguments.json:
        print(json.dumps({**card.as_json(), "files": [file.name for file in files]}))
    else:
        print(card.summary())
    return 0


def _files(to: "Format", source: "Source", models: "Sequence[Which]", bar: "WorkBar") -> "list[ExportedFile]":
    """Read the models that go into an export, and return its files."""
    from cosmos_scale.checkpoint.interchange.formats import exported_files
    from cosmos_scale.model.tokenizer import byte_pairs

    weights = []
    for done, model in enumerate(models):
        bar.report("models read", done, len(models))
        weights.append(source.read(model))
    bar.report("models read", len(models), len(models))
    return exported_files(to, source, weights, byte_pairs())


def _records(source: "Source") -> "Records":
    """Return what the run measured at the checkpoint's step, as far as its metrics lie beside the checkpoint."""
    from cosmos_scale.run.folder import METRICS_FILE
    from cosmos_scale.run.logged import evaluations_at

    if source.training is None:
        return {}
    return evaluations_at(source.path.absolute().parent.parent / METRICS_FILE, source.training.manifest.state.step)


def _command(arguments: argparse.Namespace) -> str:
    """Return the command line that made an export."""
    words = ["cosmos-scale", "convert", "--checkpoint", str(arguments.checkpoint), "--to", arguments.to]
    words += [] if arguments.to == "cosmos" else ["--which", arguments.which]
    words += ["--activation", arguments.activation] if arguments.activation else []
    return shlex.join([*words, str(arguments.folder)])
