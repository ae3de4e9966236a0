"""What all commands `cosmos-scale eval KIND` share: arguments, the checkpoint's models, ranks, and what is printed.

A kind gives the arguments that it adds, and the keys of its section of the config that they make: see EvalCommand.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cosmos_scale.cli.arguments import add_checkpoint, path, positive, say, say_notes, with_examples
from cosmos_scale.cli.earlier_files import EarlierFiles
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.exit_status import FAILED, REFUSED
from cosmos_scale.files import make_output_folder

if TYPE_CHECKING:
    from cosmos_scale.checkpoint.interchange.weights import Which
    from cosmos_scale.config import EvaluatorConfig
    from cosmos_scale.engine.ranks import Ranks
    from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Numbers

Value = TypeVar("Value")

_WEIGHTS = ("student", "teacher")
FEATURES = "features"  # folder beside a checkpoint, for --cache
SHARED_OPTIONS = ("checkpoint", "weights", "activation", "batch", "names", "published")  # equal on all ranks
ONE_LINE = "print one JSON line for each model instead of a table"


class EvalCommand(NamedTuple):
    """One kind of evaluator as a command.

    batch: default of --batch. writes: whether it has --out, a folder for pictures and lists. caches: whether it has
    --cache, since it keeps features. add_arguments: adds the kind's own arguments. keys: from all arguments, the keys
    of the kind's section beside `kind` and `batch`.
    """

    kind: str
    help: str
    examples: str
    batch: int
    writes: bool
    caches: bool
    add_arguments: Callable[[argparse.ArgumentParser], None]
    keys: Callable[[argparse.Namespace], dict[str, Any]]


def add_eval_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", command: EvalCommand) -> None:
    """Add the command of a kind; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(commands.add_parser(command.kind, help=command.help), command.examples)
    add_checkpoint(parser)
    command.add_arguments(parser)
    parser.add_argument(
        "--weights",
        choices=(*_WEIGHTS, "both"),
        default="student",
        help="default: student",
    )
    parser.add_argument("--batch", type=positive, default=command.batch, metavar="N", help=f"default: {command.batch}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--json", action="store_true", help=ONE_LINE)
    parser.set_defaults(out=None, cache=False)
    if command.caches:
        kept = f"keep features in a folder `{FEATURES}` beside the checkpoint, and use what is kept there"
        parser.add_argument("--cache", action="store_true", help=kept)
    if command.writes:
        parser.add_argument("--out", type=path, metavar="DIR", help="folder for pictures and lists (default: none)")
    parser.set_defaults(command=f"eval {command.kind}", run=partial(_run, command))


def section_of(kind: str, keys: dict[str, Any]) -> "EvaluatorConfig":
    """Return an evaluator's section of the config; raises UserError, with the option's name, where a key is wrong."""
    from typing import Annotated

    from pydantic import Field, TypeAdapter, ValidationError

    from cosmos_scale.config.evaluation import AnyEvaluatorConfig
    from cosmos_scale.config.section import RuleBroken

    any_kind: TypeAdapter[Any] = TypeAdapter(Annotated[AnyEvaluatorConfig, Field(discriminator="kind")])
    try:
        section: EvaluatorConfig = any_kind.validate_python({"kind": kind, **keys})
    except ValidationError as error:
        details = error.errors()[0]
        broken = details.get("ctx", {}).get("error")
        if isinstance(broken, RuleBroken):
            value = "" if broken.value is None else f"{broken.value} "  # None: the option was not given
            raise UserError(f"--{broken.key.replace('_', '-')}: {value}{broken.rule}") from None
        option = f"--{str(details['loc'][-1]).replace('_', '-')}"
        raise UserError(f"{option}: {details['input']} {details['msg'].replace('Input should', 'should')}") from None
    return section


def _run(command: EvalCommand, arguments: argparse.Namespace) -> int:
    """Evaluate with the section that the arguments make."""
    section = section_of(command.kind, {"batch": arguments.batch, **command.keys(arguments)})
    return on_ranks(arguments.device, partial(_evaluate, arguments, section))


