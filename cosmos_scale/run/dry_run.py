"""The second half of a dry run: what a launch looks for before it builds anything, in a table, found or refused."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from cosmos_scale.config import EvaluatorConfig, RunConfig, SourceConfig
from cosmos_scale.data.shards.patterns import parse_pattern
from cosmos_scale.data.shards.store import is_remote
from cosmos_scale.engine.comm_build import check_extensions, use_own_environment
from cosmos_scale.engine.ranks import choose_device
from cosmos_scale.errors import UserError
from cosmos_scale.run.folder import CHECKPOINTS
from cosmos_scale.run.lock import RANKS_LOCK_FILE, other_run_saves, who_holds
from cosmos_scale.run.opening import Opening
from cosmos_scale.run.since_checkpoint import changed_since
from cosmos_scale.words import print_row

NAMES, VERDICTS = 14, 10  # columns of the table's first two


class SupposedRank(NamedTuple):
    """The rank that a dry run stands for: the first one."""

    rank: int
    world_size: int
    device: torch.device


def look_before_launch(config: RunConfig, world_size: int) -> None:
    """Look for all that a launch on this machine would refuse, and print what was found, a row each.

    Where data.samples takes the place of shards that are not on this machine, their rows say so, and refuse nothing.
    Raises UserError, as the launch would, with the first refusal.
    """
    print("what a launch here would find:")
    refusals: list[str] = []
    missing: set[str] = set()
    planned = False  # without the shards
    try:
        use_own_environment()  # as ranks do at their start
        device = choose_device(config.device)
        if device.type == "cpu":
            check_extensions()
        opening = Opening(config, SupposedRank(0, world_size, device))
    except UserError as error:
        _print_row("device", "REFUSED", str(error))
        raise
    for look in opening.looks():
        if look.needs in missing:
            missing.add(look.name)
            _print_row(look.name, "-", f"not looked at, since there is no answer on: {look.needs}")
            continue
        try:
            found = look.find()
            unopened = look.name == "evaluation" and opening.evaluations.unopened
            _print_row(look.name, "MISSING" if unopened else "ok", found)
        except UserError as error:
            missing.add(look.name)
            if look.name == "data" and config.data.samples is not None and not _any_shards(config.data.sources):
                planned = True
                _print_row(look.name, "not here", f"{error}; data.samples takes their place in a dry run")
                continue
            if look.name == "evaluation" and planned and not _any_shards(config.eval):
                _print_row(look.name, "not here", str(error))
                continue
            _print_row(look.name, "REFUSED", str(error))
            refusals.append(str(error))
    if hasattr(opening, "start"):
        index, evaluations = (getattr(opening, name, None) for name in ("index", "evaluations"))
        galleries = evaluations.galleries() if evaluations is not None else {}
        for line in changed_since(config, opening.folder, opening.start, index, galleries):
            _print_row("changed", "warning", line)
    if (holder := who_holds(opening.folder)) is not None:
        _print_row("lock", "held", f"this run is launched now, {holder}: a launch is refused until that one has ended")
    elif who_holds(opening.folder, RANKS_LOCK_FILE) is None and (said := other_run_saves(opening.folder / CHECKPOINTS)):
        _print_row("lock", "held", f"{said}: a launch is refused until that run has ended")
    if refusals:
        more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        raise UserError(f"{refusals[0]}{more}")


def _any_shards(sections: Iterable[SourceConfig | EvaluatorConfig]) -> bool:
    """Tell whether any shard that sections name lies on this machine, indexed or not, or is read from elsewhere."""
    shards = [str(getattr(section, "shards", "")) for section in sections]
    return any(is_remote(pattern) for pattern in shards) or any(
        parse_pattern(pattern).known_names()[0] for pattern in shards if pattern
    )


def _print_row(name: str, verdict: str, text: str) -> None:
    print_row(f"  {name:<{NAMES}}{verdict:<{VERDICTS}}", text)
