"""The training step at a number of samples: time, share of the peak, memory, host waits, parts, kernels by time."""

import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.profiling.flops import step_flops
from cosmos_scale.run.copy_stream import CopyStream
from cosmos_scale.run.progress import Progress
from cosmos_scale.step import StepOutput, train_step
from cosmos_scale.testing.batches import with_levels
from cosmos_scale.testing.step_race import step_batch
from tools.gpu_stages.recorder import Recorder

LOOPS = ("batches on the device", "batches copied", "as a run does")
BATCHES = 4  # whose captions have other lengths, as in a run
LR, MOMENTUM = 1e-4, 0.99
TINY = (
    *("model.vision.width=64", "model.vision.layers=2", "model.text.width=64", "model.text.layers=2"),
    *("model.text.heads=1", "model.embed_dim=64", "model.pooler_heads=1", "precision=fp32"),
)


class Setting(NamedTuple):
    """What a stage trains: a run of ViT-B/16, and its batches on the host, pinned where the device is a GPU."""

    config: RunConfig
    ranks: Ranks
    pair: Pair
    loss: CosmosLoss
    batches: list[Batch]

    def step(self, batch: Batch) -> StepOutput:
        """Train on a batch that lies on the device."""
        return train_step(*self.pair, self.loss, batch, lr=LR, momentum=MOMENTUM)


def measure(recorder: Recorder, samples: int, *overrides: str) -> None:
    """Write what a step of `samples` samples does; a rehearsal takes 2. A trace is kept of the shipped run alone."""
    samples = 2 if recorder.tiny else samples
    setting = _setting(recorder, samples, overrides)
    began = time.perf_counter()
    first = setting.step(setting.batches[0].to(recorder.device))
    recorder.wait()
    recorder.write(
        what="first step", took_s=time.perf_counter() - began, loss=first.total.item(), finite=bool(first.finite.item())
    )
    resident = [batch.to(recorder.device) for batch in setting.batches]
    losses = [setting.step(resident[0]).total for _ in range(2 if recorder.tiny else 6)]
    recorder.write(what="losses on one batch", losses=[round(loss.item(), 4) for loss in losses])
    _loops(recorder, setting, resident, samples)
    if recorder.on_gpu:
        _memory_and_waits(recorder, setting, resident)
    _parts(recorder, setting, resident)
    if recorder.on_gpu:
        _kernels(recorder, setting, resident, keep_trace=not overrides)
    setting.pair.close()


def _setting(recorder: Recorder, samples: int, overrides: tuple[str, ...]) -> Setting:
    sizes = TINY if recorder.tiny else ()
    fixed: tuple[str, ...] = (
        f"train.global_batch={samples}",
        "train.schedule_steps=100000",
        f"device={recorder.device.type}",
    )
    fixed += ("log.progress=false", "log.every=10")
    config = load_config(shipped_file("cc3m_vitb16"), [*fixed, *sizes, *overrides])
    ranks = start_ranks(config.device)
    pair, loss = (
        drawn_pair(config, ranks),
        CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels),
    )
    batches = [with_levels(step_batch(config, seed)) for seed in range(BATCHES)]
    if recorder.on_gpu:
        batches = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
    return Setting(config, ranks, pair, loss, batches)


def _loops(recorder: Recorder, setting: Setting, resident: list[Batch], samples: int) -> None:
    """Write the time of steps by LOOPS: the second copies batches beside the steps, the last also reads figures late.

    The host's time is that of a step alone, which begins with an idle device: in a row of steps the host waits in
    launches as soon as a thousand are queued.
    """
    steps = 3 if recorder.tiny else 20
    tflop = statistics.mean(step_flops(batch, setting.config) for batch in setting.batches) / 1e12
    host = []
    for number in range(steps):
        recorder.wait()
        launched = time.perf_counter()
        setting.step(resident[number % BATCHES])
        host.append(1e3 * (time.perf_counter() - launched))
    for loop in LOOPS:
        with _loop(recorder, setting, resident, steps, loop) as run:
            recorder.wait()
            began = time.perf_counter()
            run()
            recorder.wait()
            seconds, peak = (time.perf_counter() - began) / steps, recorder.peak()
        recorder.write(
            loop=loop,
            step_ms=1e3 * seconds,
            host_ms=statistics.median(host),
            samples_per_s=samples / seconds,
            needed_tflop=tflop,
            mfu=None if peak is None else tflop * 1e12 / seconds / peak,
        )


