"""The training step at a number of samples: time, share of the peak, memory, host waits, parts, kernels by time."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.run.copy_stream import CopyStream
from cosmos_scale.step import StepOutput, train_step
from cosmos_scale.testing.batches import with_levels
from cosmos_scale.testing.needed_flops import step_flops
from cosmos_scale.testing.step_race import step_batch
from tools.gpu_stages.recorder import Recorder

BATCHES = 4  # whose captions have other lengths, as in a run
LR, MOMENTUM = 1e-4, 0.99
TINY = (
    *("model.vision.width=64", "model.vision.layers=2", "model.text.width=64", "model.text.layers=2"),
    *("model.text.heads=1", "model.embed_dim=64", "model.pooler_heads=1", "precision=fp32"),
)


class Setting(NamedTuple):
    """What a stage trains: a run of ViT-B/16, and its batches on the host, pinned where the device is a GPU."""

    config: RunConfig
    pair: Pair
    loss: CosmosLoss
    batches: list[Batch]

    def step(self, batch: Batch) -> StepOutput:
        """Train on a batch that lies on the device."""
        return train_step(*self.pair, self.loss, batch, lr=LR, momentum=MOMENTUM)


def measure(recorder: Recorder, samples: int, *overrides: str) -> None:
    """Write what a step of `samples` samples does; a rehearsal takes 2."""
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
        _kernels(recorder, setting, resident, samples)
    setting.pair.close()


def _setting(recorder: Recorder, samples: int, overrides: tuple[str, ...]) -> Setting:
    sizes = TINY if recorder.tiny else ()
    fixed = (f"train.global_batch={samples}", "train.schedule_steps=100000", f"device={recorder.device.type}")
    config = load_config(shipped_file("cc3m_vitb16"), [*fixed, *sizes, *overrides])
    pair, loss = (
        drawn_pair(config, start_ranks(config.device)),
        CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels),
    )
    batches = [with_levels(step_batch(config, seed)) for seed in range(BATCHES)]
    if recorder.on_gpu:
        batches = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
    return Setting(config, pair, loss, batches)


def _loops(recorder: Recorder, setting: Setting, resident: list[Batch], samples: int) -> None:
    """Write the time of steps whose batches lie on the device, and of steps that copy batches as a run does."""
    steps = 3 if recorder.tiny else 20
    tflop = statistics.mean(step_flops(batch, setting.config) for batch in setting.batches) / 1e12
    copies = CopyStream(recorder.device)
    for loop in ("batches on the device", "batches copied"):
        following = copies.bring(setting.batches[0])
        recorder.wait()
        began, host = time.perf_counter(), 0.0
        for number in range(steps):
            batch = resident[number % BATCHES] if loop == "batches on the device" else following
            launched = time.perf_counter()
            setting.step(batch)
            host += time.perf_counter() - launched
            if loop == "batches copied":
                following = copies.bring(setting.batches[(number + 1) % BATCHES])
        recorder.wait()
        seconds, peak = (time.perf_counter() - began) / steps, recorder.peak()
        recorder.write(
            loop=loop,
            step_ms=1e3 * seconds,
            host_ms=1e3 * host / steps,
            samples_per_s=samples / seconds,
            needed_tflop=tflop,
            mfu=None if peak is None else tflop * 1e12 / seconds / peak,
        )


def _memory_and_waits(recorder: Recorder, setting: Setting, resident: list[Batch]) -> None:
    """Write the peak of memory, and each place where the host waits for the device in a step."""
    torch.cuda.reset_peak_memory_stats()
    setting.step(resident[0])
    recorder.wait()
    recorder.write(
        what="memory of a step",
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        reserved_gb=torch.cuda.memory_reserved() / 1e9,
        retries=torch.cuda.memory_stats()["num_alloc_retries"],
    )
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setting.step(resident[1])
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    )
    recorder.write(what="host waits in a step", places=places.most_common(20))


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


def _kernels(recorder: Recorder, setting: Setting, resident: list[Batch], samples: int) -> None:
    """Write how many kernels a step launches, how long any of them runs, and the kernels by time; keep a trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        setting.step(resident[2])
        recorder.wait()
    calls: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    spans = []
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            calls[event.name] += 1
            spent[event.name] += round(event.time_range.elapsed_us())
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
        by_time=[(name[:90], calls[name], us / 1e3) for name, us in spent.most_common(40)],
    )
    recorded.export_chrome_trace(str(recorder.out / f"trace_{samples}.json.gz"))


def of(samples: int, *overrides: str) -> Callable[[Recorder], None]:
    """Return the stage of so many samples."""
    return lambda recorder: measure(recorder, samples, *overrides)
