"""The command line: `cosmos-scale train | launch | plan | profile | eval | report | data | checkpoint | ...`.

Each command imports what it needs when it runs, so that `--help` and mistyped commands answer at once.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from cosmos_scale import __version__
from cosmos_scale.cli import attention, checkpoint, configs, convert, data, launch, plan, profile, report, train
from cosmos_scale.cli import eval as evaluate
from cosmos_scale.cli.arguments import CommandParser, say_repeats, with_examples
from cosmos_scale.cli.as_rank import told_cause
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.cli.output import told_output
from cosmos_scale.errors import UserError
from cosmos_scale.exit_status import CLOSED_PIPE, INTERRUPTED, REFUSED
from cosmos_scale.interrupt import DELETED_FOLDER, little_address_space
from cosmos_scale.openmp import drop_wrong_threads
from cosmos_scale.threads import too_few_threads

EXAMPLES = """\
examples:
  cosmos-scale data build --images photos --captions captions.jsonl --out shards
  cosmos-scale data index 'shards/{000000..000331}.tar'
  cosmos-scale data inspect shards
  cosmos-scale configs
  cosmos-scale configs --write cc3m_vitb16 my_run.yaml
  cosmos-scale train my_run.yaml --dry-run --world-size 16
  cosmos-scale train cc3m_vitb16 data.sources.0.shards=/data/cc3m train.max_steps=100
  cosmos-scale launch --hostfile hosts my_run.yaml
  cosmos-scale plan my_run.yaml --nodes 16 --gpus 8 --gpu h100
  deepspeed --num_accelerators 8 --module cosmos_scale.train my_run.yaml
  cosmos-scale eval retrieval --checkpoint runs/cc3m_vitb16/checkpoints --data /data/coco_val --json
  cosmos-scale checkpoint inspect runs/cc3m_vitb16 --verify
  cosmos-scale convert --checkpoint runs/cc3m_vitb16 --which teacher --to hf exported/cc3m_vitb16
"""


def program() -> NoReturn:
    """The command `cosmos-scale`: run `main` on the process's arguments and leave with its status."""
    leave_after(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0; 1 where `data verify` or `checkpoint inspect` finds damage, or where `train` loses contact with another rank; 2,
    130 and 141 as `exit_status` says.
    """
    spell_out()  # --help too
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # matplotlib's: its figures have a box in such a place
    try:
        os.getcwd()
    except OSError:  # MKL, which torch loads, would end the process without a word on the cause
        _tell(f"cosmos-scale: {DELETED_FOLDER}")
        return 2
    parsed: list[argparse.Namespace] = []

    def parse() -> int:
        parsed.append(_parse(list(sys.argv[1:] if argv is None else argv)))
        return 0

    status = exit_status("cosmos-scale", parse)  # --help on a full disk is an error of Python before 3.11.5
    if not parsed:
        return status
    (arguments,) = parsed
    drop_wrong_threads(f"cosmos-scale {arguments.command}")
    if arguments.command != "configs" and (few := little_address_space() or too_few_threads()):
        _tell(f"cosmos-scale {arguments.command}: {few}")
        return REFUSED
    return exit_status(f"cosmos-scale {arguments.command}", partial(arguments.run, arguments))


def exit_status(label: str, command: Callable[[], int]) -> int:
    """Run a command to its end and return its exit status, as shells number it; the only handler of what users cause.

    The command's own status; 2 where it raises UserError, which is printed on one line after the label, where too few
    open files are allowed, memory has run out, a disk is full, a path is closed to the user or cannot be one, a library
    cannot be imported, or its output cannot be written; 130 where it is interrupted, which is printed too; 141 where
    the reader of its output leaves early.
    """
    spell_out()
    try:
        with told_output():
            return command()
    except UserError as error:
        _tell(f"{label}: {error}")
        return REFUSED
    except BrokenPipeError:  # the reader of the output (head, a pager) has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return CLOSED_PIPE
    except KeyboardInterrupt:
        _tell(f"{label}: interrupted")
        return INTERRUPTED
    except Exception as error:
        told = told_cause(error)
        if told is None:
            raise
        _tell(f"{label}: {told}")
        return REFUSED


def spell_out() -> None:
    """From here on print what the output's encoding lacks as \\u2026, where it would be an error (LC_ALL=C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _tell(line: str) -> None:
    with suppress(OSError):  # of a standard error that nobody reads
        print(line, file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parsed, rest = _parser().parse_known_args(arguments)
    # argparse ends a list of positional arguments at the first option, but key=value may stand anywhere.
    if rest and ("overrides" not in parsed or any(text.startswith("-") for text in rest)):
        parsed.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    say_repeats(getattr(parsed, "overrides", ()))
    return parsed


def _setup(arguments: argparse.Namespace) -> int:
    from cosmos_scale.engine.comm_build import build_cpu_communication

    print(
        "DeepSpeed compiles its communication for ranks on CPUs: once per environment, a minute or two ...", flush=True
    )
    print(f"ready after {build_cpu_communication():.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = with_examples(CommandParser(prog="cosmos-scale", description=_DESCRIPTION), EXAMPLES)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--version", action="version", version=f"cosmos-scale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train.add_train_command(commands)
    launch.add_launch_command(commands)
    plan.add_plan_command(commands)
    profile.add_profile_command(commands)
    configs.add_configs_command(commands)

    data_parser = commands.add_parser("data", help="build, index, inspect and verify webdataset shards")
    with_examples(data_parser, data.EXAMPLES)
    data.add_data_commands(data_parser.add_subparsers(title="commands", metavar="COMMAND", required=True))

    eval_parser = with_examples(commands.add_parser("eval", help="evaluate a checkpoint"), evaluate.EXAMPLES)
    evaluate.add_eval_commands(eval_parser.add_subparsers(title="commands", metavar="COMMAND", required=True))

    attention.add_attention_command(commands)
    report.add_report_command(commands)

    checkpoint_parser = commands.add_parser("checkpoint", help="look at checkpoints")
    with_examples(checkpoint_parser, checkpoint.EXAMPLES)
    checkpoint.add_checkpoint_commands(
        checkpoint_parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    )

    convert.add_convert_command(commands)

    setup = commands.add_parser("setup", help="compile what DeepSpeed needs on CPUs, once, before the first launch")
    setup.set_defaults(command="setup", run=_setup)
    return parser


_DESCRIPTION = "Pre-training of COSMOS vision-language models on DeepSpeed."


if __name__ == "__main__":
    program()
