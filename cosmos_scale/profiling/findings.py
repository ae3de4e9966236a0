"""What a profile shows that can be mended, in plain words: each with the key to change, and what the change may gain.

A gain is the time that the change could take away at most. It is no promise: what is hidden today may show then.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cosmos_scale.profiling.profile_record import ProfileRecord
from cosmos_scale.words import counted

WORTH = 0.02  # of a step: smaller gains are not told
SLOW_RANK = 1.25  # times the median
ROOM = 0.9  # of a GPU's memory may be filled
LESS = 0.5  # of the traffic, in bf16
MANY, SMALL_MB = 20, 0.1  # collectives of a phase, and the size below which a message's start costs most


class Finding(NamedTuple):
    """One thing to mend. key: as on the command line, None where no key mends it. gain_ms: of a step, None: unknown."""

    text: str
    key: str | None
    gain_ms: float | None


def findings(record: ProfileRecord) -> list[ProfileRecord]:
    """Return what a profile shows, the largest gain first, as profile.json holds it."""
    step = record["step_ms"]["median"]
    found = [finding for rule in _RULES for finding in rule(record)]
    told = [finding for finding in found if finding.gain_ms is None or finding.gain_ms >= WORTH * step]
    told.sort(key=lambda finding: -(finding.gain_ms or 0.0))
    return [
        {**finding._asdict(), "gain_share": None if finding.gain_ms is None else finding.gain_ms / step}
        for finding in told
    ]


def _data_wait(record: ProfileRecord) -> Iterator[Finding]:
    wait, loader = _ms(record, "data"), record["loader"]
    needed, workers = loader["cores_needed"], loader["workers"]
    share = max(0, loader["cores"] - loader["cores_computing"]) / loader["ranks_on_host"]
    has = f"the loader needs {needed:.2f} cores a rank for {loader['ms_per_sample']:.1f} ms a sample"
    if workers == 0:
        if share >= 1 if loader["cores_computing"] else share > 1:
            yield Finding(f"the training process loads its batches itself; {has}", "data.workers=1", wait)
        else:
            busy = "the ranks compute on all cores" if loader["cores_computing"] else "a rank has one core"
            yield Finding(f"the training process loads its batches itself, and {busy}; {has}", None, wait)
    elif needed > workers and share > workers:
        more = min(int(share), -(-int(10 * needed) // 10) + 1)
        yield Finding(f"{has}, and has {counted(workers, 'worker')}", f"data.workers={more}", wait)
    elif needed > share:
        on_gpu = record["device"]["type"] == "cuda" and record["config"]["data"]["decoder"] == "torch"
        key = "data.decoder=dali" if on_gpu else None
        beside = " beside what computes" if loader["cores_computing"] else ""
        yield Finding(f"{has}, and this host has {share:.1f} for each{beside}", key, wait)
    else:
        yield Finding(
            f"batches come late though {has}, and has {counted(workers, 'worker')}: shards are read slowly", None, wait
        )


def _slow_ranks(record: ProfileRecord) -> Iterator[Finding]:
    if record["world_size"] == 1:
        return
    for phase in record["phases"]:
        if phase["name"] not in ("data", "copy", "student", "teacher"):
            continue
        median = phase["device_ms"]["median"]
        beyond = phase["rank_max_ms"] - median
        if phase["rank_max_ms"] > SLOW_RANK * median:
            rank = phase["rank_max"]
            text = f"rank {rank} on host {record['hosts'][rank]} takes {phase['rank_max_ms']:.1f} ms for: "
            yield Finding(f"{text}{phase['label']}; the mean of the ranks is {median:.1f}", None, beyond)


def _late_ranks(record: ProfileRecord) -> Iterator[Finding]:
    """The loss's first collectives come after the forward: they last as long as the latest rank needs."""
    rows = [row for row in record["collectives"] if row["phase"] in ("ranks", "loss") and row["mbytes"] is not None]
    waited = _at_most(
        record, ("ranks", "loss"), sum(row["exposed_ms"] or 0.0 for row in rows if row["mbytes"] < SMALL_MB)
    )
    text = f"ranks wait {waited:.1f} ms for each other before and in the loss, in messages of a few kB: some come late"
    yield Finding(text, None, waited)


def _reduction(record: ProfileRecord) -> Iterator[Finding]:
    backward = next((phase for phase in record["phases"] if phase["name"] == "backward"), None)
    exposed = sum(part["device_ms"]["median"] for part in backward["parts"]) if backward else 0.0
    exposed = _at_most(record, ("backward",), exposed)  # at stage 3 it is the trace's
    zero, train = record["config"]["zero"], record["config"]["train"]
    text = f"nothing hides {exposed:.1f} ms of the gradients' reduction"
    if zero["gradient_dtype"] == "fp32" and zero["stage"] in (1, 2) and record["config"]["precision"] == "bf16":
        yield Finding(f"{text}; bf16 halves its bytes, and rounds each sum", "zero.gradient_dtype=bf16", LESS * exposed)
    elif zero["stage"] == 2 and train["micro_batches"] > 1:
        yield Finding(f"{text}, once for each micro-batch; stage 1 reduces once", "zero.stage=1", exposed / 2)
    else:
        yield Finding(f"{text}; a larger batch a rank gives the same traffic more to hide behind", None, exposed)


