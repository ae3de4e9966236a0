"""The demo, `python -m cosmos_scale.demo`: from nothing to a trained COSMOS model and its retrieval numbers.

It paints scenes, trains on them under the deepspeed launcher as any user would, evaluates the checkpoints from before
and after, and leaves `report.html`, `loss_curve.png`, `views.png`, `summary.json` and pictures of the evaluations
behind. It needs no network.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from cosmos_scale.import_path import libraries_first

    libraries_first()

    from cosmos_scale.interrupt import refuse_to_import, tell_interrupts
    from cosmos_scale.openmp import drop_wrong_threads

    tell_interrupts("demo")
    refuse_to_import("demo")
    drop_wrong_threads("demo")

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos_scale.checkpoint import newest
from cosmos_scale.cli.arguments import CommandParser, path
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.cli.main import exit_status
from cosmos_scale.config import RetrievalConfig, RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.console import make_console
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.data.scenes.layouts import write_layouts
from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.tools.contact_sheet import contact_sheet
from cosmos_scale.demo_zero_shot import SCENES, SCENES_QUICK, show_zero_shot
from cosmos_scale.drawing import usual_figures
from cosmos_scale.engine.comm_build import build_cpu_communication, use_own_environment
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.bar import WorkBar
from cosmos_scale.evaluation.evaluator import measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.files import delete_folder, make_own_folder
from cosmos_scale.host import usable_cores
from cosmos_scale.report.page import write_report

SAMPLES_SHOWN = 4
MARK = ".made_by_demo"  # in the folder of a demo: the next one may replace what lies there
MODELS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
DIRECTIONS = {"image_to_text_R@1": "image to text", "text_to_image_R@1": "text to image"}

# The least recall at 1 of the student in both directions, in multiples of chance. A model that only sees the background
# and the number of objects reaches 12. A model that is trained on permuted captions stays below 3.
REQUIRED = 20.0
REQUIRED_QUICK = 3.0

Recalls = dict[str, dict[str, float]]
"""Recall at 1 by model ("student", "teacher") and direction."""


class TrainingRecords(NamedTuple):
    """The records of a run's metrics.jsonl: those of training and those of evaluation, in the order of steps."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """The seconds of all steps with their waits for data, without start-up, evaluation and checkpoints."""
        # A record holds the mean over the steps since the record before it.
        counts = (after - before for before, after in pairwise([0, *(record["step"] for record in self.steps)]))
        times = [count * record["step_seconds_max"] for count, record in zip(counts, self.steps, strict=True)]
        return float(sum(times))


