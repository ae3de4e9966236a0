"""Profiling: steps of a run, measured and traced. `cosmos-scale profile`, or `deepspeed --module cosmos_scale.profile`.

The steps are the trainer's own, with its loader and lookahead, from freshly drawn weights. Nothing is written but the
profile's folder: no checkpoint, no metrics, and no lock on the run's folder.
"""

# Before the imports below: they take seconds, and the command sets variables that torch reads when it is imported.
if __name__ == "__main__":
    import os
    import sys
    from functools import partial

    # Started as a file, as by `torchrun cosmos_scale/profile.py`, its folder comes first on the path; there it would
    # itself hide Python's `profile`, which torch imports.
    if not __package__:
        _folder = os.path.dirname(os.path.realpath(__file__))
        sys.path[:] = [os.path.dirname(_folder), *(path for path in sys.path if os.path.realpath(path) != _folder)]

    from cosmos_scale.import_path import libraries_first

    libraries_first()

    from cosmos_scale.interrupt import refuse_to_import, tell_interrupts

    tell_interrupts("cosmos-scale profile")
    refuse_to_import("cosmos-scale profile")

    from cosmos_scale.cli.leave import leave_after
    from cosmos_scale.cli.main import main

    leave_after(partial(main, ["profile", *sys.argv[1:]]))

import gzip
import math
import pickle
import time
from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import different_between_hosts
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.engine.memory import between_steps, state_memory, total_bytes
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import Ranks, from_all, raise_together
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.files import make_output_folder, replace_file
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.phases import phase
from cosmos_scale.profiling.loader_times import time_loader
from cosmos_scale.profiling.rank_profile import RankProfile, device_name, host_name, read_gpu_memory, read_traces
from cosmos_scale.profiling.recording import record_steps
from cosmos_scale.profiling.step_clock import StepClock
from cosmos_scale.profiling.throughput import RankWork, StepCounter
from cosmos_scale.run.lookahead import Lookahead
from cosmos_scale.run.opening import Opening
from cosmos_scale.run.progress import PendingStep
from cosmos_scale.run.stop_request import StopRequest
from cosmos_scale.run.watchdog import Watchdog
from cosmos_scale.step import train_step
from cosmos_scale.words import counted

LOOKED_FOR = ("device", "data", "shards", "captions", "pictures", "loaders")
"""What a profile needs of all that a run looks for (`Opening.looks`)."""
TRACED, DETAILED, UNREAD = 3, 1, 1  # steps with a trace, with a detailed one, and before each of both, not read
SNAPSHOT_ENTRIES = 200_000


class ProfilePlan(NamedTuple):
    """How a run is profiled.

    steps: with marks, and as many without. warm_up: steps before them. folder: what is written goes there. trace: keep
    each rank's trace. memory: write a snapshot of torch's allocator too, on GPUs.
    """

    steps: int
    warm_up: int
    folder: Path
    trace: bool
    memory: bool

    def trace_file(self, rank: int) -> str:
        """Return the name of a rank's trace."""
        return f"trace.rank{rank}.json.gz"

    def memory_file(self, rank: int) -> str:
        """Return the name of a rank's memory snapshot."""
        return f"memory.rank{rank}.pickle"

    def files(self, ranks: int) -> list[str]:
        """Return the names of what is written beside the profile itself."""
        traces = [self.trace_file(rank) for rank in range(ranks) if self.trace]
        return traces + [self.memory_file(rank) for rank in range(ranks) if self.memory]

    @property
    def all_steps(self) -> int:
        """Steps from the first to the last."""
        return self.warm_up + 2 * self.steps + TRACED + DETAILED + 2 * UNREAD + self.memory


class ProfiledRun:
    """A run whose steps are taken one by one. `take` is collective, as a step is."""

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopRequest, watchdog: Watchdog, steps: int) -> None:
        """Open, build and start to load, for so many steps; collective. Raises UserError on all ranks alike."""
        self._config, self._ranks, self._watchdog = config, ranks, watchdog
        opening = _open(config, ranks)
        self.loader = TrainLoader(
            config, opening.index, opening.tokenizer, ranks.rank, ranks.world_size, device=ranks.device
        )
        self._total_steps = config.total_steps(steps_per_epoch(opening.index.epoch_samples, config))
        self._pair: Pair = drawn_pair(config, ranks)
        self._loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
        self._pending: PendingStep | None = None
        self._done = 0
        self._counter = StepCounter(config, ranks.device, ranks.world_size)
        self._ahead = Lookahead(
            self.loader, ranks, stop, _say_nothing, first=0, last=steps, unsaved=_never, enter=watchdog.enter
        )

    def take(self) -> None:
        """Take the next step as the trainer does. Raises UserError on all ranks where there is none any more."""
        fetched = next(self._ahead, None)
        if fetched is None:
            raise self._ahead.failure or JointError(
                f"stopped after {counted(self._done, 'step')}: {self._ahead.stopped_by}"
            )
        batch, step = fetched.batch, min(self._done, self._total_steps - 1)
        output = train_step(
            *self._pair,
            self._loss,
            batch,
            lr=learning_rate(step, self._config.optimizer, self._total_steps),
            momentum=ema_momentum(step, self._config.ema, self._total_steps),
        )
        self._done += 1
        with phase("figures"):
            self._read_pending()
            self._pending = PendingStep(self._done, output)
            self._counter.note(batch)
            self._watchdog.step_done()

    def settle(self) -> None:
        """Wait for all that the steps have begun, the teacher's refresh too."""
        self._read_pending()
        _ = self._pair.teacher.model  # waits for the refresh

    def end(self) -> RankWork:
        """Wait for the last step, and free the engine; returns what all steps did."""
        self.settle()
        self._pair.close()
        return self._counter.take()

    def _read_pending(self) -> None:
        if self._pending is not None:
            self._pending.read(self._ranks.contact)
        self._pending = None


