"""The start of a run: data opened, the checkpoint to go on from found, ranks agreed, student and teacher built."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from cosmos_scale.checkpoint.files import BrokenCheckpoint, GoneCheckpoint
from cosmos_scale.checkpoint.initial import InitialWeights, open_chosen, open_initial
from cosmos_scale.checkpoint.resume import PassedOver, Start, find_start, set_aside
from cosmos_scale.checkpoint.state import MOST_TRIES
from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import different_between_hosts
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.mark import marks_digest
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.engine.pair import Pair, drawn_pair, initial_pair
from cosmos_scale.engine.ranks import Ranks, from_all, raise_together
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.evaluation.evaluator import DIFFERENT_DATA
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.run.evaluations import Evaluations
from cosmos_scale.run.folder import CHECKPOINTS, prepare_folder
from cosmos_scale.run.lock import (
    LAUNCH_TOKEN,
    LOCK_FILE,
    RANKS_LOCK_FILE,
    RunLock,
    hold_linked,
    launcher_holds,
    token_in,
    wait_for_ranks,
)
from cosmos_scale.run.old_run import keep_old_run
from cosmos_scale.run.opening import Opening
from cosmos_scale.words import counted

SEEN_WITHIN = 60.0  # seconds in which a file of rank 0 must be seen by all ranks
POLL = 0.1  # seconds between looks for it
SAME_CHECKPOINT = "rule: all ranks read one shared folder, or equal copies of it"

Value = TypeVar("Value")

_say = partial(print, flush=True)


@dataclass(frozen=True)
class Opened:
    """What a run reads, and where it is to start: the same on every rank. `build_pair` may find an older start.

    galleries: what each evaluator reads, in words, by its name. initial: the weights that a new run starts from, None
    where it draws them or resumes. held: a context at whose end the main rank gives its locks on the folder back.
    """

    folder: Path
    index: MergedIndex
    tokenizer: Tokenizer
    evaluations: Evaluations
    galleries: dict[str, str]
    found_start: Start
    initial: InitialWeights | None
    held: ExitStack

    @property
    def marks(self) -> str:
        """A digest of all shards' marks, which differs where shards were written anew; empty where one lacks."""
        return marks_digest(file.mark for file in self.index.shard_files())


def open_run(config: RunConfig, ranks: Ranks) -> Opened:
    """Look for everything that a run needs, before anything is built; collective.

    Raises UserError on all ranks alike: what this machine cannot compute, data that is missing, a start that cannot be,
    a folder that cannot be written to or that another launch holds, ranks that do not see the same keys and files.
    """
    opened, error = None, None
    try:
        opening = Opening(config, ranks)
        if ranks.is_main:  # before the newest checkpoint is looked for: it may be theirs
            wait_for_ranks(opening.folder, _say)
        for look in opening.looks():
            look.find()
        opened = Opened(
            opening.folder,
            opening.index,
            opening.tokenizer,
            opening.evaluations,
            opening.evaluations.galleries(),
            opening.start,
            opening.initial,
            ExitStack(),
        )
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    assert opened is not None
    opened = _of_one_run(config, opened, ranks)
    if opened.initial is not None:
        opened = replace(opened, initial=with_agreed_weights(config, opened.initial, ranks, lambda initial: initial))
    _prepare_folder(config, opened, ranks)
    return opened


def _prepare_folder(config: RunConfig, opened: Opened, ranks: Ranks) -> None:
    """Take the locks on the run's folder and leave its config.yaml there, once nothing refuses the run; collective."""
    error, token = None, os.environ.get(LAUNCH_TOKEN)
    try:
        if ranks.is_main:
            try:
                if not launcher_holds(opened.folder):
                    token = opened.held.enter_context(RunLock(opened.folder, _say)).token
                opened.held.enter_context(RunLock(opened.folder, _say, file=RANKS_LOCK_FILE))
                hold_linked(opened.folder / CHECKPOINTS, opened.held, _say)
                if opened.found_start.state is None:
                    last_step = config.last_step(steps_per_epoch(opened.index.epoch_samples, config))
                    if kept := keep_old_run(config, opened.folder, last_step):
                        _say(kept)
                prepare_folder(config, opened.folder)
            except UserError as failure:
                error = failure
        raise_together(ranks, error)
        raise_together(ranks, _not_shared(opened.folder, token, ranks))
    except BaseException:
        opened.held.close()
        raise