def run_demo(out: Path, quick: bool) -> bool:
    """Build the data, train, evaluate and report in the folder `out`; return whether the student learned enough.

    Raises UserError where the training fails.
    """
    console = make_console()
    file = shipped_file("demo_quick" if quick else "demo")
    overrides = [
        f"output={out / 'runs'}",
        f"data.sources.0.shards={out / 'data' / 'train'}",
        f"eval.0.shards={out / 'data' / 'gallery'}",
    ]
    config = load_config(file, overrides)
    (gallery,) = config.eval  # both configs of the demo have one evaluator
    assert isinstance(gallery, RetrievalConfig)
    assert gallery.max_samples is not None
    assert config.data.samples is not None
    run_folder = config.output / config.name
    delete_folder(run_folder)  # of an earlier demo

    _begin(
        console,
        "1. Data.",
        f"Painting {config.data.samples:,} scenes with captions to train on, and "
        f"{gallery.max_samples} held-out ones: JPEG files in webdataset shards under {out / 'data'}.",
    )
    build_scenes(out / "data", train=config.data.samples, gallery=gallery.max_samples, seed=config.seed, progress=True)
    layouts = write_layouts(out / "data" / "gallery", out / "data" / "layouts")
    console.print(
        f"   The held-out ones again, as folders that show how to lay out your own: {out / 'data' / 'layouts'}"
    )
    draw_first_views(config, out / "views.png")
    console.print(f"   What the model will see of {SAMPLES_SHOWN} of them: {out / 'views.png'}")

    ranks, device = _ranks_and_device()
    _begin(
        console,
        "2. Training.",
        f"Student and teacher for {config.train.schedule_steps} steps of "
        f"{config.train.global_batch} samples, on {ranks} {device} {'ranks' if ranks > 1 else 'rank'} with DeepSpeed "
        f"ZeRO-{config.zero.stage}.",
    )
    prepare_launch(device, console)
    _launch(file, overrides, ranks, console)

    _begin(
        console,
        "3. Retrieval.",
        f"Of {gallery.max_samples} held-out pairs, which caption belongs to a picture, and "
        "which picture to a caption? Asking the models from before and after the training.",
    )
    before = _recalls(run_folder / "checkpoints" / "step-00000000", gallery)
    last = newest(run_folder / "checkpoints")
    assert last is not None
    after = _recalls(last, gallery)

    training = read_metrics(run_folder / "metrics.jsonl")
    samples = training.steps[-1]["step"] * config.train.global_batch
    summary = {
        "gallery": gallery.max_samples,
        "chance_R@1": 1 / gallery.max_samples,
        "train_seconds": round(training.seconds, 1),
        "samples_per_second": round(samples / training.seconds, 2),
        "before": before,
        "after": after,
    }
    draw_curves(training, summary, out / "loss_curve.png")
    console.print()
    console.print(_table(summary))
    console.print(f"{samples:,} samples in {training.seconds:.0f} s: {samples / training.seconds:.1f} samples/s")

    _begin(
        console,
        "4. Without training for it.",
        "The same pictures: the class of each, the colour at each pixel, and where the model looks when it is asked "
        "for an object. So short a training shows beginnings: compare with an answer that knows nothing.",
    )
    scenes = SCENES_QUICK if quick else SCENES
    found = show_zero_shot(last, MODELS, out / "data" / "gallery", layouts, out, scenes, console)
    (out / "summary.json").write_text(json.dumps({**summary, "zero_shot": found.numbers}, indent=2) + "\n")
    with WorkBar(show=True) as bar:
        write_report([run_folder], out / "report.html", report=bar.report)
    left = {"report": out / "report.html", "checkpoint": last, "loss curve": out / "loss_curve.png"}
    left |= {"views": out / "views.png", **found.pictures}
    left |= {"numbers": out / "summary.json", "your own data": out / "data" / "layouts"}
    console.print("\n".join(f"{what:<13} {path}" for what, path in left.items()), highlight=False, soft_wrap=True)
    return learned(summary, REQUIRED_QUICK if quick else REQUIRED, console)


def draw_first_views(config: RunConfig, path: Path) -> None:
    """Draw the views and captions of the data's first samples, as the first epoch has them."""
    index, reader = open_sources(config.data.sources, config.data.remote), ShardReader(config.data.remote)
    rows = []
    for sample in range(SAMPLES_SHOWN):
        key = SampleKey(config.seed, 0, sample)
        image_bytes, document = reader.read(index.locate(sample))
        picture = decode_rgbx(image_bytes, config.data.max_pixels, config.data.background)
        views = Views.empty(config.data.views, config.model.vision.image_size)
        plan = plan_views(config.data.views, config.model.vision.image_size, key, *picture.shape[:2])
        execute(picture, plan, *views)
        rows.append((views, draw_captions(config.data.captions, document, key)))
    reader.close()
    contact_sheet(rows, path, config.data.captions.global_count, zoom=3)  # a crop of 64 pixels is small on a screen


@usual_figures()
def draw_curves(training: TrainingRecords, summary: dict[str, Any], path: Path) -> None:
    """Draw both losses over the steps, and the recall of student and teacher in multiples of chance."""
    import matplotlib as mpl  # here: the import takes a second, and the demo should print its first line at once

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, recall) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [record["step"] for record in training.steps]
    for key, label in (("clip", "CLIP loss"), ("distill", "distillation loss")):
        losses.plot(steps, [record[key] for record in training.steps], label=label)
    losses.set(title="Losses", xlabel="step", ylabel="loss", ylim=(0, None))

    last_step = steps[-1]
    evaluations = [record for record in training.evaluations if record["step"] < last_step]
    for model, line in zip(MODELS, ("-", "--"), strict=True):
        for (key, label), colour in zip(DIRECTIONS.items(), ("tab:green", "tab:red"), strict=True):
            points = [(0, summary["before"][model][key])]
            points += [(record["step"], record[f"{model}/{key}"]) for record in evaluations]
            points += [(last_step, summary["after"][model][key])]
            times_chance = [value / summary["chance_R@1"] for _, value in points]
            recall.plot(
                [step for step, _ in points], times_chance, line, color=colour, marker=".", label=f"{model}, {label}"
            )
    recall.axhline(1, color="grey", linewidth=1, linestyle=":", label="chance")
    recall.set(
        title=f"Retrieval among {summary['gallery']} held-out pairs",
        xlabel="step",
        ylabel="R@1 as a multiple of chance",
        ylim=(0, None),
    )
    for axes in (losses, recall):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, last_step)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _begin(console: Console, heading: str, text: str) -> None:
    """Print what a part of the demo does, under its heading."""
    console.print(Text.assemble("\n", (heading, "bold"), " ", text))


