"""What is read of the steps, a step late so that the host never waits for the device: metrics, and a bad loss."""

import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import NamedTuple

import torch
from rich.table import Table

from cosmos_scale.batch import Batch
from cosmos_scale.checkpoint.state import checkpoints, newest
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.ranks import Ranks, from_all, raise_together
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.evaluation.evaluator import Evaluator, Numbers
from cosmos_scale.profiling.throughput import RankWork, StepCounter, throughput
from cosmos_scale.run.folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, evaluation_folder, prepare_folder
from cosmos_scale.run.goodput import Goodput
from cosmos_scale.run.metrics import MetricLog, span
from cosmos_scale.step import StepOutput

# A rank is slow whose own time is this many times the median, and over it by this part of a step.
SLOW_TIMES, SLOW_PART = 1.5, 0.1
# fp16 skips some 30 steps at most until it has found its loss scale. Weights that have gone bad never recover.
MOST_SKIPPED_IN_A_ROW = 100


class _Figures(NamedTuple):
    """What is read of a step's output, as numbers: see StepOutput. scale, distill_scale: no logarithms."""

    finite: float
    features_finite: float
    loss: float
    clip: float
    distill: float
    scale: float
    distill_scale: float
    grad_norm: float


class _Measured(NamedTuple):
    """What a record holds beside the step's figures; seconds are means over the steps since the last record."""

    lr: float
    momentum: float
    steps: int
    step_seconds: float
    wait_seconds: float
    work: RankWork


class PendingStep:
    """A step whose figures are on their way to the host; measured is None where the step writes no record."""

    def __init__(self, step: int, output: StepOutput, measured: _Measured | None = None) -> None:
        self.step = step
        self.measured = measured
        self.substituted = int(output.substituted)  # on the host already
        self._forward = output.forward
        figures = [
            output.finite,
            output.features_finite,
            output.total,
            output.clip,
            output.distill,
            output.logit_scale[0].exp(),
            output.distill_logit_scale[0].exp(),
            output.gradient_norm,
        ]
        # From a GPU into pinned memory, in the order of its stream: no later step is waited for.
        self._copy = torch.stack([figure.detach().float() for figure in figures]).to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if output.total.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self, contact: Contact) -> _Figures:
        """Wait for the step, not for later ones, and return its figures; raises LostRank where it cannot end."""
        if self._copied is not None:
            contact.wait_for(self._copied.query)
        return _Figures(*self._copy.tolist())

    def forward_seconds(self) -> float:
        """Return the time of the student's forward; after `read`."""
        return self._forward.seconds()