@contextmanager
def _loop(
    recorder: Recorder, setting: Setting, resident: list[Batch], steps: int, loop: str
) -> Iterator[Callable[[], None]]:
    """Yield a call that trains so many steps in one of LOOPS."""
    copies = CopyStream(recorder.device)
    following = copies.bring(setting.batches[0])
    with tempfile.TemporaryDirectory() as folder:
        bounds = {"first_step": 0, "last_step": steps, "steps_per_epoch": steps, "skipped": 0}
        with Progress(setting.config, setting.ranks, Path(folder), **bounds, finish_saving=lambda: None) as progress:

            def run() -> None:
                nonlocal following
                for number in range(steps):
                    if loop == "batches on the device":
                        setting.step(resident[number % BATCHES])
                        continue
                    batch, output = following, setting.step(following)
                    following = copies.bring(setting.batches[(number + 1) % BATCHES])
                    if loop == "as a run does":
                        progress.after_step(number + 1, output, batch, lr=LR, momentum=MOMENTUM, wait_seconds=0.0)

            yield run
            progress.read_pending()


def _memory_and_waits(recorder: Recorder, setting: Setting, resident: list[Batch]) -> None:
    """Write the peak of memory, and each place where the host waits for the device in steps as a run does them."""
    torch.cuda.reset_peak_memory_stats()
    setting.step(resident[0])
    recorder.wait()
    recorder.write(
        what="memory of a step",
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        reserved_gb=torch.cuda.memory_reserved() / 1e9,
        retries=torch.cuda.memory_stats()["num_alloc_retries"],
    )
    steps = 3
    with _loop(recorder, setting, resident, steps, LOOPS[-1]) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    )
    recorder.write(what="host waits in steps of a run", steps=steps, places=places.most_common(20))


def _parts(recorder: Recorder, setting: Setting, resident: list[Batch]) -> None:
    """Write the time of each part of the step, the device idle between them: together more than a step's time."""
    student, teacher = setting.pair
    spent: dict[str, list[float]] = {}
    for number in range(2 if recorder.tiny else 6):
        batch = resident[number % BATCHES]
        recorder.wait()
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            recorder.wait()
            times.append(time.perf_counter())

        features = student(batch)
        lap()
        taught = teacher(batch)
        lap()
        loss = setting.loss(student.with_full_scales(features), taught)
        lap()
        student.backward(batch, features, loss.gradients)
        lap()
        student.update(lr=LR, momentum=MOMENTUM, finite=loss.finite)
        teacher.refresh()
        lap()
        names = ("student", "teacher", "loss", "backward", "update")
        for name, (before, after) in zip(names, pairwise(times), strict=True):
            spent.setdefault(name, []).append(1e3 * (after - before))
    recorder.write(what="parts", parts_ms={name: round(statistics.median(of), 3) for name, of in spent.items()})


def _kernels(recorder: Recorder, setting: Setting, resident: list[Batch], *, keep_trace: bool) -> None:
    """Write how many kernels a step launches, how long any of them runs, and the kernels by time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        setting.step(resident[2])
        recorder.wait()
    calls: Counter[str] = Counter()
    spent: dict[str, float] = {}
    spans = []
    for event in recorded.events():
        # A mark of the host's, such as the optimizer's step, spans all kernels that were launched inside it.
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            calls[event.name] += 1
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
    spans.sort()
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    recorder.write(
        what="kernels",
        launches=len(spans),
        busy_ms=busy / 1e3,
        span_ms=(spans[-1][1] - spans[0][0]) / 1e3,
        by_time=[(name[:90], calls[name], spent[name] / 1e3) for name in sorted(spent, key=spent.__getitem__)[:-41:-1]],
    )
    if keep_trace:
        recorded.export_chrome_trace(str(recorder.out / f"trace_{recorder.stage}.json.gz"))


def of(samples: int, *overrides: str, on_gpu: Sequence[str] = ()) -> Callable[[Recorder], None]:
    """Return the stage of so many samples. on_gpu: overrides that a CPU cannot run: a rehearsal goes without them."""
    return lambda recorder: measure(recorder, samples, *overrides, *(on_gpu if recorder.on_gpu else ()))