def prepare_launch(device: str, console: Console) -> None:
    """Let the launcher find this environment's programs; compile DeepSpeed's communication for CPUs where it is absent.

    Raises UserError where there is no C++ compiler.
    """
    use_own_environment()
    if device == "CPU":
        console.print("   First DeepSpeed's communication for CPUs: compiled once per environment, in a minute or two.")
        console.print(f"   Ready after {build_cpu_communication():.0f} s.")


def _ranks_and_device() -> tuple[int, str]:
    """The number of ranks and their device: two ranks, or one on a single GPU, which two ranks cannot share."""
    if torch.cuda.is_available():
        return min(2, torch.cuda.device_count()), "GPU"
    return 2, "CPU"


def _launch(run: Path, overrides: Sequence[str], ranks: int, console: Console) -> None:
    """Train under the deepspeed launcher, whose output goes to this terminal."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    arguments = [
        "--quiet",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        "cosmos_scale.train",
    ]
    command = ["deepspeed", *arguments, str(run), *overrides]
    console.print("   The ranks take some seconds to start.")
    console.print("   $ " + " ".join(command), style="dim", highlight=False, soft_wrap=True)
    # Through -m, since the `deepspeed` script may not be on PATH.
    status = run_in_session([sys.executable, "-m", "deepspeed.launcher.runner", *command[1:]], environment)
    if status:
        raise UserError(f"training ended with exit status {status}; its output above says why")


def run_in_session(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a program to its end and return its exit status; an interrupt also ends all processes that it started."""
    # An interrupt would end the launcher's first process before its ranks, with a traceback. So this process ignores
    # interrupts while it starts the launcher, and the launcher inherits that. The launcher's second process and the
    # ranks set their own handlers.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        signal.signal(signal.SIGINT, handler)
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise


def _recalls(checkpoint: Path, gallery: RetrievalConfig) -> Recalls:
    recalls: Recalls = {}
    for model in MODELS:
        encoder = load_encoder(checkpoint, model)
        numbers = measure(make_evaluator(gallery, encoder.setting), encoder)
        recalls[model] = {key: numbers[key] for key in DIRECTIONS}
    return recalls


def read_metrics(path: Path) -> TrainingRecords:
    """Read a run's metrics.jsonl."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return TrainingRecords(*([record for record in records if record["kind"] == kind] for kind in ("train", "eval")))


def _table(summary: dict[str, Any]) -> Table:
    chance = summary["chance_R@1"]
    table = Table("", "", "before", "after", "after / chance", title=f"R@1 among {summary['gallery']} held-out pairs")
    for model in MODELS:
        for key, direction in DIRECTIONS.items():
            before, after = summary["before"][model][key], summary["after"][model][key]
            table.add_row(model, direction, f"{before:.1%}", f"{after:.1%}", f"{after / chance:.0f} x")
        table.add_section()
    table.caption = f"chance: {chance:.1%}"
    return table


def learned(summary: dict[str, Any], required: float, console: Console) -> bool:
    """Print and return whether the student's R@1 is at least `required` times chance in both directions."""
    reached = float(min(summary["after"]["student"].values()) / summary["chance_R@1"])
    enough = reached >= required
    verdict = ("It learned", "green") if enough else ("It did not learn enough", "red")
    figures = f": the student is at {reached:.0f} times chance or more; {required:.0f} times were asked."
    console.print(Text.assemble("\n", verdict, figures))
    return enough


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0, 1 where the student did not learn, 2 where the run failed, 130 where it was interrupted.
    """
    parser = CommandParser(prog="python -m cosmos_scale.demo", description="Train a small COSMOS model.")
    parser.add_argument("--quick", action="store_true", help="a shortened run of about a minute")
    parser.add_argument("--out", type=path, default=Path("demo_out"), metavar="DIR", help="default: demo_out")
    arguments = parser.parse_args(argv)

    def demo() -> int:
        make_own_folder(arguments.out, MARK)
        return 0 if run_demo(arguments.out, arguments.quick) else 1

    return exit_status("demo", demo)


if __name__ == "__main__":
    leave_after(main)