def _not_shared(folder: Path, token: str | None, ranks: Ranks) -> UserError | None:
    """Return what is wrong where this rank does not see the lock that rank 0 holds on the run's folder; collective.

    Else a run would train up to its first checkpoint, in which each host has its own part. File servers may show other
    hosts' files late. token: of the lock, on rank 0, which does not read the file: its lock would end with that.
    """
    token = from_all(token, ranks)[0]
    deadline = time.monotonic() + SEEN_WITHIN
    while not ranks.is_main and token_in(folder) != token:
        if time.monotonic() > deadline:
            return UserError(
                f"output: {folder / LOCK_FILE}, which rank 0 has written, is not seen on host {socket.gethostname()}; "
                "rule: all ranks share one folder"
            )
        with suppress(OSError):
            os.listdir(folder)  # which makes clients of NFS look anew
        time.sleep(POLL)
    return None


class Built(NamedTuple):
    """Student and teacher, and where they come from.

    start: an older one than was found, where a file turned out to be damaged. origin: where the run's first weights
    came from and what was done to them, on one line; empty where they were drawn. said: lines on what became of broken
    checkpoints.
    """

    pair: Pair
    start: Start
    origin: str
    said: list[str]


def build_pair(config: RunConfig, opened: Opened, ranks: Ranks) -> Built:
    """Build student and teacher: drawn, from other weights, or as the start's checkpoint has them; collective.

    Raises UserError on all ranks alike.
    """
    start = opened.found_start
    if start.checkpoint is None and config.init_from is not None:
        use = partial(initial_pair, config, ranks)
        pair, origin = with_agreed_weights(config, opened.initial, ranks, use)
        return Built(pair, start, origin, [])
    pair, tried = drawn_pair(config, ranks), 0
    while start.checkpoint is not None:
        try:
            pair.restore(start.checkpoint)
        except BrokenCheckpoint as broken:
            tried += 1
            start = _other_start(config, opened, start, broken, tried, ranks)
            if start.checkpoint is None:  # all are gone, and the pair holds a part of one
                return build_pair(config, replace(opened, found_start=start), ranks)
            continue
        break
    return Built(pair, start, "" if start.state is None else start.state.origin, _set_aside(start, ranks))


def _other_start(
    config: RunConfig, opened: Opened, start: Start, broken: BrokenCheckpoint, tried: int, ranks: Ranks
) -> Start:
    """Find another start than a checkpoint that cannot be read; collective. tried: how many could not be read so far.

    `resume: auto` passes it over. The newest one of a run that `resume` names may have been deleted, since that run
    goes on: then the next one is taken, a few times at most.
    """
    older, error = start, None
    try:
        assert start.checkpoint is not None
        if config.resume == "auto":
            known = (*start.broken, PassedOver(start.checkpoint, str(broken)))
        elif isinstance(broken, GoneCheckpoint) and start.checkpoint != Path(config.resume) and tried < MOST_TRIES:
            known = start.broken
        else:
            raise UserError(str(broken))
        older = _find_start(config, opened, known)
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    return _agreed_start(config, opened, older, ranks)


def _find_start(config: RunConfig, opened: Opened, known: tuple[PassedOver, ...], chosen: Path | None = None) -> Start:
    return find_start(config, opened.folder / CHECKPOINTS, opened.index.fingerprint(), known, chosen)


def _agreed_start(config: RunConfig, opened: Opened, start: Start, ranks: Ranks) -> Start:
    """Return the start that all ranks take; collective. start: found by this rank.

    Where `resume` names a run, rank 0 chooses: of one that goes on, ranks may find different checkpoints. Where the run
    deletes the chosen one before all ranks have looked into it, the next one is taken, a few times at most.
    Raises JointError where the ranks would start from different checkpoints.
    """
    names_run = config.resume not in ("auto", "never")
    for left in reversed(range(MOST_TRIES)):
        chosen, error, gone = from_all(start.checkpoint, ranks)[0], None, None
        try:
            if names_run and start.checkpoint != chosen:
                start = _find_start(config, opened, start.broken, chosen)
        except GoneCheckpoint as failure:
            gone = failure
        except UserError as failure:
            error = failure
        raise_together(ranks, error)
        if not any(from_all(gone is not None, ranks)):
            break
        assert chosen is not None
        if left == 0:
            _raise_gone("resume: ", chosen, ranks)
        try:
            start = _find_start(config, opened, start.broken)
        except UserError as failure:
            error = failure
        raise_together(ranks, error)
    _check_same_start(start, ranks)
    return start


def _raise_gone(key: str, checkpoint: Path, ranks: Ranks) -> NoReturn:
    """Raise JointError for a checkpoint that was found on rank 0 and that a rank did not find there; collective."""
    seen = ["there" if there else "not there" for there in from_all(checkpoint.exists(), ranks)]
    _require_same(f"{key}ranks see different checkpoints: {checkpoint}", seen, SAME_CHECKPOINT)
    raise JointError(str(GoneCheckpoint(checkpoint, key)))


