"""A whole training step in one process: samples per second, and which part of the step takes how much of the time.

It calls the trainer's own `train_step` on batches of its own loader, which reads generated pictures from shards.
Student, teacher and loss are the trainer's too; after each of their calls a stopwatch cuts the step's time.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/step.py`

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import Batch
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.data.scenes.scenes import captions, draw_scene, render
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.training.loader import TrainLoader, default_workers
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.step import train_step

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "run"

PARTS = {
    "data": "wait for the loader, copy to the device",
    "student": "student forward",
    "teacher": "teacher forward",
    "loss": "both losses and their gradients to the features",
    "backward": "student backward from those gradients",
    "update": "AdamW, moving average, teacher refresh, flags",
}
"""The parts of a step, in the trainer's order. Only `data` comes last: it is the batch of the next step."""


class Case(NamedTuple):
    """A run to take steps of. steps: measured by default. write_shards: writes its shards, returns their folder."""

    title: str
    file: str
    overrides: tuple[str, ...]
    steps: int
    pictures: str
    write_shards: Callable[[Path], Path]


def demo_shards(folder: Path) -> Path:
    """Write the demo's shards and return their folder."""
    return build_scenes(folder, train=256, gallery=1).train


LARGE_SIDE = 512
LARGE_NOISE = 5.0  # grey levels: a smooth picture would decode faster than a photograph


def large_shards(folder: Path) -> Path:
    """Write shards of pictures as large as photographs: the demo's scenes, enlarged, with noise added."""
    (folder / "pictures").mkdir()
    lines = []
    for number in range(64):
        generator = np.random.default_rng(number)
        scene = draw_scene(generator)
        with Image.open(io.BytesIO(render(scene, generator).jpeg)) as small:
            pixels_HWC = np.asarray(small.resize((LARGE_SIDE, LARGE_SIDE), Image.Resampling.BICUBIC), np.float32)
        noisy_HWC = pixels_HWC + generator.normal(0.0, LARGE_NOISE, pixels_HWC.shape)
        name = f"{number}.jpg"
        Image.fromarray(noisy_HWC.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / name, quality=90)
        lines.append(json.dumps({"image": name, **captions(scene, generator)}) + "\n")
    captions_file = folder / "captions.jsonl"
    captions_file.write_text("".join(lines))
    return build_shards(
        folder / "pictures", captions_file, folder / "shards", samples_per_shard=len(lines), progress=False
    ).folder


CASES = {
    "demo": Case("the demo", "demo.yaml", (), 10, "pictures of 128 x 128", demo_shards),
    "vitb32": Case(
        "ViT-B/32, batch 8",
        "cc3m_vitb32.yaml",
        ("train.global_batch=8",),
        3,
        f"pictures of {LARGE_SIDE} x {LARGE_SIDE}",
        large_shards,
    ),
}


class Stopwatch:
    """Cuts a step's time into parts: a cut names the part that the time since the cut before belongs to.

    Where `cutting` is off only the whole step is timed: on a GPU each cut waits for the device, a step does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cutting = True
        self._began = self._last = 0.0
        self.parts: dict[str, float] = {}

    def start(self, *, cutting: bool) -> None:
        """Begin a step."""
        self._cutting = cutting
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._began = self._last = self._now()

    def cut(self, part: str) -> None:
        """End a piece of `part`."""
        if self._cutting:
            now = self._now()
            self.parts[part] += now - self._last
            self._last = now

    def stop(self) -> float:
        """Return the seconds since the start."""
        return self._now() - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Timed:
    """A student, teacher or loss; some of its calls end a part."""

    def __init__(self, inner: Any, watch: Stopwatch, **parts: str) -> None:
        """parts: the part that each method ends, by the method's name; `call` is a call of the object itself."""
        self._inner = inner
        self._watch = watch
        self._parts = parts

    def __call__(self, *arguments: Any) -> Any:
        """Call the object, then cut."""
        return self._timed(self._inner, self._parts["call"])(*arguments)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._timed(value, self._parts[name]) if name in self._parts else value

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            self._watch.cut(part)
            return result

        return timed


