"""What disturbs a launched run, one function a kind of event, and what has to follow of it."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from typing import NamedTuple

from cosmos_scale.exit_status import STOPPED
from cosmos_scale.run.folder import CHECKPOINTS
from cosmos_scale.testing.shard_files import flip_bytes
from tools.soak_parts.hosts import HOSTS, below, host_of, kill, lives, loaders_of, ranks_below
from tools.soak_parts.setting import Size
from tools.soak_parts.watched import LIMIT, LOOK, Fault, WatchedRun

SAMPLE_DAMAGED = "sample damaged"
GOES_ON, RESTARTS, ENDS = "went on", "restarted", "launched again"


class Done(NamedTuple):
    """What an event did. whom: to what. said: what the launch has to print of it."""

    whom: str
    said: str


class Kind(NamedTuple):
    """A kind of event. status: of the launch, where it ends. world_size: of what follows. least: checkpoints before."""

    act: Callable[[WatchedRun, Random, float], Done]
    follows: str
    status: int = STOPPED
    world_size: int = len(HOSTS)
    least: int = 0


@dataclass
class Event:
    """An event, and what followed. step: the last one before it. seconds: from it to the next step that was trained.

    steps_lost: taken again. fault: what should not have happened.
    """

    kind: str
    time: str = ""
    step: int = 0
    whom: str = ""
    followed: str = ""
    seconds: float = 0.0
    steps_lost: int = 0
    fault: str | None = None


def disturb(run: WatchedRun, name: str, random: Random, size: Size, *, after: int) -> Event:
    """Do an event of a kind once a step is done, and wait until the run trains again; a fault stands in the event."""
    kind = KINDS[name]
    event = Event(name)
    attempts, steps, began = run.attempts, len(run.steps), time.time()
    try:
        _wait_for_turn(run, kind, after, random.uniform(0.0, size.pause))
        event.step, event.time = run.last, _now()
        lines, steps, began = len(run.said), len(run.steps), time.time()
        event.whom, said = kind.act(run, random, size.watchdog)
        _follow(run, kind, attempts)
        event.followed = kind.follows
        if not _said(run, lines, said):
            raise Fault(f"nobody said {said!r}")
    except Fault as fault:
        event.fault = str(fault)
        if run.status() is not None:
            run.launch()
            run.wait(lambda: run.steps[-1].attempt > attempts, "a step after a fault")
    again = [step for step in run.steps[steps:] if step.attempt > attempts]
    event.seconds = round((again[0] if again else run.steps[-1]).time - began, 1)
    if again:
        before = max((step.step for step in run.steps if step.attempt == attempts), default=0)
        event.steps_lost = max(0, before - again[0].step + 1)
    if event.fault is None and kind.follows == ENDS and event.steps_lost:
        event.fault = "a stop lost steps"
    for broken in (run.folder / CHECKPOINTS).glob("step-*.broken*"):  # the disk is small
        shutil.rmtree(broken)
    return event


def damaged_sample(key: str) -> Event:
    """Return the event of a sample that is damaged from the start, in the undisturbed run's data too."""
    return Event(SAMPLE_DAMAGED, _now(), whom=f"sample {key}", followed="replaced by another sample")


def _now() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"


def _wait_for_turn(run: WatchedRun, kind: Kind, after: int, pause: float) -> None:
    attempts, until = run.attempts, time.time() + pause
    run.wait(
        lambda: run.last >= after and time.time() >= until and len(run.checkpoints()) >= kind.least,
        f"step {after}, and {kind.least} checkpoints",
    )
    if run.attempts != attempts:
        raise Fault("the ranks were started again without an event")


def _follow(run: WatchedRun, kind: Kind, attempts: int) -> None:
    """Wait for what has to follow an event that has been done now."""
    done = time.time()
    if kind.follows == GOES_ON:
        run.wait(lambda: run.steps[-1].time > done, "the next step")
        if run.attempts != attempts:
            raise Fault("the ranks were started again")
        return
    if kind.follows == ENDS:
        run.wait(lambda: run.status() is not None, "the end of the launch", may_end=True)
        run.look()
        if run.status() != kind.status:
            raise Fault(f"the launch ended with status {run.status()}, not {kind.status}")
        run.launch()
    run.wait(lambda: run.steps[-1].attempt > attempts, "a step after a restart")
    if run.attempts != attempts + 1:
        raise Fault(f"{run.attempts - attempts} starts, not one")
    if run.world_size != kind.world_size:
        raise Fault(f"world size {run.world_size}, not {kind.world_size}")


def _choose(run: WatchedRun, random: Random) -> tuple[int, int, str]:
    """Return a rank, its process, and both with the host as text."""
    ranks = ranks_below(run.launcher)
    rank = random.choice(sorted(ranks))
    return rank, ranks[rank], f"rank {rank} on host {host_of(ranks[rank])}"