def on_ranks(device: str, evaluate: Callable[["Ranks | None"], int]) -> int:
    """Evaluate in this process, or, where a launcher started it, as one of several ranks; returns the exit status.

    evaluate: is given the ranks, None for this process alone; prints on rank 0 alone, and returns an exit status.
    """
    from cosmos_scale.engine.messages import limit_messages
    from cosmos_scale.engine.rank_variables import WrongRankVariable, adopt_rank_variables, read_rank_variables

    limit_messages("error")  # before torch is imported
    adopt_rank_variables()
    place = read_rank_variables()
    if place is None or place.world_size == 1:
        return evaluate(None)
    from cosmos_scale.engine.ranks import lost_contact, start_ranks, tell_lost_contact

    joined, main = False, place.local_rank == 0  # until all ranks run together, an error may be of one machine alone
    try:
        ranks = start_ranks(device)
        joined, main = True, ranks.is_main
        with ranks.contact:
            return evaluate(ranks)
    except WrongRankVariable:
        raise
    except UserError as error:
        if main or (joined and not isinstance(error, JointError)):
            raise
        return REFUSED
    except Exception as error:
        if not lost_contact(error):
            raise
        tell_lost_contact(error, str(place.rank), "nothing more is measured", command="eval")
        return FAILED


def _evaluate(arguments: argparse.Namespace, section: "EvaluatorConfig", ranks: "Ranks | None") -> int:
    """Measure the models that the arguments name, and print what is found; ranks: None for this process alone."""
    from cosmos_scale.console import make_console
    from cosmos_scale.evaluation.loading import models_of

    prints = ranks is None or ranks.is_main

    def load(checkpoint: Path) -> "dict[str, tuple[Which, Encoder]]":
        models = models_of(checkpoint, arguments.weights)
        if arguments.out is not None:
            make_output_folder(arguments.out)
        return {name: (which, encoder_of(arguments, ranks, checkpoint, which)) for name, which in models.items()}

    require_same_options(arguments, section, ranks)
    checkpoint, models = of_one_checkpoint(arguments.checkpoint, load, ranks)
    results: dict[str, Numbers] = {}
    earlier = None if arguments.out is None else EarlierFiles([arguments.out / which for which in _WEIGHTS])
    evaluator: Evaluator | None = None
    details: dict[str, Sequence[Any]] = {}
    for name in list(models):
        which, encoder = models.pop(name)
        evaluator, results[name] = _measured(arguments, section, ranks, checkpoint, which, encoder, evaluator)
        details[name] = evaluator.details()
        if prints and arguments.json:
            named = {"checkpoint": str(checkpoint), "weights": name, **evaluator.subject()}
            print(json.dumps({**named, **results[name]}))
    if prints and not arguments.json and evaluator is not None:
        console = make_console()
        console.print(str(checkpoint), style="italic", highlight=False, soft_wrap=True)
        console.print(evaluator.table(results, ""))
        for name, lines in details.items():
            if lines:
                console.print(f"{name}:", *lines, sep="\n")
    if prints and earlier is not None:
        earlier.say(arguments.out)
    return 0


def require_same_options(
    arguments: argparse.Namespace, section: "EvaluatorConfig | None", ranks: "Ranks | None"
) -> None:
    """Raise JointError where ranks were started with other options, and would measure other parts; collective.

    section: that the arguments make, None where they make several.
    """
    if ranks is None:
        return
    from cosmos_scale.config.compare import different_between_hosts
    from cosmos_scale.engine.ranks import from_all

    own = {name: getattr(arguments, name) for name in SHARED_OPTIONS if hasattr(arguments, name)}
    (options, first), *others = from_all((own, section), ranks)
    for rank, (other_options, other) in enumerate(others, start=1):
        for name, value in options.items():
            if value != other_options[name]:
                raise JointError(
                    f"--{name}: {value} on rank 0, {other_options[name]} on rank {rank}; rule: all ranks have the same"
                )
        if first is not None and other is not None and (keys := different_between_hosts(first, other)):
            named = ", ".join(f"--{key.replace('_', '-')}" for key in keys)
            raise JointError(f"{named}: rank {rank} has other values than rank 0; rule: all ranks have the same")


