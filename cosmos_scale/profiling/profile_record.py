"""A profile as it is written: profile.json, made of what all ranks measure. docs/profiling.md says what is in it."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, replace_file, whole_path
from cosmos_scale.host import usable_cores
from cosmos_scale.profiling.collective_times import CollectiveTimes
from cosmos_scale.profiling.machine import link_rate
from cosmos_scale.profiling.phase_rows import LABELS, PhaseRow, phase_rows, phase_sum, slowest_rank
from cosmos_scale.profiling.rank_profile import RankProfile
from cosmos_scale.profiling.spread import Spread, spread_of

KIND, FORMAT = "profile", 1
PROFILE_FILE = "profile.json"
SCATTERS = ("reduce_scatter", "all_reduce")
SEEN = 0.01  # of a step: no smaller change is clear

ProfileRecord = dict[str, Any]


def profile_record(config: RunConfig, ranks: Sequence[RankProfile], *, warm_up: int, workers: int) -> ProfileRecord:
    """Return the profile of a run. ranks: in order. workers: loader processes of a rank."""
    measured, busy = [rank.measured for rank in ranks], [rank.traced.busy for rank in ranks]
    slowest = slowest_rank(measured)
    # Ranks begin and end their steps together, but for what they run ahead: a step is as long as on the slowest rank.
    plain = ranks[slowest].plain_ms
    step = spread_of(plain)
    rows = phase_rows(measured, busy, _reduction(ranks))
    samples = config.samples_per_rank(len(ranks))
    # Between hosts collectives go at the network's rate, which no name tells.
    link = link_rate(ranks[0].device) if ranks[0].gpu_memory and len({rank.host for rank in ranks}) == 1 else None
    return {
        "kind": KIND,
        "format": FORMAT,
        "run": config.name,
        "time": round(time.time(), 3),
        "device": {"type": "cuda" if ranks[0].gpu_memory else "cpu", "name": ranks[0].device},
        "world_size": len(ranks),
        "hosts": [rank.host for rank in ranks],
        "setting": {
            "global_batch": config.train.global_batch,
            "samples_per_rank": samples,
            "precision": config.precision,
            "zero_stage": config.zero.stage,
            "micro_batches": config.train.micro_batches,
            "recompute": config.train.recompute,
            "warm_up": warm_up,
            "steps": len(plain),
            "traced_steps": ranks[0].traced.steps,
        },
        "config": config.model_dump(mode="json"),
        "step_ms": {**step._asdict(), "p95": float(np.percentile(plain, 95))},
        "slowest_rank": slowest,
        "throughput": _throughput(config, ranks, step.median),
        "sum": phase_sum(measured, busy)._asdict(),
        "cost": {"marks": max(rank.marks_ms for rank in ranks) / step.median, **_cost(ranks)._asdict()},
        "phases": [_phase(row, rows) for row in rows],
        "operators": {
            "kinds": ranks[slowest].traced.kinds,
            "top": [work._asdict() for work in ranks[slowest].traced.top],
        },
        "link_gbs": link,
        "collectives": [
            {**times._asdict(), "link_share": times.bus_gbs / link if link and times.bus_gbs else None}
            for times in _mean_times(ranks)
        ],
        "loader": _loader(ranks, samples, step.median, workers),
        "memory": _memory(ranks),
        "planned": None,
        "waits": [wait._asdict() for wait in ranks[slowest].traced.waits],
        "files": [PROFILE_FILE],
    }


def read_record(file: Path) -> ProfileRecord:
    """Read a profile.json; raises UserError where it is none, or lacks what is compared."""
    try:
        record = load_json(read_regular(file))
    except OSError as error:
        raise UserError(f"{whole_path(file)}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file}: is no JSON; rule: the {PROFILE_FILE} of an earlier profile") from error
    if not isinstance(record, dict) or (record.get("kind"), record.get("format")) != (KIND, FORMAT):
        raise UserError(f"{file}: is no profile of this version; rule: the {PROFILE_FILE} of an earlier profile")
    try:
        compared(record, record, file)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no whole profile; rule: the {PROFILE_FILE} of an earlier profile") from error
    return record


def compared(before: ProfileRecord, now: ProfileRecord, file: Path) -> ProfileRecord:
    """Return what has changed since another profile, with its spread. file: of that profile.

    A change is clear where the middle halves of both measurements lie apart, and it is a hundredth of the step or more.
    """
    old = {phase["name"]: Spread(**phase["device_ms"]) for phase in before["phases"]}
    new = {phase["name"]: Spread(**phase["device_ms"]) for phase in now["phases"]}
    nothing = Spread(0.0, 0.0, 0.0)
    steps = [Spread(*(record["step_ms"][key] for key in Spread._fields)) for record in (before, now)]
    least = SEEN * steps[1].median
    phases = {
        name: _change(old.get(name, nothing), new.get(name, nothing), least) for name in LABELS if name in old | new
    }
    was, is_now = flat(before["config"]), flat(now["config"])
    keys = sorted(key for key in was | is_now if was.get(key) != is_now.get(key) and key not in ("name", "output"))
    return {
        "file": str(file),
        "step_ms": _change(steps[0], steps[1], least),
        "samples_per_second": before["throughput"]["samples_per_second"],
        "world_size": before["world_size"],
        "device": before["device"]["name"],
        "phases": phases,
        "keys": {key: [was.get(key), is_now.get(key)] for key in keys},
    }


def write_record(record: ProfileRecord, folder: Path) -> None:
    """Write profile.json into a folder that is there; raises UserError where it cannot be written."""
    replace_file(folder / PROFILE_FILE, json.dumps(record).encode())


def flat(section: Any, key: str = "") -> dict[str, Any]:
    """Return a config's values by dotted key."""
    if isinstance(section, list) and any(isinstance(item, dict) for item in section):
        section = dict(enumerate(section))
    if not isinstance(section, dict):
        return {key: section}
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= flat(value, f"{key}.{name}" if key else str(name))
    return found


