"""Train the demo under `cosmos-scale launch` while it is disturbed at random, and compare it with an undisturbed run.

Two "hosts" of this machine have a rank each. Ranks, a loader, the launch and a host are killed or stopped, checkpoints
are damaged and deleted, the disk is filled during a save (as root: the run's disk is a small one in memory). A few
samples of both runs are damaged from the start. What happens, in which order and to whom, follows from the seed.

In the end the loss of each step, those of steps that were lost and taken again too, must be the undisturbed run's: bit
for bit where all steps before it were taken by two ranks, else within 1e-5. Where one rank has trained for a while, a
third run, with the same world sizes at the same steps, must have the same losses bit for bit.

Files in OUT: events.jsonl, a line an event; launch-NNN.log, what launches printed; metrics.jsonl of the disturbed run.
Exit status: 0; 1 where losses differ or anything went another way than it must; 2 for wrong arguments.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from typing import TextIO

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python tools/soak.py`

from cosmos_scale.cli.arguments import count, path, result_file  # noqa: E402
from cosmos_scale.cli.leave import leave_after  # noqa: E402
from cosmos_scale.cli.main import exit_status  # noqa: E402
from cosmos_scale.files import delete_folder, make_own_folder  # noqa: E402
from cosmos_scale.launch.supervise import LOGS  # noqa: E402
from cosmos_scale.run.folder import DAMAGE_FILE, METRICS_FILE  # noqa: E402
from cosmos_scale.words import counted  # noqa: E402
from tools.soak_parts.compare import (  # noqa: E402
    TOLERANCE,
    Comparison,
    compare_with_replay,
    compare_with_undisturbed,
    kept,
    world_sizes,
)
from tools.soak_parts.events import FOLLOWS, KINDS, SAMPLE_DAMAGED, Event, damaged_sample, disturb  # noqa: E402
from tools.soak_parts.hosts import HOSTS, Hosts  # noqa: E402
from tools.soak_parts.setting import RUN_NAME, Setting, make_setting, small_disk  # noqa: E402
from tools.soak_parts.watched import Fault, WatchedRun, train_undisturbed  # noqa: E402

EVENTS = "events.jsonl"
MOST_FAULTS = 5  # after which a soak ends early
MOST_SHOWN = 20  # lines on what is wrong
FIRST_STEP = 600.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the disk is unmounted, and all processes are ended
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:  # under nohup; launches would ignore it too, and must not
            signal.signal(number, lambda *_: None)

    def run() -> int:
        try:
            return compared_soak(arguments)
        except Fault as fault:
            say(f"NOT passed, and ended early: {fault}")
            return 1

    return exit_status("soak", run)


def compared_soak(arguments: argparse.Namespace) -> int:
    """Train the disturbed run and the undisturbed ones, and say how they compare; returns the exit status."""
    out: Path = arguments.out.absolute()
    make_empty(out)
    random = Random(arguments.seed)
    setting, hosts = make_setting(out, quick=arguments.quick, random=random), Hosts(out / "hosts")
    began = time.time()
    run, events = disturbed(setting, hosts, random, 60.0 * arguments.minutes, out)
    took = time.time() - began
    print_table(events)
    say(f"{len(events)} events in {took / 60:.1f} minutes; {run.last} steps, {run.attempts} starts of the ranks")
    comparisons = {}
    for name, comparison in compare(run, setting, hosts, out):
        comparisons[name] = comparison
        say(f"{name}: {describe(comparison)}")
    wrong = [f"step {event.step}, {event.kind}: {event.fault}" for event in events if event.fault]
    wrong += [f"{name}: {text}" for name, comparison in comparisons.items() for text in comparison.wrong]
    wrong += compare_damage(out, run.last, setting.damaged)
    for text in wrong[:MOST_SHOWN]:
        say(f"WRONG: {text}")
    say("passed" if not wrong else f"NOT passed: {len(wrong)} wrong")
    if arguments.json is not None:
        found = {
            "seed": arguments.seed,
            "seconds": round(took, 1),
            "steps": run.last,
            "starts": run.attempts,
            "events": [asdict(event) for event in events],
            "comparisons": {name: comparison._asdict() for name, comparison in comparisons.items()},
            "wrong": wrong,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


def make_empty(out: Path) -> None:
    """Make a soak's folder, without what an earlier soak left there; raises UserError where it holds other files."""
    if (out / EVENTS).is_file():
        delete_folder(out)
    make_own_folder(out, EVENTS)


def disturbed(
    setting: Setting, hosts: Hosts, random: Random, seconds: float, out: Path
) -> tuple[WatchedRun, list[Event]]:
    """Train the run for some seconds while it is disturbed; its records are left in a folder, its checkpoints not."""
    with small_disk(out / "disk", setting.size.disk) as no_disk:
        if no_disk is not None:
            say(f"no disk is filled: {no_disk}")
        run = WatchedRun(setting.file, out / "disk", hosts, out)
        try:
            return run, list(soak(run, setting, random, seconds, out, fills_disk=no_disk is None))
        finally:
            run.end()
            for name in (METRICS_FILE, DAMAGE_FILE):
                if (run.folder / name).exists():
                    shutil.copyfile(run.folder / name, out / name)
            if (run.folder / LOGS).exists():
                shutil.copytree(run.folder / LOGS, out / LOGS)


