"""What has changed since the checkpoint that a run goes on from: it is told at the start, and refuses nothing."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cosmos_scale.checkpoint.resume import Start
from cosmos_scale.checkpoint.room import superfluous
from cosmos_scale.checkpoint.state import RunState, checkpoints
from cosmos_scale.config import EvaluatorConfig, RunConfig
from cosmos_scale.config.compare import Difference
from cosmos_scale.config.evaluation import in_new_form
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.mark import marks_digest
from cosmos_scale.run.folder import CHECKPOINTS, METRICS_FILE
from cosmos_scale.run.logged import evaluator_of, records_of
from cosmos_scale.words import counted

OTHER_SHARDS = (
    "the shards have the names, sizes and counts of those that this run has trained on, but begin with other bytes: "
    "they were written anew"
)

_NAMED = 4  # checkpoints in one line
_NUMBERS_STAY = {"name", "every", "batch", "confusions", "per_class", "overlays"}
# What these keys lead to is in the words of `Evaluator.gallery`, by which a set that was moved is still the same.
_PLACES = {"dataset", "data", "shards", "index", "images", "masks"}
_IN_GALLERY = _PLACES | {"captions", "classes", "names", "templates", "max_samples", "split"}


def changed_since(
    config: RunConfig, folder: Path, start: Start, index: MergedIndex | None, galleries: Mapping[str, str]
) -> list[str]:
    """Return a line each on what is not as the start's checkpoint knows it; none for a new run.

    folder: the run's. index: of the training shards, None where a dry run has none. galleries: what each evaluator
    reads, as `Evaluations.galleries` says it.
    """
    state = start.state
    if start.checkpoint is None or state is None or state.step == 0:
        return []
    written = RunConfig.model_validate(in_new_form(state.config))
    # Records of later steps are dropped.
    records = [
        record
        for record in records_of(folder / METRICS_FILE)
        if isinstance(step := record.get("step"), int) and step <= state.step
    ]
    found = list(_kept_no_longer(written, config, folder / CHECKPOINTS))
    if index is not None and _shards_written_anew(state, index):
        found.append(OTHER_SHARDS)
    # The records of a run that goes on from another run's checkpoint begin with it.
    if os.path.realpath(start.checkpoint.parent) == os.path.realpath(folder / CHECKPOINTS):
        last = max((int(record["step"]) for record in records), default=-1)  # a run's first start is a record of step 0
        if last < state.step - state.step % written.log.every:
            steps = f"steps {max(last, 0) + 1}-{state.step}, which this run has taken"
            found.append(
                f"{folder / METRICS_FILE}: has no record of {steps}: it was deleted or cut, and curves lack them"
            )
    measured = {evaluator_of(record) for record in records if record.get("kind") == "eval"}
    before = {section.name: section for section in written.eval if section.name in measured}
    for section in config.eval:
        if section.every and section.name in measured:
            known = state.galleries.get(section.name, ""), galleries.get(section.name, "")
            # The checkpoint's own config may be of a launch without this evaluator; its galleries are of all before.
            old = before.get(section.name)
            others = _other_gallery(section, *known) if old is None else _other_measurement(old, section, *known)
            if what := "; ".join(others):
                found.append(
                    f"eval.{section.name}: {what}; from here on its numbers are of what is now, in the series of "
                    "before; another name begins a series of its own"
                )
    return found


def _kept_no_longer(written: RunConfig, config: RunConfig, root: Path) -> Iterator[str]:
    """Yield which checkpoints under root go that the former `checkpoint` section would have kept."""
    then, now = written.checkpoint, config.checkpoint
    kept_so_far = set(checkpoints(root)) - set(superfluous(root, then, then.keep_last))
    if going := [folder for folder in superfluous(root, now, now.keep_last) if folder in kept_so_far]:
        keys = ("keep_last", "keep_every")
        changed = (Difference(f"checkpoint.{key}", getattr(then, key), getattr(now, key)) for key in keys)
        yield (
            f"{' and '.join(str(one) for one in changed if one.one != one.other)}: {_named(going)} will be deleted "
            f"once the next checkpoint is whole; rule: chmod a-w keeps a checkpoint's folder for good"
        )


def _named(going: Sequence[Path]) -> str:
    if len(going) <= _NAMED:
        return ", ".join(folder.name for folder in going)
    return f"{counted(len(going), 'checkpoint')}, {going[0].name} to {going[-1].name},"


def _shards_written_anew(state: RunState, index: MergedIndex) -> bool:
    """Whether the shards begin with other bytes than those that a checkpoint's run has trained on."""
    now = marks_digest(file.mark for file in index.shard_files())
    return bool(state.marks and now) and state.marks != now


def _other_measurement(old: EvaluatorConfig, new: EvaluatorConfig, gallery: str, gallery_now: str) -> Iterator[str]:
    """Yield what an evaluator measures on, or how, that it did not before; galleries: empty where one is not known."""
    known = bool(gallery and gallery_now)
    if old.kind != new.kind or (known and gallery != gallery_now):
        yield f"{_in_words(new, gallery_now)}, was {_in_words(old, gallery)}"
    if old.kind != new.kind:
        return
    then, now = (section.model_dump(mode="json") for section in (old, new))  # without the secrets of URLs
    for key in then:
        if then[key] != now[key] and key not in _NUMBERS_STAY and not (known and key in _IN_GALLERY):
            yield str(Difference(key, then[key], now[key]))


def _other_gallery(new: EvaluatorConfig, gallery: str, gallery_now: str) -> Iterator[str]:
    """Yield what an evaluator measures on, if it is not the gallery that is all that is known of it from before."""
    if gallery and gallery_now and gallery != gallery_now:
        yield f"{_in_words(new, gallery_now)}, was on {gallery}"


def _in_words(section: EvaluatorConfig, gallery: str) -> str:
    return f"{section.describe()} ({gallery})" if gallery else section.describe()
