"""The command `cosmos-scale train`: its arguments, the start of the ranks, and what it prints where training fails."""

import argparse
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from cosmos_scale.cli.arguments import place, positive, with_examples
from cosmos_scale.cli.as_rank import ThisRank, as_rank, read_run
from cosmos_scale.cli.output import lasting_output
from cosmos_scale.errors import UserError

EXAMPLES = """\
examples:
  cosmos-scale train my_run.yaml train.max_steps=20
  cosmos-scale train --dry-run --world-size 128 merged30m_vitb16
  cosmos-scale train --help-keys data.remote
  deepspeed --num_accelerators 2 --module cosmos_scale.train my_run.yaml
"""


def add_train_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(
        commands.add_parser(
            "train", help="train a run in this process (many ranks: deepspeed --module cosmos_scale.train)"
        ),
        EXAMPLES,
    )
    parser.description = "Train a COSMOS model in one process, or in many under the deepspeed launcher."
    file = parser.add_argument(
        "file",
        type=place,
        metavar="RUN.yaml",
        help="the run's YAML file, or a shipped run's name (cosmos-scale configs)",
    )
    file.required = False  # --help-keys needs no file; `_run` asks for it otherwise
    # argparse requires a list of positional arguments that has no default.
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run, and what a launch here would refuse; train nothing",
    )
    parser.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="ranks to plan a dry run for (default: 1)"
    )
    parser.add_argument(
        "--help-keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="print what the config's keys mean, those of PREFIX or all, and exit",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.set_defaults(command="train", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.help_keys is not None:
        from cosmos_scale.config.reference import help_keys

        print(help_keys(arguments.help_keys))
        return 0
    if arguments.file is None:
        arguments.parser.error("the following arguments are required: RUN.yaml")
    if arguments.dry_run:
        return _train(arguments, ())
    from cosmos_scale.run.stop_request import noted_terminations
    from cosmos_scale.run.supervisor import stop_with_launcher

    with noted_terminations() as noted:
        stop_with_launcher()
        return _train(arguments, noted)


def _train(arguments: argparse.Namespace, noted: Sequence[int]) -> int:
    """Train, or print what a run would do. noted: the signals that have come so far."""
    return as_rank("train", partial(_train_as, arguments, noted))


def _train_as(arguments: argparse.Namespace, noted: Sequence[int], this: ThisRank) -> int:
    config = read_run(arguments.file, arguments.overrides)
    this.when_lost = partial(_newest_checkpoint, config.output / config.name / "checkpoints")
    from cosmos_scale.engine.collectives import describe_collectives
    from cosmos_scale.run.dry_run import look_before_launch
    from cosmos_scale.run.explain import explain
    from cosmos_scale.run.stop_request import StopRequest
    from cosmos_scale.run.watchdog import Watchdog
    from cosmos_scale.train import train

    if arguments.dry_run:
        explain(config, arguments.world_size)
        look_before_launch(config, arguments.world_size)
        return 0
    with lasting_output():
        ranks = this.start(config)
        if ranks.is_main:
            _print_choices()
        collectives = partial(describe_collectives, ranks.groups)
        folder = config.output / config.name
        watchdog = Watchdog(config.train.watchdog_seconds, folder, ranks.contact, collectives)
        with ranks.contact, StopRequest(config.train.max_minutes, noted) as stop, watchdog:
            train(config, ranks, stop, watchdog)
    return 0


def _print_choices() -> None:
    """Print what the package's modules choose by themselves, such as the back end of attention."""
    logging.basicConfig(handlers=[_PrintingHandler()], format="%(message)s")
    logging.getLogger("cosmos_scale").setLevel(logging.INFO)


class _PrintingHandler(logging.Handler):
    """Prints messages to what standard output is at that moment: a progress bar takes its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def _newest_checkpoint(checkpoints: Path) -> str:
    from cosmos_scale.checkpoint import newest

    known: Path | str | None = "unknown, since their folder cannot be listed"
    with suppress(UserError):
        known = newest(checkpoints)
    return f"newest checkpoint: {known or 'none'}"