def kill_rank(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Send SIGKILL to a rank."""
    _, pid, whom = _choose(run, random)
    kill(pid)
    return Done(whom, f"{whom} was ended by SIGKILL")


def stop_rank_for_a_while(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Stop a rank's process for a shorter time than the watchdog waits."""
    _, pid, whom = _choose(run, random)
    seconds = random.uniform(0.1, 0.5) * watchdog
    kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    kill(pid, signal.SIGCONT)
    return Done(f"{whom}, for {seconds:.1f} s", "")


def stop_rank(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Stop a rank's process for ever."""
    rank, pid, whom = _choose(run, random)
    attempts = run.attempts
    kill(pid, signal.SIGSTOP)
    run.wait(lambda: run.attempts > attempts, "a restart")
    if lives(pid):
        raise Fault(f"{whom} was stopped and is still there after the restart")
    return Done(whom, f"rank {rank} on host {socket.gethostname()} does not answer")


def stop_loader(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Stop a loader process for ever."""
    _, pid, whom = _choose(run, random)
    loader = random.choice(loaders_of(pid))
    attempts = run.attempts
    kill(loader, signal.SIGSTOP)
    run.wait(lambda: run.attempts > attempts, "a restart")
    if lives(loader):
        raise Fault(f"the loader of {whom} was stopped and is still there after the restart")
    return Done(f"the loader of {whom}", "no progress for")


def signal_rank(number: signal.Signals) -> Callable[[WatchedRun, Random, float], Done]:
    """Return the event that sends a signal to a rank which asks the run to stop."""

    def act(run: WatchedRun, random: Random, watchdog: float) -> Done:
        rank, pid, whom = _choose(run, random)
        kill(pid, number)
        return Done(whom, f"{number.name} at rank {rank}")

    return act


def stop_launch(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Send the launch a signal that asks it to stop."""
    number = random.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT))
    kill(run.launcher, number)
    return Done(f"the launch, by {number.name}", f"{number.name}: the ranks stop after their step")


def kill_launch(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Send SIGKILL to the launch; what it has started has to end by itself."""
    started = below(run.launcher)
    kill(run.launcher)
    deadline = time.monotonic() + LIMIT
    while left := list(filter(lives, started)):
        if time.monotonic() > deadline:
            raise Fault(f"processes {left} outlive their launch")
        time.sleep(LOOK)
    return Done("the launch", "")


def damage_checkpoint(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Kill a rank, and damage the newest checkpoint before the restart."""
    lines = len(run.said)
    _, pid, _ = _choose(run, random)
    kill(pid)
    run.wait(lambda: _said(run, lines, "cosmos-scale launch: restart "), "the word of a restart")
    newest = run.checkpoints()[-1]
    file = random.choice(sorted(newest.glob("fragments-*.safetensors")))
    flip_bytes(file, file.stat().st_size // 2, 64)
    return Done(f"{newest.name}/{file.name}", "is damaged between bytes")


def delete_checkpoint(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Delete the newest checkpoint, and kill a rank."""
    newest = run.checkpoints()[-1]
    with suppress(FileNotFoundError):  # of a run that deletes it too, as an old one
        shutil.rmtree(newest)
    return Done(newest.name, kill_rank(run, random, watchdog).said)


def fill_disk(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Fill the disk of the run until a save has failed, and wait for the one that succeeds."""
    filler, lines = run.folder.parent / "filler", len(run.said)
    try:
        _fill(filler)
        run.wait(lambda: _said(run, lines, "failure 1, "), "a failed save")
    finally:
        filler.unlink()
    run.wait(lambda: _said(run, lines, "could be written now"), "a save on the disk with room")
    return Done("the disk of the run", "No space left on device")


def _fill(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        for size in (1 << 20, 1):
            block = bytes(size)
            with suppress(OSError):
                while True:
                    os.write(descriptor, block)
    finally:
        os.close(descriptor)


def _said(run: WatchedRun, since: int, text: str) -> bool:
    return any(text in line for line in run.said[since:])


def remove_host(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Let a host be gone, with all that runs there."""
    name = random.choice(HOSTS)
    run.hosts.remove(name)
    for pid in [pid for pid in below(run.launcher) if host_of(pid) == name]:
        kill(pid)
    return Done(name, f"host {name} is lost")


def bring_host_back(run: WatchedRun, random: Random, watchdog: float) -> Done:
    """Let the host be there again, and kill the rank that is left: the restart finds the host."""
    run.hosts.bring_back()
    return kill_rank(run, random, watchdog)


KINDS = {
    "rank killed": Kind(kill_rank, RESTARTS),
    "rank stopped for a while": Kind(stop_rank_for_a_while, GOES_ON),
    "rank stopped": Kind(stop_rank, RESTARTS),
    "loader stopped": Kind(stop_loader, RESTARTS),
    "SIGTERM to a rank": Kind(signal_rank(signal.SIGTERM), ENDS),
    "SIGUSR1 to a rank": Kind(signal_rank(signal.SIGUSR1), ENDS),
    "launch stopped": Kind(stop_launch, ENDS),
    "launch killed": Kind(kill_launch, ENDS, status=-signal.SIGKILL),
    "checkpoint damaged": Kind(damage_checkpoint, RESTARTS, least=2),
    "checkpoint deleted": Kind(delete_checkpoint, RESTARTS, least=2),
    "disk full": Kind(fill_disk, GOES_ON),
    "host removed": Kind(remove_host, RESTARTS, world_size=len(HOSTS) - 1),
    "host back": Kind(bring_host_back, RESTARTS),
}
FOLLOWS = {"host removed": "host back"}  # an event that is followed by another one at once
