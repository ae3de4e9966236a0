"""A program in the place of the trainer, for tests of the launch: ranks that do what their command line says.

`python -m tests.launch.rank FOLDER WORDS...`: FOLDER is the run's folder. A word is RANK:ACTION or *:ACTION, done in
order; `1!:ACTION` is done in the first attempt alone. Nothing slow is imported.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
SECONDS = 300.0  # after which a rank that waits gives up: longer than any test waits for it

stopped: list[int] = []


def wait() -> None:
    """Wait for SIGTERM, as a trainer does that trains; then leave a file, as it leaves a checkpoint."""
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    (FOLDER / f"waits-{RANK}").write_text(str(os.getpid()))
    end = time.monotonic() + SECONDS
    while not stopped and time.monotonic() < end:
        time.sleep(0.01)
    (FOLDER / f"saved-{RANK}").touch()


def ignore() -> None:
    """Wait, and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (FOLDER / f"waits-{RANK}").write_text(str(os.getpid()))
    time.sleep(SECONDS)


def outlive(rank: str) -> None:
    """Wait until a rank that has said that it is there has ended."""
    file = FOLDER / f"waits-{rank}"
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    while Path(f"/proc/{file.read_text()}").exists():
        time.sleep(0.01)


def step(text: str) -> None:
    with (FOLDER / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": int(text)}) + "\n")


def save(most: int) -> None:
    """Leave a further checkpoint in each of the first attempts."""
    number = len(list(FOLDER.glob(f"attempt-*-{RANK}")))
    if number <= most:
        (FOLDER / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)


def variables() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    (FOLDER / f"variables-{RANK}").write_text(json.dumps({name: os.environ.get(name) for name in names}))


def again() -> None:
    """Count the attempts, one file for each."""
    number = next(number for number in range(100) if not (FOLDER / f"attempt-{number}-{RANK}").exists())
    (FOLDER / f"attempt-{number}-{RANK}").write_text(" ".join(sys.argv[2:]))


ACTIONS: dict[str, Callable[[str], object]] = {
    "say": lambda text: print(text.replace("+", " ").format(rank=RANK), flush=True),
    "err": lambda text: print(text.replace("+", " ").format(rank=RANK), file=sys.stderr, flush=True),
    "exit": lambda text: os._exit(int(text)),
    "kill": lambda text: os.kill(os.getpid(), int(text)),
    "there": lambda text: (FOLDER / f"waits-{RANK}").write_text(str(os.getpid())),
    "outlive": outlive,
    "sleep": lambda text: time.sleep(float(text)),
    "step": step,
    "further": lambda text: step(str(len(list(FOLDER.glob(f"attempt-*-{RANK}"))))),
    "save": lambda text: save(int(text)),
    "wait": lambda text: wait(),
    "ignore": lambda text: ignore(),
    "variables": lambda text: variables(),
}

if __name__ == "__main__":
    first = not (FOLDER / f"attempt-0-{RANK}").exists()
    again()
    for word in sys.argv[2:]:
        who, _, action = word.partition(":")
        if "=" in who:  # an override
            continue
        if who.rstrip("!") in ("*", str(RANK)) and (first or not who.endswith("!")):
            name, _, text = action.partition("~")
            ACTIONS[name](text)
    if RANK == 0 and not stopped:
        step("1000")  # the last one