def _measured(
    arguments: argparse.Namespace,
    section: "EvaluatorConfig",
    ranks: "Ranks | None",
    checkpoint: Path,
    which: "Which",
    encoder: "Encoder",
    evaluator: "Evaluator | None",
) -> tuple["Evaluator", "Numbers"]:
    """Measure one model of a checkpoint; returns the evaluator too, which is made for the first model."""
    from cosmos_scale.evaluation.bar import WorkBar
    from cosmos_scale.evaluation.evaluator import measure
    from cosmos_scale.evaluation.kinds import make_evaluator

    folder = None if arguments.out is None else arguments.out / which
    with WorkBar(show=ranks is None or ranks.is_main) as bar:
        with together(ranks):
            if evaluator is None and (ranks is None or ranks.is_main):
                say_notes(checkpoint, encoder.notes)
            encoder = replace(encoder, setting=replace(encoder.setting, report=bar.report))
            evaluator = evaluator or make_evaluator(section, encoder.setting)
        if ranks is None:
            return evaluator, measure(evaluator, encoder, folder=folder)
        from cosmos_scale.engine.ranks import gather_rows
        from cosmos_scale.evaluation.together import EvaluationFailed, measure_together

        try:
            return evaluator, measure_together(evaluator, encoder, gather_rows, folder)
        except EvaluationFailed as failure:
            raise JointError(str(failure)) from failure


def encoder_of(arguments: argparse.Namespace, ranks: "Ranks | None", checkpoint: Path, which: "Which") -> "Encoder":
    """Load one model of a checkpoint as the arguments say, for this rank among all."""
    from cosmos_scale.evaluation.feature_cache import FeatureCache
    from cosmos_scale.evaluation.loading import load_encoder

    device = arguments.device if ranks is None else ranks.device
    encoder = load_encoder(checkpoint, which, device, arguments.activation)
    setting = replace(
        encoder.setting,
        rank=0 if ranks is None else ranks.rank,
        world_size=1 if ranks is None else ranks.world_size,
        cache=FeatureCache(checkpoint.parent / FEATURES) if arguments.cache else None,
    )
    return replace(encoder, setting=setting)


def of_one_checkpoint(named: Path, read: Callable[[Path], Value], ranks: "Ranks | None") -> tuple[Path, Value]:
    """Return the checkpoint that a path stands for, the same on all ranks, and what is read of it; collective.

    All that is needed of a checkpoint should be read here: a run that goes on may delete it later. See `of_newest`.
    """
    from cosmos_scale.checkpoint.files import GoneCheckpoint
    from cosmos_scale.checkpoint.interchange.reading import find_model, of_newest

    def find(path: Path) -> Path:
        with together(ranks):
            found = find_model(path)
        return main_ranks_choice(path, found, ranks)

    def read_together(checkpoint: Path) -> tuple[Path, Value]:
        gone, values = False, list[Value]()
        with together(ranks):
            try:
                values.append(read(checkpoint))
            except GoneCheckpoint:
                gone = True
        if ranks is not None:
            from cosmos_scale.engine.ranks import from_all

            gone = any(from_all(gone, ranks))
        if gone:
            raise GoneCheckpoint(checkpoint)
        return checkpoint, values[0]

    try:
        return of_newest(named, read_together, say if ranks is None or ranks.is_main else lambda line: None, find)
    except GoneCheckpoint as gone:  # on all ranks
        raise JointError(str(gone)) from gone


def main_ranks_choice(named: Path, found: Path, ranks: "Ranks | None") -> Path:
    """Return the checkpoint that rank 0 found in a path that all ranks were given; collective.

    Of a run that goes on, ranks may find different ones, and would measure two models as one. found: by this rank.
    """
    if ranks is None:
        return found
    from cosmos_scale.engine.ranks import from_all

    return named / from_all(found.relative_to(named), ranks)[0]


@contextmanager
def together(ranks: "Ranks | None") -> Iterator[None]:
    """Let all ranks raise the UserError of a block that one of them raises; collective."""
    if ranks is None:
        yield
        return
    from cosmos_scale.engine.ranks import raise_together

    error = None
    try:
        yield
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
