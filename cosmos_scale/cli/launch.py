"""The command `cosmos-scale launch`: its arguments, and the call of the supervisor that starts a run's ranks."""

import argparse
import os
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import natural, path, place, positive, run_file, seconds, with_examples
from cosmos_scale.cli.output import lasting_output
from cosmos_scale.exit_status import FINISHED

if TYPE_CHECKING:  # functions import it, so that --help need not wait
    from cosmos_scale.launch.hostfile import Host
    from cosmos_scale.launch.supervise import LaunchedRun

EXAMPLES = """\
examples:
  cosmos-scale launch my_run.yaml
  cosmos-scale launch --ranks 2 my_run.yaml train.max_steps=20
  cosmos-scale launch --hostfile hosts --check my_run.yaml
  cosmos-scale launch --hostfile hosts --restarts 10 my_run.yaml
"""


def add_launch_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(
        commands.add_parser("launch", help="train a run on many ranks, on this host or over ssh, and supervise it"),
        EXAMPLES,
    )
    parser.description = (
        "Look at all hosts, start a run's ranks, follow them, and start them again from the last whole checkpoint\n"
        "where that may help. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU and Ctrl-C stop after a step, with a\n"
        "checkpoint; a second Ctrl-C ends all at once. Exit status: 0 finished, 3 stopped with a checkpoint, 1 failed\n"
        "(a restart may cure it), 2 refused or failed (a restart will not cure it), 130 ended at once."
    )
    parser.add_argument("file", type=place, metavar="RUN.yaml", help="the run's YAML file, or a shipped run's name")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ranks", type=positive, metavar="N", help="ranks on this host; default: its GPUs that share the batch, or 1"
    )
    where.add_argument("--hostfile", type=path, metavar="FILE", help="hosts, a line each: NAME slots=N")
    parser.add_argument("--check", action="store_true", help="look at all hosts, print what was found, start nothing")
    parser.add_argument(
        "--restarts",
        type=natural,
        default=3,
        metavar="N",
        help="at most, and counted anew after each further checkpoint; default: 3",
    )
    parser.add_argument(
        "--back-off",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="before a restart, twice as long each time without a further step; default: 5",
    )
    parser.add_argument(
        "--min-ranks",
        type=positive,
        default=1,
        metavar="N",
        help="go on with no fewer, where hosts are lost; default: 1",
    )
    parser.add_argument(
        "--stop-limit", type=seconds, metavar="SECONDS", help="kill ranks that take longer to stop; default: never"
    )
    parser.add_argument(
        "--link-limit",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="a host that is silent for so long is lost; default: 300",
    )
    parser.set_defaults(command="launch", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.config.load import load_config
    from cosmos_scale.launch.fit import check_world_size, first_world_size, slots_of
    from cosmos_scale.launch.hostfile import read_hostfile, this_host
    from cosmos_scale.launch.preflight import Preflight
    from cosmos_scale.launch.supervise import LaunchedRun

    config = load_config(run_file(arguments.file), arguments.overrides)
    if arguments.ranks is not None:
        hosts = [this_host(arguments.ranks)]
        check_world_size(config, arguments.ranks)
    else:  # of which some may be left out
        hosts = read_hostfile(arguments.hostfile) if arguments.hostfile else [this_host(_ranks_here(config.device))]
        first_world_size(config, slots_of(hosts))
    run = LaunchedRun(
        arguments.file,
        tuple(arguments.overrides),
        config,
        restarts=arguments.restarts,
        back_off=arguments.back_off,
        least_ranks=arguments.min_ranks,
        link_limit=arguments.link_limit,
        stop_limit=arguments.stop_limit,
    )
    if arguments.check:
        found = Preflight(run, hosts)
        found.look()
        print(found.table())
        found.require()
        return FINISHED
    return _supervise(run, hosts)


def _supervise(run: "LaunchedRun", hosts: "list[Host]") -> int:
    from cosmos_scale.launch.preflight import look_at
    from cosmos_scale.launch.printer import Printer
    from cosmos_scale.launch.signals import StopSignals
    from cosmos_scale.launch.supervise import Supervisor
    from cosmos_scale.run.lock import LAUNCH_TOKEN, RunLock

    with lasting_output():
        printer = Printer()
        try:
            with RunLock(run.folder, printer.say) as lock, StopSignals() as stop:
                os.environ[LAUNCH_TOKEN] = lock.token  # the ranks' environment is this one
                return Supervisor(run, hosts, look_at(run, printer.say, printer.show, stop), printer, stop).run()
        finally:
            printer.close()


def _ranks_here(device: str) -> int:
    from cosmos_scale.host import uses_gpu  # here, since the import takes seconds

    if not uses_gpu(device):
        return 1
    import torch

    return torch.cuda.device_count()