def _change(before: Spread, now: Spread, least: float) -> ProfileRecord:
    change = now.median / before.median - 1.0 if before.median > 0 else None
    clear = now.clear_of(before) and abs(now.median - before.median) >= least
    return {"before": before._asdict(), "change": change, "clear": clear}


def _phase(row: PhaseRow, rows: Sequence[PhaseRow]) -> ProfileRecord:
    whole = sum(each.device.median for each in rows)
    parts = []
    if row.reduction is not None:
        share = row.reduction.median / whole
        parts.append(
            {"label": "of which reduction exposed", "device_ms": row.reduction._asdict(), "share": share},
        )
    return {
        "name": row.name,
        "label": LABELS[row.name],
        "device_ms": row.device._asdict(),
        "host_ms": None if row.host is None else row.host._asdict(),
        "share": row.device.median / whole,
        "rank_min_ms": row.rank_min,
        "rank_max_ms": row.rank_max,
        "rank_max": row.slowest,
        "parts": parts,
    }


def _throughput(config: RunConfig, ranks: Sequence[RankProfile], step_ms: float) -> ProfileRecord:
    per_second = 1e3 * config.train.global_batch / step_ms
    needed = 1e3 * statistics.fmean(rank.flops for rank in ranks) / step_ms
    executed = 1e3 * statistics.fmean(rank.executed for rank in ranks) / step_ms
    peak = ranks[0].peak_flops
    return {
        "samples_per_second": per_second,
        "samples_per_second_per_rank": per_second / len(ranks),
        "needed_tflops_per_rank": needed / 1e12,
        "mfu": None if peak is None else needed / peak,
        "hfu": None if peak is None else executed / peak,
    }


def _cost(ranks: Sequence[RankProfile]) -> Spread:
    """Return by which part of itself a step is longer with marks, each compared with the step beside it."""
    parts = [
        marked.host_ms / plain - 1.0
        for rank in ranks
        for marked, plain in zip(rank.measured, rank.plain_ms, strict=True)
    ]
    return spread_of(parts)


def _reduction(ranks: Sequence[RankProfile]) -> float | None:
    """Return what of the backward's reductions nothing hides, by the traces: milliseconds of a step."""
    found = [
        times.exposed_ms
        for rank in ranks
        for times in rank.traced.collectives
        if times.phase == "backward" and times.kind in SCATTERS and times.exposed_ms is not None
    ]
    return sum(found) / len(ranks) if found else None


def _mean_times(ranks: Sequence[RankProfile]) -> list[CollectiveTimes]:
    """Return the collectives of the main rank, with times that are means over the ranks."""
    by_place: dict[tuple[str, str], list[CollectiveTimes]] = {}
    for rank in ranks:
        for times in rank.traced.collectives:
            by_place.setdefault((times.phase, times.kind), []).append(times)
    return [
        times._replace(
            ms=_mean([other.ms for other in by_place[times.phase, times.kind]]),
            bus_gbs=_mean([other.bus_gbs for other in by_place[times.phase, times.kind]]),
            exposed_ms=_mean([other.exposed_ms for other in by_place[times.phase, times.kind]]),
        )
        for times in ranks[0].traced.collectives
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _loader(ranks: Sequence[RankProfile], samples: int, step_ms: float, workers: int) -> ProfileRecord:
    loaders = [rank.loader for rank in ranks]
    here = [rank.loader.cores_needed(samples, step_ms) for rank in ranks if rank.host == ranks[0].host]
    return {
        "ms_per_sample": statistics.fmean(loader.ms_per_sample for loader in loaders),
        "parts": {
            part: statistics.fmean(loader.parts.get(part, 0.0) for loader in loaders) for part in loaders[0].parts
        },
        "cores_needed": statistics.fmean(loader.cores_needed(samples, step_ms) for loader in loaders),
        "cores_needed_on_host": sum(here),
        "workers": workers,
        "cores": usable_cores(),
        "cores_computing": 0 if ranks[0].gpu_memory else len(here) * torch.get_num_threads(),
        "ranks_on_host": len(here),
    }


def _memory(ranks: Sequence[RankProfile]) -> ProfileRecord | None:
    """Return the memory of the rank that takes most."""
    lines = [(rank, rank.traced.memory) for rank in ranks if rank.traced.memory is not None]
    if not lines:
        return None
    rank, line = max(lines, key=lambda pair: pair[1].peak)
    gpu = rank.gpu_memory
    shown: Mapping[str, Any] = {} if gpu is None else gpu._asdict()
    return {
        "peak_bytes": line.peak,
        "peak_ms": line.peak_ms,
        "peak_phase": line.peak_phase,
        "owners": line.owners,
        "largest_block_bytes": line.largest,
        "timeline": line.points,
        "phases": line.phases,
        "step_ms": line.step_ms,
        "states_by_formula": not line.known,
        "planned_states_bytes": rank.planned_states,
        "peak_untraced_bytes": shown.get("peak"),
        "reserved_bytes": shown.get("reserved"),
        "retries": shown.get("retries"),
        "capacity_bytes": shown.get("capacity"),
    }
