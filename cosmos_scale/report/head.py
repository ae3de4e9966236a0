"""The top of the report: of each run a verdict in one line, and its facts."""

import math
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Literal, NamedTuple

from cosmos_scale.report.code import last_code_of
from cosmos_scale.report.plots import HEADLINES, MODELS, numbers_of_models
from cosmos_scale.report.records import RunRecords, number_of
from cosmos_scale.report.series import rank_seconds, start_of, training_seconds
from cosmos_scale.run.logged import evaluator_of
from cosmos_scale.words import counted

HOUR = 3600.0


class Head(NamedTuple):
    """What stands at the top. tone: how the verdict is coloured. facts: names with their values."""

    verdict: str
    tone: Literal["good", "running", "warning"]
    facts: list[tuple[str, str]]


def head_of(run: RunRecords) -> Head:
    """Return the verdict on a run and its facts, as far as they are known."""
    state, tone = _state(run)
    sentences = [state, *_learning(run)]
    return Head("; ".join(sentences), tone, list(_facts(run)))


def _state(run: RunRecords) -> tuple[str, Literal["good", "running", "warning"]]:
    step, planned = run.last_step, run.last_planned_step
    of = f"step {step:,}" + (f" of {planned:,}" if planned else "")
    if run.running:
        left = _seconds_left(run)
        return f"In progress at {of}" + (f", about {span_in_words(left)} left" if left else ""), "running"
    if planned and step >= planned:
        return f"Finished: all {counted(planned, 'step')}", "good"
    if not run.train and not run.saved:
        return "Nothing recorded yet", "warning"
    lost = run.train and run.train[-1].get("loss", 0.0) is None
    if lost:
        return f"Ended at {of}, where the loss was not finite", "warning"
    if run.died:
        return f"Died at {of}: its launch ended without leaving the folder", "warning"
    asked = next((stop.get("reason") for stop in reversed(run.stops) if stop["step"] == step), None)
    by = f", asked for by {asked}" if asked else ""
    return f"Stopped at {of}{by}", "warning" if planned else "good"


def _seconds_left(run: RunRecords) -> float | None:
    planned = run.last_planned_step
    seconds = number_of(run.train[-1], "step_seconds_max") if run.train else None
    return (planned - run.last_step) * seconds if planned and seconds else None


def _learning(run: RunRecords) -> Iterator[str]:
    losses = [loss for record in run.train if (loss := number_of(record, "loss")) is not None]
    if len(losses) > 1:
        yield f"loss {losses[0]:.3g} \N{RIGHTWARDS ARROW} {losses[-1]:.3g}"
    seen = set()
    for record in reversed(run.evaluations):
        name, numbers = evaluator_of(record), numbers_of_models(record)
        if name in seen:
            continue
        seen.add(name)
        for key, title in HEADLINES.items():
            reached = {model: numbers[model][key] for model in MODELS if key in numbers.get(model, {})}
            if reached:
                best = max(reached, key=lambda model: reached[model])
                chance = numbers[best].get("chance_R@1", 0.0)
                times = f" ({reached[best] / chance:.0f} x chance)" if chance and key.endswith("R@1") else ""
                yield f"{name} {title} {100 * reached[best]:.1f} %{times}, {best}"
                break


def _facts(run: RunRecords) -> Iterator[tuple[str, str]]:
    yield "folder", str(run.folder.resolve())
    step = run.last_step
    if run.train or run.saved:
        planned = run.last_planned_step
        yield "steps", f"{step:,}" + (f" of {planned:,}" if planned else "")
        batch = run.global_batch
        if batch:
            yield "samples", f"{step * batch:,} ({batch:,} a step)"
    begun = start_of(run)
    if begun is not None:
        yield "began", moment(begun)
    ended = [at for record in run.train if (at := number_of(record, "time")) is not None]
    if ended:
        age = time.time() - max(ended)
        yield (
            "last record",
            f"{moment(max(ended))}" + (f", {span_in_words(age)} ago" if run.running and age > 0 else ""),
        )
        if begun is not None:
            # The clock may have been set while the run went on.
            recorded = number_of(run.train[-1], "wall_seconds") if run.train else None
            yield "wall time", span_in_words(max(0.0, max(ended) - begun) if recorded is None else recorded)
    seconds = training_seconds(run)
    if seconds:
        yield "in steps", span_in_words(seconds)
    if run.world_size is not None:
        yield "ranks", f"{run.world_size:,}"
        if spent := rank_seconds(run):
            kind = "rank-hours" if _device(run) in ("", "cpu") else "GPU-hours"
            yield f"{kind} in steps", f"{spent / HOUR:,.2f}"
    if device := _device(run):
        yield "device", device
    if run.train and (goodput := number_of(run.train[-1], "goodput")) is not None:
        yield "goodput", f"{100 * goodput:.1f} %"
    if code := last_code_of(run):
        yield "code", code
    if run.saved:
        newest = run.saved[-1]
        yield "newest checkpoint", f"{newest.folder.name}, {moment(newest.written)}"
        yield "versions", ", ".join(f"{name} {version}" for name, version in newest.versions.items())


def _device(run: RunRecords) -> str:
    for record in reversed(run.starts):
        if isinstance(device := record.get("device"), str):
            return device
    device = run.tree.get("device")
    return device if isinstance(device, str) and device != "auto" else ""


def moment(seconds: float) -> str:
    """Return a time since 1970 as a date in UTC, to the second; empty where it is none."""
    if math.isnan(seconds):
        return ""
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):  # a damaged record
        return ""


def span_in_words(seconds: float) -> str:
    """Return a span of time in the unit that suits it."""
    for unit, length in (("days", 24 * HOUR), ("h", HOUR), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