def _set_aside(start: Start, ranks: Ranks) -> list[str]:
    """Rename the broken checkpoints that were passed over, and say so; collective."""
    said, error = [], None
    if ranks.is_main:
        try:
            for folder, reason in start.broken:
                aside = set_aside(folder)
                what = "one that was deleted meanwhile" if aside is None else f"a broken checkpoint, now {aside.name}"
                said.append(f"passed over {what}: {reason}")
        except UserError as failure:
            error = failure
    raise_together(ranks, error)
    return said


def _of_one_run(config: RunConfig, opened: Opened, ranks: Ranks) -> Opened:
    """Return what this rank has opened, with the start that all ranks take; collective.

    Raises JointError where ranks have different keys, data, checkpoint or galleries.
    """
    seen = (config, opened.index.fingerprint(), opened.marks, opened.galleries)
    configs, indexes, marks, galleries = zip(*from_all(seen, ranks), strict=True)
    for rank, other in enumerate(configs):
        if different := different_between_hosts(configs[0], other):
            raise JointError(
                f"rank {rank} and rank 0 differ in {', '.join(different)}; rule: all ranks share one run's keys"
            )
    rule = "rule: every host has the same index, so copy it along with the shards"
    _require_same("data.sources: ranks see different indexes", indexes, rule)
    if all(marks):
        _require_same("data.sources: ranks see shards that begin with other bytes", marks, rule)
    opened = replace(opened, found_start=_agreed_start(config, opened, opened.found_start, ranks))
    if opened.found_start.state is None:  # an evaluation of a resumed run fails instead, and the run goes on
        for name, rule in opened.evaluations.same_data().items():
            problem = f"eval.{name}: {DIFFERENT_DATA}"
            _require_same(problem, [rank_galleries[name] for rank_galleries in galleries], rule)
    return opened


def with_agreed_weights(
    config: RunConfig, initial: InitialWeights | None, ranks: Ranks, use: Callable[[InitialWeights], Value]
) -> Value:
    """Return what is made of the weights that `init_from` names, the same ones on every rank; collective.

    Where that is a run, rank 0 chooses: of one that goes on, ranks may find different checkpoints. Where the run
    deletes the chosen one before all ranks have used it, the next one is taken, a few times at most. initial: found by
    this rank; None: look for them. use: collective; it may raise GoneCheckpoint on all ranks alike.
    """
    for left in reversed(range(MOST_TRIES)):
        try:
            return use(_agreed_weights(config, initial, ranks))
        except GoneCheckpoint as gone:
            if left == 0 or gone.folder == config.init_from:
                _raise_gone("init_from: ", gone.folder, ranks)
            initial = None
    raise AssertionError("the last try returns or raises")


def _agreed_weights(config: RunConfig, initial: InitialWeights | None, ranks: Ranks) -> InitialWeights:
    """Return the weights that rank 0 has found; raises GoneCheckpoint on all ranks where one comes too late for them.

    Raises JointError where the ranks would start from different weights, or one cannot read them.
    """
    error = None
    try:
        initial = initial or open_initial(config)
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    assert initial is not None
    assert config.init_from is not None
    chosen = config.init_from / from_all(initial.path.relative_to(config.init_from), ranks)[0]
    digest, is_gone = None, False
    try:
        if chosen not in (initial.path, config.init_from):
            initial = open_chosen(config, chosen)
        digest = initial.digest()
    except GoneCheckpoint:
        is_gone = True
    except UserError as failure:  # unreadable on this host
        error = failure
    raise_together(ranks, error)
    if any(from_all(is_gone, ranks)):
        raise GoneCheckpoint(chosen, "init_from: ")
    _require_same(
        f"init_from: ranks see different checkpoints in {config.init_from}, by the digests of their {initial.digests}",
        from_all(digest, ranks),
        SAME_CHECKPOINT,
    )
    return initial


def _check_same_start(start: Start, ranks: Ranks) -> None:
    """Raise JointError where the ranks would start from different checkpoints; collective."""
    checkpoints, manifests = zip(*from_all((start.checkpoint, start.manifest), ranks), strict=True)
    _require_same("output: ranks see different newest checkpoints", checkpoints, "rule: all ranks share one folder")
    _require_same(
        f"resume: ranks see different checkpoints in {start.checkpoint}, by the digests of their manifests",
        manifests,
        SAME_CHECKPOINT,
    )


def _require_same(problem: str, found: Sequence[object], rule: str) -> None:
    """Raise JointError that names rank 0, the first rank that differs from it, and how many others do."""
    others = [(rank, value) for rank, value in enumerate(found) if value != found[0]]
    if others:
        rank, value = others[0]
        more = f", and {counted(len(others) - 1, 'more rank')} not as rank 0" if len(others) > 1 else ""
        raise JointError(f"{problem} (rank 0: {found[0]}, rank {rank}: {value}{more}); {rule}")
