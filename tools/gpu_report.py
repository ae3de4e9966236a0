"""One command for the first minutes on a GPU: what runs, what is right, and where a step's time goes.

The most valuable stage comes first. Each stage is a process with a limit of its own, so that a crash or a hang costs
that stage only. Rows go to OUT/report.jsonl, a line at a time; in the end report.md and, where matplotlib is
installed, report.png are made of them. `--device cpu --tiny` rehearses every stage without a GPU; its times say
nothing.

Exit status: 0; 1 where a stage failed, was ended at its limit, or found something wrong; 2 for wrong arguments.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python tools/gpu_report.py`

from cosmos_scale.cli.leave import leave_after  # noqa: E402
from cosmos_scale.errors import UserError  # noqa: E402
from cosmos_scale.files import make_output_folder  # noqa: E402
from tools.gpu_page import read_rows, write_page, wrong_rows  # noqa: E402
from tools.gpu_stages import attention, golden, graph, kernels, machine, products, real_run, step  # noqa: E402
from tools.gpu_stages.recorder import Recorder, failure  # noqa: E402

LEAST_SECONDS = 15.0  # with less time left no stage begins
# How much longer a stage may take on a CPU. There torch.compile takes as long for a tiny model as for a large one: six
# programs are made by a C++ compiler, in 90 s on two busy cores where none of them is cached.
CPU_PATIENCE = 3.0


class Stage(NamedTuple):
    """A stage, and the most seconds that it may take."""

    run: Callable[[Recorder], None]
    limit: float


STAGES = {
    "machine": Stage(machine.measure, 45),
    "attention": Stage(attention.check, 60),
    "golden": Stage(golden.check, 60),
    "step64": Stage(step.of(64), 120),
    "step256": Stage(step.of(256), 80),
    "step32": Stage(step.of(32), 60),
    "run": Stage(real_run.measure, 150),
    "kernels": Stage(kernels.measure, 60),
    "products": Stage(products.measure, 45),
    "graph": Stage(graph.measure, 45),
    # Without what `auto` may take on a GPU that nobody has tried: where the steps above fail, these two tell why.
    "varlen64": Stage(step.of(64, on_gpu=("model.attention=torch_varlen",)), 80),
    "torch64": Stage(step.of(64, "kernels=torch"), 100),
    "compile64": Stage(step.of(64, "model.compile=true"), 150),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        make_output_folder(arguments.out)
    except UserError as error:
        parser.error(str(error))
    if arguments.stage:
        _run_stage(arguments)
    if not arguments.page:
        _run_stages(arguments)
    rows = read_rows(arguments.out / "report.jsonl")
    for file in write_page(rows, arguments.out):
        print(file)
    wrong = wrong_rows(rows)
    print(f"{len(rows)} rows; {len(wrong)} wrong" + "".join(f"\n  {line}" for line in wrong))
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n"
        "  python tools/gpu_report.py --out gpu --seconds 440\n"
        "  python tools/gpu_report.py --out gpu --only step64,attention\n"
        "  python tools/gpu_report.py --out rehearsal --device cpu --tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go; rows are appended")
    parser.add_argument("--seconds", type=float, default=440.0, help="of all stages together (default: 440)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--only", nargs="+", type=_stages, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--page", action="store_true", help="only make the page and the picture of the rows that exist")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    return parser


def _stages(text: str) -> list[str]:
    """Return the stages of an argument, which may name several with commas between."""
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STAGES)}")
    return names


def _run_stage(arguments: argparse.Namespace) -> None:
    """Run one stage in this process and end the process, whatever threads and collectives are left."""
    recorder = Recorder(
        arguments.out, arguments.stage, device=arguments.device, tiny=arguments.tiny, began=arguments.began
    )
    status = 0
    try:
        STAGES[arguments.stage].run(recorder)
    except BaseException as error:
        recorder.write(ok=False, failed=failure(error))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def limit_of(stage: str, device: str) -> float:
    """Return the most seconds that a stage may take on a device."""
    return STAGES[stage].limit * (CPU_PATIENCE if device == "cpu" else 1.0)


def _run_stages(arguments: argparse.Namespace) -> None:
    began, end = arguments.began, arguments.began + arguments.seconds
    options = ["--out", str(arguments.out), "--device", arguments.device, "--began", str(began)]
    options += ["--tiny"] if arguments.tiny else []
    for name in [name for names in arguments.only for name in names] if arguments.only else STAGES:
        recorder = Recorder(arguments.out, name, device=arguments.device, tiny=arguments.tiny, began=began)
        limit = min(limit_of(name, arguments.device), end - time.time())
        if limit < LEAST_SECONDS:
            recorder.write(skipped="no time is left")
            continue
        command = [sys.executable, __file__, *options, "--stage", name]
        try:
            status = _run(command, limit)
            recorder.write(what="end of the stage", ok=status == 0, status=status)
        except subprocess.TimeoutExpired:
            recorder.write(what="end of the stage", ok=False, failed=f"ended at its limit of {limit:.0f} s")


def _run(command: Sequence[str], limit: float) -> int:
    """Run a stage and return its exit status; past the limit it is killed with all processes that it started."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except BaseException:  # an interrupt too: the terminal's does not reach another session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


if __name__ == "__main__":
    leave_after(main)
