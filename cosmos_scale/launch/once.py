"""A program that all ranks run once: a profile, which has no checkpoint to go on from, and no run's lock to take."""

from collections.abc import Sequence

from cosmos_scale.exit_status import FAILED, FINISHED, INTERRUPTED, STOPPED
from cosmos_scale.launch.fit import first_world_size, place_ranks, slots_of
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.preflight import look_at
from cosmos_scale.launch.printer import Printer
from cosmos_scale.launch.signals import StoppedEarly, StopSignals
from cosmos_scale.launch.supervise import LaunchedRun, one_attempt


def launch_once(run: LaunchedRun, hosts: Sequence[Host], command: str) -> int:
    """Look at all hosts, run the program on as many ranks as share the batch, and return the exit status.

    command: how its own lines begin. The status is that of the rank that failed first, if any. Raises UserError where
    the look refuses.
    """
    printer = Printer(command)
    try:
        with StopSignals() as stop:
            try:
                meeting = look_at(run, printer.say, printer.show, stop)(hosts, True)
            except StoppedEarly:
                return STOPPED
            world_size = first_world_size(run.config, slots_of(hosts))
            places, idle = place_ranks(meeting.hosts, world_size, meeting.interfaces)
            if idle:
                printer.say(f"{world_size} of {slots_of(hosts)} ranks share the batch; idle: {', '.join(idle)}")
            failure = one_attempt(run, meeting, places, 1, printer, stop).failure
            if stop.at_once:
                return INTERRUPTED
            if failure is None:
                return FINISHED
            if stop.first is not None and failure.is_of_outside:
                printer.say(f"stopped by {stop.first} before its end; nothing was written")
                return STOPPED
            # A rank that a signal or a lost host has ended has no status of its own.
            return FAILED if failure.status is None or failure.status < 0 else failure.status
    finally:
        printer.close()
