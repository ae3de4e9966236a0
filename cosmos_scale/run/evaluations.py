"""A run's evaluations: each at its own steps and at the end, on both models; a failing one never ends the run."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from rich.table import Table

from cosmos_scale.config import EvaluatorConfig, RunConfig
from cosmos_scale.data.shards.index import SourceIndex
from cosmos_scale.data.shards.shared import describe_seen
from cosmos_scale.engine.ranks import gather_rows
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Report, Setting, no_report
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.together import EvaluationFailed, measure_together
from cosmos_scale.run.folder import evaluation_folder
from cosmos_scale.run.progress import Progress

GoesOn = Callable[[], None]
"""Tells the watchdog, on each rank, that an evaluation goes on: a long one may take longer than its limit."""


class RankPlace(Protocol):
    """A rank among all: one that runs, or one that a dry run supposes."""

    @property
    def rank(self) -> int:
        """The number of the rank."""

    @property
    def world_size(self) -> int:
        """The number of all ranks."""

    @property
    def device(self) -> torch.device:
        """What the rank computes on."""


class Evaluations:
    """The evaluators of a run that are due at some step, opened at the run's start."""

    def __init__(self, config: RunConfig, ranks: RankPlace, folder: Path, *, resumed: bool = False) -> None:
        """Open what the evaluators measure on; folder: the run's.

        Raises UserError where data is missing or wrong. A resumed run goes on without it: the evaluation opens its data
        when it is due, and fails where the data is still not there.
        """
        self._folder = folder
        self._told: Report = no_report
        self._setting = Setting.of_run(config, ranks.rank, ranks.world_size, ranks.device, self._report)
        self._evaluators: list[Evaluator] = []
        self._failures: Counter[str] = Counter()  # by evaluator, since the start of this process
        self.unopened: list[str] = []  # the names of those whose data a resumed run does without for now
        for section in config.eval:
            if section.every:
                try:
                    self._evaluators.append(make_evaluator(section, self._setting))
                except UserError as error:
                    if not resumed:
                        raise UserError(f"eval.{section.name}: {error}") from error
                    self._evaluators.append(_OpenedWhenDue(section, self._setting))
                    self.unopened.append(section.name)
                    said = f"eval.{section.name}: cannot be opened now, the next try is its next evaluation: {error}"
                    print(f"rank {ranks.rank}: {said}", file=sys.stderr)

    def galleries(self) -> dict[str, str]:
        """Return what each evaluator reads, by its name; empty for one whose data is not opened yet."""
        return {evaluator.name: evaluator.gallery() for evaluator in self._evaluators}

    def seen_in_training(self, trained: Sequence[SourceIndex]) -> dict[str, str]:
        """Return what to say of each evaluator that reads shards that the run trains on, by its name."""
        said = {evaluator.name: describe_seen(trained, evaluator.shard_files()) for evaluator in self._evaluators}
        return {name: text for name, text in said.items() if text}

    def same_data(self) -> dict[str, str]:
        """Return the rule that ranks with unequal galleries break, by the evaluator's name."""
        return {evaluator.name: evaluator.same_data() for evaluator in self._evaluators}

    def due(self, step: int) -> bool:
        """Whether anything is to be measured after a number of steps."""
        return bool(self._due(step))

    def run_due(self, step: int, student: Student, teacher: Teacher, progress: Progress, goes_on: GoesOn) -> None:
        """Measure what is due after a number of steps, and tell progress of numbers and failures; collective.

        goes_on: tells the watchdog that an evaluation goes on.
        """
        self._run(self._due(step), step, student, teacher, progress, goes_on)

    def run_all(self, step: int, student: Student, teacher: Teacher, progress: Progress, goes_on: GoesOn) -> None:
        """Measure everything at the run's end, as `run_due` does; collective."""
        self._run(self._evaluators, step, student, teacher, progress, goes_on)

    def run_missed(
        self,
        step: int,
        last_step: int,
        student: Student,
        teacher: Teacher,
        progress: Progress,
        goes_on: GoesOn,
    ) -> None:
        """Measure what is due at a resumed run's first step and has no record, as `run_due` does; collective.

        The step was saved before it was evaluated, and the launch that saved it was ended in between. What has failed
        at the last step is measured too: it is due at no later step.
        """
        due = self._evaluators if step == last_step else self._due(step)
        if not due:
            return
        measured = progress.evaluated_at(step)
        missed = []
        for evaluator in due:
            if evaluator.name in measured:
                if measured[evaluator.name] or step < last_step:
                    continue
                progress.say(
                    f"step {step}: evaluation {evaluator.name} failed in an earlier launch, and is tried again"
                )
            missed.append(evaluator)
        self._run(missed, step, student, teacher, progress, goes_on)

    def _run(
        self,
        evaluators: Sequence[Evaluator],
        step: int,
        student: Student,
        teacher: Teacher,
        progress: Progress,
        goes_on: GoesOn,
    ) -> None:
        for evaluator in evaluators:

            def told(work: str, done: int, total: int, name: str = evaluator.name) -> None:
                goes_on()
                progress.evaluating(f"{name}: {work}", done, total)

            self._told = told
            try:
                results = self._measure(evaluator, step, student, teacher)
                table = _table(evaluator, results, step)
            except EvaluationFailed as failure:
                self._failures[evaluator.name] += 1
                progress.evaluation_failed(step, evaluator.name, self._failures[evaluator.name], str(failure))
            else:
                progress.evaluation(step, evaluator, results, table)
            finally:
                self._told = no_report
                progress.evaluated()

    def _report(self, work: str, done: int, total: int) -> None:
        """What the evaluators report to: whoever listens at the time."""
        self._told(work, done, total)

    def _due(self, step: int) -> list[Evaluator]:
        return [evaluator for evaluator in self._evaluators if step % evaluator.every == 0]

    def _measure(self, evaluator: Evaluator, step: int, student: Student, teacher: Teacher) -> dict[str, Numbers]:
        results = {}
        for name, measured in (("student", student), ("teacher", teacher)):
            folder = evaluation_folder(self._folder, evaluator.name, step, name)
            with measured.whole_model() as model:
                results[name] = measure_together(evaluator, Encoder(model, self._setting), gather_rows, folder)
        return results


class _OpenedWhenDue(Evaluator):
    """An evaluator whose data was out of reach when its run resumed."""

    def __init__(self, config: EvaluatorConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._config = config
        self._opened: Evaluator | None = None

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Open the data, once, and measure; raises UserError where the data is missing or wrong."""
        if self._opened is None:
            self._opened = make_evaluator(self._config, self.setting)
        yield from self._opened.measure(encoder, gather, folder)

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """The table of the opened evaluator, which has measured the results."""
        return super().table(results, title) if self._opened is None else self._opened.table(results, title)


def _table(evaluator: Evaluator, results: dict[str, Numbers], step: int) -> Table:
    """Make the table of results, which are equal on all ranks, so that all ranks fail where it cannot be made."""
    try:
        return evaluator.table(results, f"step {step}: {evaluator.name}")
    except Exception as error:
        raise EvaluationFailed(f"its table cannot be made: {type(error).__name__}: {error}") from error
