"""What would make a planned run faster, and how it scales: changed configs, counted and timed like the run itself.

All are counted for few ranks, where a count takes seconds, and scaled to the cluster (`scaled_counts.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.memory import state_memory, total_bytes
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.counts import Counts
from cosmos_scale.profiling.fake_run import count_runs
from cosmos_scale.profiling.plan import RECOMPUTES, Cluster, Plan
from cosmos_scale.profiling.plan_time import PlannedTime, planned_time
from cosmos_scale.profiling.scaled_counts import scaled_counts
from cosmos_scale.words import counted

COUNTED_RANKS = 8
STAGES = (0, 1, 2, 3)
SCALES = (1, 8, 64, 128, 512, 1024)
"""GPUs of the table over ZeRO stages."""
SMALL_GAIN = 0.01  # that a plan cannot tell from none


@dataclass(frozen=True)
class Variant:
    """A config with so many samples a GPU, counted for COUNTED_RANKS. change: as the user would write it."""

    change: str
    config: RunConfig
    samples: int
    counts: Counts


@dataclass(frozen=True)
class Outlook:
    """A variant on a cluster. memory: bytes of a GPU, those outside of torch too."""

    change: str
    cluster: Cluster
    stage: int
    time: PlannedTime
    memory: int

    @property
    def fits(self) -> bool:
        """Whether a rank may have so much memory."""
        return self.memory <= self.cluster.memory


@dataclass(frozen=True)
class Remedy:
    """A change and what it brings. gain: of samples a second and GPU, 0.1 for a tenth more."""

    outlook: Outlook
    gain: float

    @property
    def verdict(self) -> str:
        """Whether to make the change, in a word or two."""
        if not self.outlook.fits:
            return "does not fit"
        return "don't" if self.gain < -SMALL_GAIN else "no gain" if self.gain < SMALL_GAIN else "do"


def count_variants(plan: Plan) -> list[Variant]:
    """Count what the remedies and the table of scaling need, in one process. Takes some seconds for each."""
    asked = list(_asked(plan))
    runs = [(config, samples) for _, config, samples in asked]
    counts = count_runs(runs, COUNTED_RANKS, as_gpu=plan.cluster.machine.is_gpu)
    return [Variant(*ask, found) for ask, found in zip(asked, counts, strict=True)]


def _asked(plan: Plan) -> Iterator[tuple[str, RunConfig, int]]:
    config, samples, train = plan.config, plan.counts.samples, plan.config.train
    unit = plan.cluster.machine.unit
    for stage in STAGES:
        if (changed := _changed(config, {"zero": {"stage": stage}})) is not None:
            yield f"zero.stage={stage}", changed, samples
    # Where memory is short, more is computed again, and micro-batches are smaller; else less, and larger.
    fits = plan.counts.peak.peak <= plan.free
    for every in RECOMPUTES:
        wanted = RECOMPUTES.index(every) < RECOMPUTES.index(train.recompute) if train.recompute in RECOMPUTES else True
        changed = _changed(config, {"train": {"recompute": every}})
        if every != train.recompute and wanted == fits and changed is not None:
            yield f"train.recompute={every}", changed, samples
    for parts in (1, 4):
        changed = _changed(config, {"train": {"micro_batches": parts}})
        wanted = parts != train.micro_batches and (parts < train.micro_batches) == fits
        if wanted and samples % parts == 0 and changed is not None:
            yield f"train.micro_batches={parts}", changed, samples
    yield f"{counted(2 * samples, 'sample')} a {unit}", config, 2 * samples
    if samples % (2 * train.micro_batches) == 0:
        yield f"{counted(samples // 2, 'sample')} a {unit}", config, samples // 2


def _changed(config: RunConfig, sections: dict[str, dict[str, Any]]) -> RunConfig | None:
    """Return a config with other values; None where its rules forbid them."""
    tree = config.model_dump(mode="json")
    for section, values in sections.items():
        tree[section] |= values
    try:
        return RunConfig.model_validate(tree)
    except (ValidationError, UserError):
        return None


def remedies(plan: Plan, time: PlannedTime, variants: Sequence[Variant]) -> list[Remedy]:
    """Return the changes that the variants stand for, those that help most first."""
    found = []
    for variant in variants:
        if variant.config == plan.config and variant.samples == plan.counts.samples:
            continue  # the run itself
        for change, other in _clusters(variant, plan):
            outlook = outlook_of(replace(variant, change=change), other)
            found.append(Remedy(outlook, outlook.time.rate / time.rate - 1))
    found += _relieved(plan, time)
    order = {"do": 0, "no gain": 1, "don't": 2, "does not fit": 3}
    return sorted(found, key=lambda remedy: (order[remedy.verdict], -remedy.gain))


def _clusters(variant: Variant, plan: Plan) -> Iterator[tuple[str, Cluster]]:
    """Yield how a variant is used: on the same cluster, or with the same global batch on fewer or more nodes."""
    cluster, ratio = plan.cluster, variant.samples / plan.counts.samples
    if ratio == 1:
        yield variant.change, cluster
        return
    size = cluster.world_size / ratio
    if size >= 1 and size == int(size):
        nodes = cluster.nodes / ratio
        other = (
            replace(cluster, nodes=int(nodes))
            if nodes >= 1 and nodes == int(nodes)
            else replace(cluster, nodes=1, gpus=int(size))
        )
        if other.world_size == size and other.gpus <= cluster.gpus:
            unit = cluster.machine.unit
            yield f"the same batch on {counted(int(size), unit)}, {variant.samples:,} a {unit}", other
    if ratio > 1:
        batch = variant.samples * cluster.world_size
        yield f"train.global_batch={batch} (another training)", cluster


def _relieved(plan: Plan, time: PlannedTime) -> Iterator[Remedy]:
    """Yield what to do where the step waits for data: the gain is that of no wait at all."""
    if time.expected.limit != "data CPUs":
        return
    relieved = replace(
        time,
        expected=replace(time.expected, data=0.0),
        fastest=replace(time.fastest, data=0.0),
        slowest=replace(time.slowest, data=0.0),
    )
    change = "more cores and data.workers, or data.decoder=dali"
    memory = plan.counts.peak.peak + plan.cluster.outside_torch
    outlook = Outlook(change, plan.cluster, plan.counts.stage, relieved, memory)
    yield Remedy(outlook, relieved.rate / time.rate - 1)


def outlook_of(variant: Variant, cluster: Cluster) -> Outlook:
    """Return a variant's time and memory on a cluster."""
    counts = scaled_counts(variant.counts, cluster.world_size)
    time = planned_time(variant.config, counts, cluster)
    with torch.device("meta"):
        model = CosmosModel(variant.config.model)
    here, there = (
        total_bytes(state_memory(model, variant.config, ranks), on_host=False)
        for ranks in (variant.counts.world_size, cluster.world_size)
    )
    memory = counts.peak.peak + there - here + cluster.outside_torch
    return Outlook(variant.change, cluster, variant.counts.stage, time, memory)


def scaling(plan: Plan, variants: Sequence[Variant], gpus: Sequence[int] = SCALES) -> list[Outlook]:
    """Return the run with as many samples a GPU on clusters of these sizes, at each stage; nodes are as the plan's."""
    stages = [variant for variant in variants if variant.change.startswith("zero.stage=")]
    found = []
    for variant in stages:
        for size in gpus:
            nodes, rest = divmod(size, plan.cluster.gpus)
            if nodes and rest:
                continue
            cluster = replace(plan.cluster, nodes=max(1, nodes), gpus=min(size, plan.cluster.gpus))
            found.append(outlook_of(variant, cluster))
    return found