def soak(
    run: WatchedRun, setting: Setting, random: Random, seconds: float, out: Path, *, fills_disk: bool
) -> Iterator[Event]:
    """Disturb the run until some seconds are over and each kind of event has happened, then stop it; yields events."""
    kinds = [name for name in KINDS if name not in FOLLOWS.values() and (fills_disk or name != "disk full")]
    next_ones, faults = random.sample(kinds, len(kinds)), 0
    run.launch()
    run.wait(lambda: run.last > 0, "the first step", seconds=FIRST_STEP)
    say(f"training on {run.world_size} ranks, {setting.size.every} steps between checkpoints")
    end = time.time() + seconds
    with (out / EVENTS).open("w") as file:
        for sample in map(damaged_sample, setting.damaged):
            write_event(file, sample)
            yield sample
        while next_ones or time.time() < end:
            name = next_ones.pop(0) if next_ones else random.choice(kinds)
            if name in FOLLOWS:
                next_ones.insert(0, FOLLOWS[name])
            # Beyond every step before: that the same step fails twice is something that a launch does not go on from.
            further = max(step.step for step in run.steps) + random.randint(1, 4)
            if name in FOLLOWS.values():  # first a checkpoint of the ranks that are left is whole
                further += 2 * setting.size.every
            event = disturb(run, name, random, setting.size, after=further)
            write_event(file, event)
            tell(event)
            yield event
            faults += event.fault is not None
            if faults == MOST_FAULTS:
                break
    run.stop()


def compare(run: WatchedRun, setting: Setting, hosts: Hosts, out: Path) -> Iterator[tuple[str, Comparison]]:
    """Train undisturbed runs, and yield what they are with what the comparison of the disturbed one found."""
    last = max(step.step for step in run.steps)  # a step that was lost may be beyond the end
    losses = train_undisturbed(setting.file, out / "undisturbed", hosts, [(len(HOSTS), last)])
    yield "beside the undisturbed run", compare_with_undisturbed(run.steps, losses, len(HOSTS))
    trajectory = kept(run.steps)
    sizes = world_sizes(trajectory)
    if len(sizes) > 1:
        losses = train_undisturbed(setting.file, out / "same-sizes", hosts, sizes)
        yield "beside a run of the same world sizes", compare_with_replay(trajectory, losses)


def compare_damage(out: Path, last: int, damaged: Sequence[str]) -> list[str]:
    """Return what is wrong with the lists of damaged samples: both runs have each sample once for each step of it."""
    of_runs = []
    for file in (out / DAMAGE_FILE, out / "undisturbed" / RUN_NAME / DAMAGE_FILE):
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        of_runs.append(sorted((record["step"], record["key"]) for record in records if record["step"] < last))
    here, undisturbed = of_runs
    say(f"damaged samples were met {len(here)} times, in the undisturbed run {len(undisturbed)} times")
    others = {key for _, key in here} - set(damaged)
    if here == undisturbed and not others:
        return []
    return [f"damaged samples (step, key): {here}, in the undisturbed run {undisturbed}; damaged were {damaged}"]


def write_event(file: TextIO, event: Event) -> None:
    """Write the line of an event."""
    file.write(json.dumps(asdict(event)) + "\n")
    file.flush()


def tell(event: Event) -> None:
    """Print an event."""
    lost = f", {counted(event.steps_lost, 'step')} lost" if event.steps_lost else ""
    say(
        f"step {event.step}: {event.kind}: {event.whom}: {event.followed or 'FAULT'}, trains after "
        f"{event.seconds:.1f} s{lost}{f'; {event.fault}' if event.fault else ''}"
    )


def print_table(events: Sequence[Event]) -> None:
    """Print a row for each kind of event: how often, steps lost, seconds until a step was trained again."""
    print(f"{'event':<26}{'times':>6}{'steps lost':>14}{'seconds to go on':>24}")
    for name in (SAMPLE_DAMAGED, *KINDS):
        found = [event for event in events if event.kind == name]
        if found:
            lost, seconds = [event.steps_lost for event in found], [event.seconds for event in found]
            steps = f"{median(lost):g} (most {max(lost)})"
            print(f"{name:<26}{len(found):>6}{steps:>14}{f'{median(seconds):.1f} (most {max(seconds):.1f})':>24}")


def describe(comparison: Comparison) -> str:
    """Return what a comparison found, as text."""
    near = f", {comparison.near} within {TOLERANCE:g} (worst {comparison.worst:.1e})" if comparison.near else ""
    return f"{comparison.exact} records bit for bit{near}; {len(comparison.wrong)} wrong"


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n"
        "  python tools/soak.py --minutes 30\n"
        "  python tools/soak.py --minutes 3 --quick --seed 7 --json soak.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=30.0,
        metavar="N",
        help="with disturbances, at least; longer where not every kind of event has happened yet (default: 30)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model in the place of the demo's")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of what happens (default: 0)")
    parser.add_argument("--out", type=path, default=Path("soak_out"), metavar="DIR", help="default: soak_out")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write all that was found there")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number of minutes, more than 0")
    return minutes


if __name__ == "__main__":
    leave_after(main)