def profile(
    config: RunConfig, ranks: Ranks, stop: StopRequest, watchdog: Watchdog, plan: ProfilePlan
) -> tuple[RankProfile, int]:
    """Profile a run; returns what this rank has measured, and its loader processes. Collective.

    Raises UserError on all ranks alike.
    """
    _make_folder(plan, ranks)
    on_gpu = ranks.device.type == "cuda"
    run = ProfiledRun(config, ranks, stop, watchdog, plan.all_steps)
    for _ in range(plan.warm_up):
        run.take()
    clock, plain = StepClock(on_gpu=on_gpu), []
    for number in range(plan.steps):
        for marked in (number % 2 == 0, number % 2 == 1):  # in turns, so that neither is always the later one
            if marked:
                clock.measure(run.take)
            else:
                start = time.perf_counter()
                run.take()
                plain.append(1e3 * (time.perf_counter() - start))
    memory = read_gpu_memory(ranks.device)
    trace = record_steps(run.take, run.settle, TRACED, on_gpu=on_gpu, skip=UNREAD)
    detailed = record_steps(run.take, run.settle, DETAILED, on_gpu=on_gpu, skip=UNREAD, detailed=True)
    snapshot = _memory_snapshot(run) if plan.memory else None
    work, states = run.end(), _state_bytes(config, ranks)
    _write_files(plan, ranks, trace.file, snapshot)
    unread = plan.all_steps + run.loader.workers * config.data.prefetch  # so that no file is in the cache for that
    measured = RankProfile(
        host=host_name(),
        device=device_name(ranks.device),
        measured=clock.steps(),
        plain_ms=plain,
        marks_ms=clock.marks_ms(),
        flops=work.needed / plan.all_steps,
        executed=work.executed / plan.all_steps,
        peak_flops=None if math.isnan(work.peak) else work.peak,
        traced=read_traces(trace.trace, detailed.trace, world_size=ranks.world_size, found=states),
        loader=time_loader(
            lambda number: run.loader.make_here(unread + number), config.samples_per_rank(ranks.world_size)
        ),
        gpu_memory=memory,
        planned_states=states,
    )
    return measured, run.loader.workers


def _open(config: RunConfig, ranks: Ranks) -> Opening:
    """Look for what a profile needs; collective."""
    opening, error = Opening(config, ranks), None
    try:
        for look in opening.looks():
            if look.name in LOOKED_FOR:
                look.find()
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    seen = from_all((config, opening.index.fingerprint()), ranks)
    for rank, (other, index) in enumerate(seen):
        if different := different_between_hosts(seen[0][0], other):
            raise JointError(f"rank {rank} and rank 0 differ in {', '.join(different)}; rule: all ranks share all keys")
        if index != seen[0][1]:
            raise JointError(f"data.sources: rank {rank} and rank 0 see different indexes; rule: all hosts share one")
    return opening


def _make_folder(plan: ProfilePlan, ranks: Ranks) -> None:
    """Refuse what cannot be written before any work; collective."""
    error = None
    try:
        if plan.memory and ranks.device.type != "cuda":
            raise UserError("--memory: torch records the memory of GPUs alone, and this run computes on CPUs")
        if ranks.is_main:
            make_output_folder(plan.folder)
    except UserError as failure:
        error = failure
    raise_together(ranks, error)


def _memory_snapshot(run: ProfiledRun) -> bytes:
    """Take a step, and return what torch's allocator did in it, as pytorch.org/memory_viz reads it."""
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    run.take()
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    return pickle.dumps(snapshot)


def _write_files(plan: ProfilePlan, ranks: Ranks, trace: bytes, snapshot: bytes | None) -> None:
    """Write what is kept of this rank, after all steps: a rank that cannot write would keep the others; collective."""
    error = None
    try:
        if plan.trace:
            replace_file(plan.folder / plan.trace_file(ranks.rank), gzip.compress(trace, compresslevel=5))
        if snapshot is not None:
            replace_file(plan.folder / plan.memory_file(ranks.rank), snapshot)
    except UserError as failure:
        error = failure
    raise_together(ranks, error)


def _state_bytes(config: RunConfig, ranks: Ranks) -> int:
    """Return the bytes that a step finds on its device by formula. Where that is the host, what is offloaded counts."""
    with torch.device("meta"):
        model = CosmosModel(config.model)
    rows = between_steps(state_memory(model, config, ranks.world_size), config)
    return total_bytes(rows, on_host=False if ranks.device.type == "cuda" else None)


def _say_nothing(text: str) -> None:
    """Lost shards are no part of a profile."""


def _never() -> bool:
    return False