class Trainer:
    """Takes training steps while a watch runs."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.watch = Stopwatch(ranks.device)
        self.config = config
        self.pair = drawn_pair(config, ranks)
        # The teacher's refresh belongs to the update, which ends with the step.
        self.student: Any = Timed(self.pair.student, self.watch, call="student", backward="backward", update="update")
        self.teacher: Any = Timed(self.pair.teacher, self.watch, call="teacher")
        self.loss: Any = Timed(CosmosLoss(config.optimizer.gradient_scale), self.watch, call="loss")

    def step(self, batch: Batch) -> Tensor:
        """Train on a batch; returns the total loss, [] float32."""
        # Constants: a step takes the same time with any learning rate and momentum.
        lr, momentum = self.config.optimizer.lr, self.config.ema.momentum
        output = train_step(self.student, self.teacher, self.loss, batch, lr=lr, momentum=momentum)
        self.watch.cut("update")
        return output.total


class Measured(NamedTuple):
    """Seconds of whole steps, and of each part in each step that was cut."""

    steps: list[float]
    parts: dict[str, list[float]]

    def shares(self) -> dict[str, float]:
        """Each part's share of the time, from the medians of the parts: so the shares sum to 1."""
        medians = {part: statistics.median(seconds) for part, seconds in self.parts.items()}
        return {part: median / sum(medians.values()) for part, median in medians.items()}


def measure(config: RunConfig, ranks: Ranks, *, warmup: int, steps: int, label: str) -> Measured:
    """Time `steps` steps after `warmup` others."""
    loader = TrainLoader(
        config, open_sources(config.data.sources), Tokenizer(config.model.text.context_length), 0, ranks.world_size
    )
    trainer = Trainer(config, ranks)
    watch = trainer.watch
    on_gpu = ranks.device.type == "cuda"
    batches = loader.batches(0)
    batch = next(batches).to(ranks.device)
    measured = Measured([], {part: [] for part in PARTS})

    with progress_bar(label, warmup + steps, show=True) as advance:
        for number in range(warmup + steps):
            # On a GPU whole steps and cut steps take turns. On a CPU cuts cost nothing, so a step serves for both.
            for cutting in (False, True) if on_gpu else (True,):
                watch.start(cutting=cutting)
                total = trainer.step(batch)
                batch = next(batches).to(ranks.device)
                watch.cut("data")
                seconds = watch.stop()
                assert total.isfinite(), "a step whose loss is not finite changes nothing, and its time means nothing"
                if number < warmup:
                    continue
                if not (cutting and on_gpu):
                    measured.steps.append(seconds)
                if cutting:
                    for part in PARTS:
                        measured.parts[part].append(watch.parts[part])
            advance(1)
    trainer.pair.close()
    return measured


def figures(name: str, steps: int | None, ranks: Ranks) -> list[Figure]:
    """Measure one of the CASES."""
    case = CASES[name]
    workers = default_workers(ranks.world_size, ranks.device)
    # A deep queue, filled before the first measured step, would hide a loader that is slower than the step.
    overrides = [*case.overrides, f"data.workers={workers}", "data.prefetch=1"]
    if ranks.device.type == "cpu":
        overrides.append("precision=fp32")  # bf16 is far slower on most CPUs
    with tempfile.TemporaryDirectory() as folder:
        shards = case.write_shards(Path(folder))
        config = load_config(CONFIGS / case.file, [*overrides, f"data.sources.0.shards={shards}"])
        warmup = max(1, workers)  # until the queue is as full as it stays
        measured = measure(config, ranks, warmup=warmup, steps=steps or case.steps, label=case.title)

    setting = (
        f"{config.train.global_batch} samples a step, {case.pictures}, {config.precision}, ZeRO-{config.zero.stage}, "
        f"one process ({ranks.device.type}), loader processes: {workers}; median of {len(measured.steps)} steps "
        f"({min(measured.steps):.3g} to {max(measured.steps):.3g} s), warm-up steps: {warmup}"
    )
    rate = config.train.global_batch / statistics.median(measured.steps)
    speed = Figure(f"step_{name}_samples_per_second", rate, "samples/s", f"{case.title}: {setting}")
    shares = [
        Figure(f"step_{name}_share_{part}", share, "of the step", f"{case.title}: {PARTS[part]}")
        for part, share in measured.shares().items()
    ]
    return [speed, *shares]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    defaults = ", ".join(f"{case.steps} for {name}" for name, case in CASES.items())
    parser = argument_parser(
        "step", (__doc__ or "").partition("\n")[0], ("", "--model demo --steps 20 --json step.json")
    )
    parser.add_argument("--model", choices=[*CASES, "all"], default="all", help="default: all")
    parser.add_argument("--steps", type=int, metavar="N", help=f"measured steps; default: {defaults}")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} must be at least 1")
    ranks = start_ranks("auto")
    names = list(CASES) if arguments.model == "all" else [arguments.model]
    results = [figure for name in names for figure in figures(name, arguments.steps, ranks)]
    report("A training step", results, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