class Progress:
    """Follows a run on every rank; the main rank writes. A context manager."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: Path,
        *,
        first_step: int,
        last_step: int,
        steps_per_epoch: int,
        skipped: int,
        finish_saving: Callable[[], object],
        substituted: int = 0,
    ) -> None:
        """skipped: steps before first_step whose update was skipped.

        substituted: samples over all ranks that were replaced in the steps before first_step which have no record yet.
        finish_saving: waits until the checkpoint under way is whole; collective.
        """
        self._config = config
        self._ranks = ranks
        self._folder = folder
        self._last_step = last_step
        self._finish_saving = finish_saving
        self._counter = StepCounter(config, ranks.device, ranks.world_size)
        self._goodput: Goodput | None = None
        self._log, error = None, None
        if ranks.is_main:
            try:
                self._goodput = Goodput(folder / METRICS_FILE, first_step, anew=config.resume == "never")
                self._log = MetricLog(
                    folder,
                    config.log,
                    name=config.name,
                    run_config=config.model_dump(mode="json"),
                    first_step=first_step,
                    last_step=last_step,
                    steps_per_epoch=steps_per_epoch,
                )
            except UserError as failure:
                error = failure
        raise_together(ranks, error)
        self._keeps_config = ranks.is_main and os.path.lexists(folder / CONFIG_FILE)
        self._stack = ExitStack()
        self._pending: PendingStep | None = None
        self._skipped = self._skipped_before = skipped  # in all launches; up to the last record
        self._skipped_in_a_row = 0
        # Of this rank, since the last record; the main rank has those of earlier launches, of whatever ranks.
        self._substituted = substituted if ranks.is_main else 0
        self._data_wait = 0.0
        self._forwards: list[float] = []  # seconds of each step since the last record
        self._first_step = self._step = first_step
        self._marked_step = first_step
        self._marked_time = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self._log is not None:
            self._stack.enter_context(self._log)
        self._marked_time = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._step > self._first_step:
            self._tell_goodput()
        self._stack.__exit__(kind, error, trace)

    def begin(self, text: str) -> None:
        """Say what starts, and write that it does, on the main rank."""
        if self._log is not None:
            self._log.say(text)
            device = self._ranks.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            self._log.started(self._ranks.world_size, name)

    def say(self, text: str) -> None:
        """Print a line, on the main rank."""
        if self._log is not None:
            self._log.say(text)

    def stopping(self, step: int, reason: str) -> None:
        """Say after which step the run stops and what asked for it, and write both, on the main rank.

        The time of the steps behind the last record goes with it, by this rank's clock.
        """
        if self._log is None or self._goodput is None:
            return
        if steps := step - self._marked_step:
            skipped = self._skipped - self._skipped_before
            self._goodput.add((time.perf_counter() - self._marked_time) * (1 - skipped / steps))
        self._log.say(f"stopping after step {step} of {self._last_step}: {reason}")
        self._log.stopped(step, reason, self._goodput.numbers())

    def after_step(
        self, step: int, output: StepOutput, batch: Batch, *, lr: float, momentum: float, wait_seconds: float
    ) -> None:
        """Note step number `step` (from 1) and read the one before it; collective.

        batch: this rank's share of it. wait_seconds: how long this rank waited for it.
        """
        self.read_pending()
        self._step = step
        self._data_wait += wait_seconds
        self._counter.note(batch)
        measured = None
        if step % self._config.log.every == 0 or step == self._last_step:
            now, steps = time.perf_counter(), step - self._marked_step
            means = (now - self._marked_time) / steps, self._data_wait / steps
            measured = _Measured(lr, momentum, steps, *means, self._counter.take())
            self._marked_time, self._marked_step, self._data_wait = now, step, 0.0
        self._pending = PendingStep(step, output, measured)

    def read_pending(self) -> None:
        """Read the last step noted; collective. Raises UserError on all ranks where its loss was not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        figures = pending.read(self._ranks.contact)
        self._substituted += pending.substituted
        self._forwards.append(pending.forward_seconds())
        self._skipped_in_a_row = 0 if figures.finite else self._skipped_in_a_row + 1
        if not figures.finite:
            self._not_finite(pending.step, figures)
        if pending.measured is not None:
            self._write(pending.step, figures, pending.measured)
        if self._log is not None:
            self._log.advance(pending.step)

    @property
    def skipped(self) -> int:
        """Steps of all launches that changed nothing."""
        return self._skipped

    def unrecorded_substitutes(self) -> int:
        """Return how many samples over all ranks were replaced since the last record; collective."""
        return sum(from_all(self._substituted, self._ranks))

    def evaluated_at(self, step: int) -> dict[str, bool]:
        """Return the evaluators that have a record of a step, by name: whether one is of numbers; collective."""
        return from_all({} if self._log is None else self._log.evaluated_at(step), self._ranks)[0]

    def evaluation(self, step: int, evaluator: Evaluator, results: dict[str, Numbers], table: Table) -> None:
        """Write and show an evaluator's numbers by model; its name stands before them where it is not its kind.

        Pictures that the evaluator has left in its folders go with them.
        """
        if self._log is not None:
            prefix = "" if evaluator.name == evaluator.kind else f"{evaluator.name}/"
            named = {f"{prefix}{model}": numbers for model, numbers in results.items()}
            folders = {
                f"{prefix}{model}": evaluation_folder(self._folder, evaluator.name, step, model) for model in results
            }
            self._log.evaluation(step, evaluator.name, named, table, folders)

    def evaluating(self, work: str, done: int, total: int) -> None:
        """Show how far the main rank is with its part of an evaluation."""
        if self._log is not None:
            self._log.working(work, done, total)

    def evaluated(self) -> None:
        """Show no evaluation any more."""
        if self._log is not None:
            self._log.worked()

    def evaluation_failed(self, step: int, name: str, failures: int, reason: str) -> None:
        """Write and show that an evaluator failed; failures: how often so far."""
        if self._log is not None:
            self._log.evaluation_failed(step, name, failures)
        self.say(f"step {step}: evaluation {name} failed, {failures} so far, and the run goes on: {reason}")

    @property
    def longest_end(self) -> float:
        """Seconds that the end of this rank's records may take where the library of a place does not answer."""
        return 0.0 if self._log is None else self._log.longest_end

    def pause(self) -> "_Pause":
        """Read all steps, so that a bad loss stops the run here; then a context whose time is not a step's."""
        self.read_pending()
        return _Pause(self)

    def forget(self, seconds: float) -> None:
        """Leave a span out of the step times."""
        self._marked_time += seconds

    def _write(self, step: int, figures: _Figures, measured: _Measured) -> None:
        forward, steps = sum(self._forwards) / len(self._forwards), len(self._forwards)
        times = (measured.step_seconds, measured.wait_seconds, forward)
        numbers = from_all((*times, self._substituted, socket.gethostname(), measured.work), self._ranks)
        self._substituted, self._forwards = 0, []
        skipped, self._skipped_before = self._skipped - self._skipped_before, self._skipped
        if self._log is None or self._goodput is None:
            return
        step_times, waits, forwards, substituted, hosts, work = zip(*numbers, strict=True)
        seconds, samples = measured.steps * max(step_times), measured.steps * self._config.train.global_batch
        # By this rank's clock: a span in which all were stopped would count twice where it falls into different steps.
        self._goodput.add((measured.steps - skipped) * measured.step_seconds)
        own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
        slowest = own.index(max(own))
        self._log.training(
            {
                "step": step,
                "samples": step * self._config.train.global_batch,
                "loss": figures.loss,
                "clip": figures.clip,
                "distill": figures.distill,
                "scale": figures.scale,
                "distill_scale": figures.distill_scale,
                "lr": measured.lr,
                "momentum": measured.momentum,
                "grad_norm": figures.grad_norm,
                **throughput(work, seconds, samples),
                "step_seconds_min": min(step_times),
                "step_seconds_max": max(step_times),
                "data_wait_min": min(waits),
                "data_wait_max": max(waits),
                "data_wait_rank": waits.index(max(waits)),
                "own_seconds_median": median_low(own),
                "own_seconds_max": own[slowest],
                "own_seconds_rank": slowest,
                "substituted": sum(substituted),
                "skipped_steps": self._skipped,
                **self._goodput.numbers(),
            }
        )
        self._keep_config()
        beyond = own[slowest] - median_low(own)
        compiled = step - steps > self._first_step  # the first record has the first step's compilation
        if compiled and own[slowest] > SLOW_TIMES * median_low(own) and beyond > SLOW_PART * max(step_times):
            self.say(
                f"slow at step {step}: rank {slowest} on host {hosts[slowest]}, data wait {waits[slowest]:.2f} s and "
                f"forward {forwards[slowest]:.2f} s a step; median of the ranks {median_low(own):.2f} s for both"
            )

    def _keep_config(self) -> None:
        """Write the run's config anew where it was deleted while the run goes on, and say so."""
        if not self._keeps_config or os.path.lexists(self._folder / CONFIG_FILE):
            return
        try:
            prepare_folder(self._config, self._folder)
            self.say(f"{self._folder / CONFIG_FILE}: was deleted, and is written anew")
        except UserError as failure:
            self._keeps_config = False  # told once
            self.say(f"{self._folder / CONFIG_FILE}: was deleted; {failure}")

    def _tell_goodput(self) -> None:
        """Say which share of the time since the run's first start went into steps that counted."""
        if self._goodput is None:
            return
        numbers = self._goodput.numbers()
        self.say(
            f"goodput {numbers['goodput']:.1%}: {span(numbers['useful_seconds'])} of useful steps in "
            f"{span(numbers['wall_seconds'])} since the run's first start"
        )

    def _not_finite(self, step: int, figures: _Figures) -> None:
        here = from_all(bool(figures.features_finite), self._ranks)
        bad = [rank for rank, finite in enumerate(here) if not finite]
        whose = f"features are not finite on rank {', '.join(map(str, bad))}" if bad else "all features are finite"
        values = f"clip {figures.clip}, distill {figures.distill}"
        part = "gradient" if math.isfinite(figures.loss) else "loss"
        what = f"step {step}: the {part} is not finite ({values}; {whose})"
        if self._config.non_finite == "skip":
            self._skipped += 1
            self.say(f"{what}; its update was skipped, {self._skipped} so far")
            if self._skipped_in_a_row < MOST_SKIPPED_IN_A_ROW:
                return
        unsaved = ""
        try:
            self._finish_saving()  # or a good checkpoint would not be named
        except UserError as failure:
            unsaved = f"; and {failure}"
        if self._config.non_finite == "stop":
            last = newest(self._folder / CHECKPOINTS)
            rule = "rule: non_finite: stop (skip goes on)"
            raise JointError(f"{what}; last good checkpoint: {last or 'none'}; {rule}{unsaved}")
        names = ", ".join(folder.name for folder in checkpoints(self._folder / CHECKPOINTS))
        raise JointError(
            f"{what}; no step of {MOST_SKIPPED_IN_A_ROW} in a row was; checkpoints: {names or 'none'}; rule: go on "
            f"from one before the weights went bad (resume=FOLDER) and with a lower optimizer.lr{unsaved}"
        )


class _Pause:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._progress.forget(time.perf_counter() - self._start)
