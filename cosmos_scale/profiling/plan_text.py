"""A plan in words and numbers, section by section, in lines of 80 columns."""

import textwrap
from collections.abc import Iterator

from cosmos_scale.profiling.plan import GIB, Plan, states_of
from cosmos_scale.words import table_row

SHOWN = 0.005  # GiB: parts of less are added up
PARTS, PURPOSE = 58, 38  # columns


def head_lines(plan: Plan) -> Iterator[str]:
    """Yield what is planned, and from what."""
    cluster, counts, machine = plan.cluster, plan.counts, plan.cluster.machine
    yield table_row(
        "run ",
        f"{plan.config.name} on {cluster.world_size:,} x {machine.name} ({cluster.nodes:,} x {cluster.gpus}; "
        f"{machine.link:g} GB/s inside a node, {machine.network:g} GB/s a {machine.unit} across)",
    )
    train = plan.config.train
    yield table_row(
        "batch ",
        f"{train.global_batch:,} = {cluster.world_size:,} x {counts.samples:,}; ZeRO stage {counts.stage}, "
        f"{counts.precision}, recompute {counts.recompute}, micro-batches {counts.micro_batches}",
    )
    counted_in = f"from this code in {counts.seconds:.0f} s; captions of planned lengths; rates: {machine.source}"
    yield table_row("counted ", counted_in)


def memory_lines(plan: Plan) -> Iterator[str]:
    """Yield the memory of a rank at its peak, and the largest batches."""
    peak, counts = plan.counts.peak, plan.counts
    yield f"memory of a rank, GiB{f'peak: {_MOMENTS[peak.phase]}':>57}"
    states = {owner: nbytes for owner, nbytes in peak.parts.items() if owner not in _WITH_SAMPLES}
    yield from _parts("states", states, states_of(peak.parts.items()))
    samples = {owner: nbytes for owner, nbytes in peak.parts.items() if owner in _WITH_SAMPLES}
    yield from _parts("samples", samples, sum(samples.values()))
    kept = counts.memory_of("student").left.get("activations", 0)
    if counts.micro_batches == 1:
        yield f"  activations {kept / counts.samples / 2**20:,.1f} MiB a sample"
    cluster, machine = plan.cluster, plan.cluster.machine
    whole = peak.peak + cluster.outside_torch
    what = "CUDA context, NCCL, cuBLAS, outside torch (assumed)"
    if not machine.is_gpu:
        what = "Python, libraries, gloo, outside torch (measured)"
    elif plan.config.zero.offload:
        yield "  masters, moments and average are on the host, and counted here"
    yield _sized(what, cluster.outside_torch)
    share = whole / cluster.memory
    verdict = f"fits: {share:.0%}" if share <= 1.0 else f"DOES NOT FIT: {share:.0%}"
    shared = "" if machine.is_gpu else f", a rank's share of a host's {machine.memory_gib:.4g}"
    yield _sized(f"of {cluster.memory / GIB:.4g} GiB{shared}, {verdict}", whole)
    largest = "; ".join(
        f"{'none' if most is None else f'{most:,}'}{f' with recompute {every}' if every else ''}"
        for every, most in plan.largest.items()
    )
    yield table_row(f"  largest batch a {machine.unit}: ", largest)


def work_lines(plan: Plan) -> Iterator[str]:
    """Yield the operations of a step and rank."""
    work, calls = plan.work, sum(plan.counts.host_calls.values())
    shares = (f"{name} {part / work.needed:.1%}" for name, part in _named(work.student, work.teacher, work.loss))
    yield table_row(
        "work of a step and rank   ",
        f"{work.needed / 1e12:,.2f} TFLOP needed ({', '.join(shares)}), {work.executed / 1e12:,.2f} executed",
    )
    launches = sum(plan.counts.launches().values())
    nbytes = sum(found.nbytes for found in plan.counts.operators if found.group not in ("products", "attention"))
    yield table_row(
        "  ",
        f"{nbytes / 1e9:,.1f} GB read and written outside of products and attention; {launches:,} launches; "
        f"the host calls {calls:,} operators",
    )


def traffic_lines(plan: Plan) -> Iterator[str]:
    """Yield what a rank exchanges in a step."""
    rows = plan.traffic()
    if not rows:
        yield "traffic of a rank   none"
        return
    yield f"{'traffic of a rank and step':<{PURPOSE}}{'calls':>6}{'MB':>10}{'from nodes':>11} hidden behind"
    for row in rows:
        hidden = f"{row.hidden:.0%}, {row.behind.split()[-1]}" if row.hidden else "nothing"
        first, *others = textwrap.wrap(row.purpose, PURPOSE - 2)
        yield f"{f'  {first}':<{PURPOSE}}{_numbers(row.calls, row.received, row.across)} {hidden}"
        yield from (f"    {line}" for line in others)
    received, across = (sum(getattr(row, name) for row in rows) for name in ("received", "across"))
    yield f"{'  total':<{PURPOSE}}{_numbers(sum(row.calls for row in rows), received, across)}"


def _numbers(calls: int, received: float, across: float) -> str:
    return f"{calls:>6,}{received / 1e6:>10,.2f}{across / 1e6:>11,.2f}"


_WITH_SAMPLES = ("batch", "activations", "scratch")
_MOMENTS = {
    "student": "student's forward",
    "teacher": "teacher's forward",
    "loss": "loss",
    "backward": "backward",
    "update": "update",
    "refresh": "refresh of the teacher",
}


def _parts(name: str, parts: dict[str, int], total: int) -> Iterator[str]:
    shown = {owner: nbytes for owner, nbytes in parts.items() if nbytes >= SHOWN * GIB}
    named = [f"{owner} {nbytes / GIB:.2f}" for owner, nbytes in shown.items()]
    rest = total - sum(shown.values())
    if rest >= SHOWN * GIB:
        named.append(f"others {rest / GIB:.2f}")
    lines = textwrap.wrap("  ".join(named), PARTS) or [""]
    yield f"  {name:<8} {lines[0]:<{PARTS}}{total / GIB:>9.2f}"
    yield from (f"{'':11}{line}" for line in lines[1:])


def _sized(what: str, nbytes: float) -> str:
    return f"  {what:<{PARTS + 9}}{nbytes / GIB:>9.2f}"


def _named(student: int, teacher: int, loss: int) -> list[tuple[str, int]]:
    return [("student", student), ("teacher", teacher), ("loss", loss)]