def _refresh(record: ProfileRecord) -> Iterator[Finding]:
    yield Finding(
        "nothing hides the teacher's refresh: it is short where a rank has more work", None, _ms(record, "refresh")
    )


def _gathered_weights(record: ProfileRecord) -> Iterator[Finding]:
    if record["config"]["zero"]["stage"] == 3:
        phases = ("student", "teacher", "backward")
        rows = [row for row in _collectives(record, "all_gather") if row["phase"] in phases]
        exposed = sum(_at_most(record, (row["phase"],), row["exposed_ms"] or 0.0) for row in rows)
        text = f"nothing hides {exposed:.1f} ms of gathering weights: stage 2 keeps them whole, if memory has room"
        yield Finding(text, "zero.stage=2", exposed)


def _small_collectives(record: ProfileRecord) -> Iterator[Finding]:
    for row in record["collectives"]:
        if row["calls"] >= MANY and row["mbytes"] is not None and row["mbytes"] < SMALL_MB:
            what = f"{row['calls']:.0f} small collectives ({row['kind']}, {1e3 * row['mbytes']:.1f} kB each)"
            gain = _at_most(record, (row["phase"],), row["exposed_ms"] or 0.0)
            yield Finding(f"{row['phase']}: {what} cost more than their bytes do", None, gain)


def _idle(record: ProfileRecord) -> Iterator[Finding]:
    idle, config = _ms(record, "idle"), record["config"]
    if not config["model"]["compile"]:
        yield Finding("the device waits for the host, which launches too slowly", "model.compile=true", idle)
    elif not config["train"]["teacher_graph"] and config["zero"]["stage"] < 3:
        yield Finding("the device waits for the host, which launches too slowly", "train.teacher_graph=true", idle)
    else:
        yield Finding("the device waits for the host: larger batches a rank hide it", None, idle)


def _recomputation(record: ProfileRecord) -> Iterator[Finding]:
    """Recomputed blocks and features of micro-batches: both cost a part of the student's forward once more."""
    train, memory = record["config"]["train"], record["memory"]
    capacity = memory["capacity_bytes"] if memory else None
    if capacity is None:
        return
    student = _ms(record, "student")
    room, held = ROOM * capacity, memory["owners"].get("before the step", 0)
    step_bytes = memory["peak_bytes"] - held
    if train["recompute"] and memory["peak_bytes"] < room / 2:
        text = f"blocks are computed twice, though {capacity / 2**30:.0f} GiB hold a peak of "
        gain = student / train["recompute"]
        yield Finding(f"{text}{memory['peak_bytes'] / 2**30:.1f}", "train.recompute=0", gain)
    elif train["micro_batches"] > 1 and held + train["micro_batches"] * step_bytes < room:
        yield Finding(
            "micro-batches make each forward run twice, and memory has room", "train.micro_batches=1", student
        )


def _offload(record: ProfileRecord) -> Iterator[Finding]:
    if record["config"]["zero"]["offload"]:
        yield Finding("the host updates the weights", "zero.offload=false", _ms(record, "update"))


def _waits(record: ProfileRecord) -> Iterator[Finding]:
    if record["device"]["type"] != "cuda":
        return
    inside = ("student", "teacher", "loss", "backward", "update", "refresh")
    for wait in record["waits"]:
        if wait["phase"] in inside and wait["what"].startswith("cuda"):
            text = f"{wait['place']} lets the host wait for the device ({wait['what']}, {wait['phase']})"
            yield Finding(text, None, None)


def _allocator(record: ProfileRecord) -> Iterator[Finding]:
    if record["memory"] and record["memory"]["retries"]:
        micro = 2 * record["config"]["train"]["micro_batches"]
        times = counted(record["memory"]["retries"], "time")
        text = f"the allocator ran out of memory {times}, and gave all of its cache back"
        yield Finding(text, f"train.micro_batches={micro}", None)


_RULES: tuple[Callable[[ProfileRecord], Iterator[Finding]], ...] = (
    _data_wait,
    _slow_ranks,
    _late_ranks,
    _reduction,
    _refresh,
    _gathered_weights,
    _small_collectives,
    _idle,
    _recomputation,
    _offload,
    _waits,
    _allocator,
)


def _collectives(record: ProfileRecord, kind: str) -> list[ProfileRecord]:
    return [row for row in record["collectives"] if row["kind"] == kind]


def _ms(record: ProfileRecord, name: str) -> float:
    return sum(float(phase["device_ms"]["median"]) for phase in record["phases"] if phase["name"] == name)


def _at_most(record: ProfileRecord, phases: Sequence[str], traced_ms: float) -> float:
    """Return a time of the trace, no longer than its phases take: traced steps are slower than others."""
    return min(traced_ms, sum(_ms(record, name) for name in phases))
