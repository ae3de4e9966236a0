"""The command `cosmos-scale eval all`: every public set that lies below a folder, beside what was published."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import add_checkpoint, path, positive, say, say_notes, with_examples
from cosmos_scale.cli.eval_command import FEATURES, encoder_of, of_one_checkpoint, on_ranks, require_same_options
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.exit_status import FINISHED, REFUSED
from cosmos_scale.files import make_output_folder

if TYPE_CHECKING:
    from cosmos_scale.engine.ranks import Ranks
    from cosmos_scale.evaluation.all_sets import OpenedSet
    from cosmos_scale.evaluation.comparison import Measured, Results
    from cosmos_scale.evaluation.evaluator import Encoder, Setting
    from cosmos_scale.evaluation.published import PublishedRow

EXAMPLES = """\
examples:
  cosmos-scale eval all --checkpoint runs/merged30m_vitb16 --data-root /data --out merged30m
  cosmos-scale eval all --checkpoint runs/mine --data-root /data --published merged30m_vitb16 --names published --cache
"""
OUT = Path("eval_out")


def add_eval_all_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = commands.add_parser("all", help="all public sets below a folder, beside published numbers")
    with_examples(parser, EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument(
        "--data-root", type=path, required=True, metavar="DIR", help="folder of all sets (docs/evaluation.md)"
    )
    parser.add_argument(
        "--published",
        metavar="ROW",
        help="published numbers to compare with, such as merged30m_vitb16; default: those of the run's name, or of a "
        "public file's, if any",
    )
    parser.add_argument(
        "--names",
        choices=("corrected", "published"),
        default="corrected",
        help="published: class names spelt as in the published evaluation (default: corrected)",
    )
    parser.add_argument("--weights", choices=("student", "teacher", "both"), default="both", help="default: both")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    kept = f"keep features in a folder `{FEATURES}` beside the checkpoint, and use what is kept there"
    parser.add_argument("--cache", action="store_true", help=kept)
    parser.add_argument(
        "--out", type=path, default=OUT, metavar="DIR", help=f"for the JSON and the table (default: {OUT})"
    )
    parser.set_defaults(command="eval all", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    return on_ranks(arguments.device, partial(_evaluate_all, arguments))


def _evaluate_all(arguments: argparse.Namespace, ranks: "Ranks | None") -> int:
    """Measure the models on every set, and write what is known after each of them; returns the exit status."""
    from cosmos_scale.evaluation.bar import WorkBar
    from cosmos_scale.evaluation.comparison import MARKDOWN_FILE, Results, keep_earlier
    from cosmos_scale.evaluation.loading import models_of
    from cosmos_scale.evaluation.together import EvaluationFailed

    prints = ranks is None or ranks.is_main

    def load(checkpoint: Path) -> "tuple[dict[str, Encoder], tuple[str | None, PublishedRow | None]]":
        models = models_of(checkpoint, arguments.weights)
        if not arguments.data_root.is_dir():
            raise UserError(f"--data-root: {arguments.data_root} is no folder")
        row = _published(arguments.published, checkpoint)
        make_output_folder(arguments.out)
        return {name: encoder_of(arguments, ranks, checkpoint, which) for name, which in models.items()}, row

    require_same_options(arguments, None, ranks)
    checkpoint, (models, (name, row)) = of_one_checkpoint(arguments.checkpoint, load, ranks)
    results = Results(str(checkpoint), str(arguments.data_root), arguments.names, name, row)
    bar = WorkBar(show=prints)
    opened: Sequence[OpenedSet] | None = None
    for weights in list(models):
        encoder = models.pop(weights)
        encoder = replace(encoder, setting=replace(encoder.setting, report=bar.report))
        if opened is None:
            if prints:
                say_notes(checkpoint, encoder.notes)
            opened = _opened(arguments, ranks, encoder.setting, results)
            if prints:
                _tell_what_is_not_measured(results)
            if not opened and not results.failed:
                raise JointError(
                    f"--data-root: {arguments.data_root} holds none of the {len(results.missing)} sets ("
                    f"{', '.join(results.missing)}); rule: one of them, in the layout that is expected"
                )
            if prints and (earlier := keep_earlier(arguments.out)):
                say(f"--out: {arguments.out} holds an earlier evaluation, which is kept as {earlier.name}")
        for one in opened:
            try:
                with bar:
                    measured = _measured(one, weights, encoder, ranks)
            except EvaluationFailed as failure:
                results.failed[f"{one.place.title}, {weights}"] = str(failure)
                if prints:
                    print(f"failed: {one.place.title}, {weights}: {failure}", file=sys.stderr)
                continue
            results.measured.append(measured)
            if prints:
                _tell(measured, results)
                results.write(arguments.out)
    if prints:
        results.write(arguments.out)
        print(arguments.out / MARKDOWN_FILE)
    return REFUSED if results.failed else FINISHED


def _published(given: str | None, checkpoint: Path) -> "tuple[str | None, PublishedRow | None]":
    """Return the name and numbers to compare with; raises UserError where the name is unknown."""
    from cosmos_scale.checkpoint import read_run_config
    from cosmos_scale.checkpoint.interchange.reading import is_public
    from cosmos_scale.evaluation.published import PUBLISHED_ROWS, row_of_file

    if given is None:
        own = row_of_file(checkpoint) if is_public(checkpoint) else read_run_config(checkpoint).name
        return (own, PUBLISHED_ROWS[own]) if own in PUBLISHED_ROWS else (None, None)
    if given not in PUBLISHED_ROWS:
        raise UserError(f"--published: {given} is none of {', '.join(PUBLISHED_ROWS)}")
    return given, PUBLISHED_ROWS[given]


def _opened(
    arguments: argparse.Namespace, ranks: "Ranks | None", setting: "Setting", results: "Results"
) -> "Sequence[OpenedSet]":
    """Return the sets that all ranks can measure, and write into the results why others are not; collective."""
    from cosmos_scale.engine.ranks import from_all
    from cosmos_scale.evaluation.all_sets import PUBLIC_PLACES, open_set

    found = [open_set(place, arguments.data_root, setting, arguments.names, arguments.batch) for place in PUBLIC_PLACES]
    reasons = [None if one is None else one.reason for one in found]
    everyones = [reasons] if ranks is None else from_all(reasons, ranks)
    measurable = []
    for place, one, of_ranks in zip(PUBLIC_PLACES, found, zip(*everyones, strict=True), strict=True):
        if all(reason is None for reason in of_ranks):
            results.missing[place.dataset] = place.expected
        elif any(of_ranks) or None in of_ranks:
            rank, reason = next((rank, reason) for rank, reason in enumerate(of_ranks) if reason != "")
            reason = f"is not below {arguments.data_root}" if reason is None else reason
            results.failed[place.title] = f"{reason} (rank {rank})" if len(of_ranks) > 1 else reason
        elif one is not None:
            measurable.append(one)
    return measurable


def _measured(one: "OpenedSet", weights: str, encoder: "Encoder", ranks: "Ranks | None") -> "Measured":
    """Measure one model on one set; raises EvaluationFailed, on all ranks."""
    from cosmos_scale.engine.ranks import gather_rows
    from cosmos_scale.evaluation.comparison import Measured
    from cosmos_scale.evaluation.evaluator import one_process
    from cosmos_scale.evaluation.together import measure_together

    assert one.evaluator is not None, "only sets that were opened"
    numbers = measure_together(one.evaluator, encoder, one_process if ranks is None else gather_rows, None)
    return Measured(one.place, weights, one.evaluator.subject(), numbers)


def _tell_what_is_not_measured(results: "Results") -> None:
    """Say on stderr which sets are not below the folder, with the layout that is expected, and which are broken."""
    for dataset, layout in results.missing.items():
        print(f"not found: {dataset}; expected: {layout}", file=sys.stderr)
    for title, reason in results.failed.items():
        print(f"failed: {title}: {reason}", file=sys.stderr)


def _tell(measured: "Measured", results: "Results") -> None:
    """Print a line with the numbers of one model on one set, as soon as they are known."""
    shown = []
    for row in measured.compared(results.row):
        trivial = "" if row.trivial is None else f", trivial {row.trivial:.2f}"
        published = "" if row.published is None else f", published {row.published:.2f}"
        beside = f"{trivial}{published}".removeprefix(", ")
        shown.append(f"{row.number} {row.measured:.2f}{f' ({beside})' if beside else ''}")
    print(f"{measured.place.title}, {measured.weights}: {', '.join(shown)}", flush=True)
