"""The command `cosmos-scale profile`: its arguments, the start of the ranks, and what it prints and writes."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import path, place, positive, run_file, with_examples
from cosmos_scale.cli.as_rank import ThisRank, as_rank, read_run
from cosmos_scale.cli.output import lasting_output
from cosmos_scale.words import print_row

if TYPE_CHECKING:  # functions import it, so that --help need not wait
    from cosmos_scale.config import RunConfig
    from cosmos_scale.profile import ProfilePlan
    from cosmos_scale.profiling.profile_record import ProfileRecord
    from cosmos_scale.profiling.rank_profile import RankProfile

FOLDER = "profile"  # in the run's folder
EXAMPLES = """\
examples:
  cosmos-scale profile my_run.yaml
  cosmos-scale profile my_run.yaml --steps 50 --trace
  cosmos-scale profile my_run.yaml data.workers=4 --out other --compare runs/my_run/profile/profile.json
  cosmos-scale profile my_run.yaml --ranks 8
  cosmos-scale profile my_run.yaml --hostfile hosts --planned
  deepspeed --num_accelerators 8 --module cosmos_scale.profile my_run.yaml
"""


def add_profile_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(
        commands.add_parser("profile", help="measure where a run's steps spend their time, on one rank or many"),
        EXAMPLES,
    )
    parser.description = (
        "Take some steps of a run, from freshly drawn weights, and print where their time and memory go, and what may\n"
        "be changed. No checkpoint is written, and nothing of the run's folder is touched but the folder `profile`.\n"
        "--ranks and --hostfile start the ranks as `cosmos-scale launch` does; without them this process is a rank:\n"
        "the only one, or one of those that deepspeed, torchrun or srun has started."
    )
    parser.add_argument("file", type=place, metavar="RUN.yaml", help="the run's YAML file, or a shipped run's name")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=positive, metavar="N", help="start so many ranks on this host")
    where.add_argument(
        "--hostfile", type=path, metavar="FILE", help="start the ranks of these hosts, a line each: NAME slots=N"
    )
    parser.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="measured, and as many beside them; default: 20"
    )
    parser.add_argument("--warm-up", type=positive, default=10, metavar="N", help="steps before; default: 10")
    parser.add_argument(
        "--compare", type=path, metavar="FILE", help="profile.json of an earlier profile: what changed?"
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="default: the folder `profile` in the run's folder")
    parser.add_argument("--trace", action="store_true", help="keep each rank's trace, for ui.perfetto.dev")
    parser.add_argument(
        "--memory", action="store_true", help="write each GPU's memory snapshot, for pytorch.org/memory_viz"
    )
    parser.add_argument(
        "--planned", action="store_true", help="count the step without running it, too, and print both; takes 10 s more"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.set_defaults(command="profile", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.ranks or arguments.hostfile:
        return _launch(arguments)
    from cosmos_scale.run.stop_request import noted_terminations
    from cosmos_scale.run.supervisor import stop_with_launcher

    with noted_terminations() as noted:
        stop_with_launcher()
        return as_rank("profile", partial(_profile_as, arguments, noted))


def _launch(arguments: argparse.Namespace) -> int:
    """Start the ranks that profile, here or on hosts, and follow them to their end."""
    from cosmos_scale.config.load import load_config
    from cosmos_scale.launch.fit import check_world_size
    from cosmos_scale.launch.hostfile import read_hostfile, this_host
    from cosmos_scale.launch.once import launch_once
    from cosmos_scale.launch.supervise import LOGS, LaunchedRun
    from cosmos_scale.profiling.profile_record import read_record

    config = load_config(run_file(arguments.file), arguments.overrides)
    if arguments.compare:
        read_record(arguments.compare)  # refused before anything starts
    if arguments.ranks:
        check_world_size(config, arguments.ranks)
    hosts = [this_host(arguments.ranks)] if arguments.ranks else read_hostfile(arguments.hostfile)
    options = [f"--steps={arguments.steps}", f"--warm-up={arguments.warm_up}"]
    options += [f"--{name}={value}" for name in ("compare", "out") if (value := getattr(arguments, name)) is not None]
    options += [f"--{name}" for name in ("trace", "memory", "planned") if getattr(arguments, name)]
    run = LaunchedRun(
        arguments.file,
        tuple(arguments.overrides),
        config,
        program="cosmos_scale.profile",
        options=tuple(options),
        logs=_folder(arguments, config) / LOGS,
        at_stop="stop after their step, and write no profile",
    )
    with lasting_output():
        return launch_once(run, hosts, "cosmos-scale profile")


def _folder(arguments: argparse.Namespace, config: "RunConfig") -> Path:
    """Return the profile's folder."""
    out: Path | None = arguments.out
    return out or config.output / config.name / FOLDER


def _profile_as(arguments: argparse.Namespace, noted: Sequence[int], this: ThisRank) -> int:
    """Profile on the ranks that a launcher started, or in this process; noted: the signals that have come so far."""
    config = read_run(arguments.file, arguments.overrides)
    this.when_lost = lambda: "no profile was written"
    from cosmos_scale.engine.collectives import describe_collectives
    from cosmos_scale.engine.ranks import from_all
    from cosmos_scale.profile import ProfilePlan, profile
    from cosmos_scale.profiling.profile_record import read_record
    from cosmos_scale.run.stop_request import StopRequest
    from cosmos_scale.run.watchdog import Watchdog

    before = read_record(arguments.compare) if arguments.compare else None
    folder = _folder(arguments, config)
    plan = ProfilePlan(arguments.steps, arguments.warm_up, folder, arguments.trace, arguments.memory)
    with lasting_output():
        ranks = this.start(config)
        collectives = partial(describe_collectives, ranks.groups)
        watchdog = Watchdog(config.train.watchdog_seconds, folder, ranks.contact, collectives)
        with ranks.contact, StopRequest(None, noted) as stop, watchdog:
            measured, workers = profile(config, ranks, stop, watchdog, plan)
            everyone = from_all(measured, ranks)
        if ranks.is_main:
            _report(config, everyone, workers, plan, arguments, before)
    return 0


def _report(
    config: "RunConfig",
    ranks: "Sequence[RankProfile]",
    workers: int,
    plan: "ProfilePlan",
    arguments: argparse.Namespace,
    before: "ProfileRecord | None",
) -> None:
    """Print what all ranks have measured, and write it. workers: loader processes of a rank."""
    from cosmos_scale.profiling.findings import findings
    from cosmos_scale.profiling.planned_step import planned_step
    from cosmos_scale.profiling.profile_record import compared, profile_record, write_record
    from cosmos_scale.profiling.profile_text import profile_lines

    record = profile_record(config, ranks, warm_up=plan.warm_up, workers=workers)
    record["findings"] = findings(record)
    record["compared"] = None if before is None else compared(before, record, arguments.compare)
    if arguments.planned:
        record["planned"] = planned_step(config, len(ranks), on_gpu=ranks[0].gpu_memory is not None)
    record["files"] += plan.files(len(ranks))
    for line in profile_lines(record):
        print(line)
    write_record(record, plan.folder)
    print_row("wrote          ", f"{plan.folder}: {', '.join(record['files'])}")
