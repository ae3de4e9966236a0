"""A plan in words and numbers, section by section."""

from collections.abc import Iterator

from cosmos_scale.profiling.plan import GIB, Plan, states_of

SHOWN = 0.005  # GiB: parts of less are added up


def head_lines(plan: Plan) -> Iterator[str]:
    """Yield what is planned, and from what."""
    cluster, counts, machine = plan.cluster, plan.counts, plan.cluster.machine
    yield (
        f"{plan.config.name} on {cluster.world_size:,} x {machine.name} ({cluster.nodes:,} x {cluster.gpus}; "
        f"{machine.link:g} GB/s inside a node, {machine.network:g} GB/s a {machine.unit} across)"
    )
    train = plan.config.train
    yield (
        f"batch {train.global_batch:,} = {cluster.world_size:,} x {counts.samples:,}; ZeRO stage {counts.stage}, "
        f"{counts.precision}, recompute {counts.recompute}, micro-batches {counts.micro_batches}"
    )
    yield f"counted from this code in {counts.seconds:.0f} s; captions of planned lengths; rates: {machine.source}"


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
    offloaded = "; masters, moments and average are on the host, and counted here" if plan.config.zero.offload else ""
    what = "CUDA context, NCCL, cuBLAS, outside torch (assumed)"
    if not machine.is_gpu:
        offloaded, what = "", "Python, libraries, gloo, outside torch (measured)"
    yield f"  {what:<52}{cluster.outside_torch / GIB:>24.2f}{offloaded}"
    share = whole / cluster.memory
    verdict = f"fits: {share:.0%}" if share <= 1.0 else f"DOES NOT FIT: {share:.0%}"
    shared = "" if machine.is_gpu else f", a rank's share of a host's {machine.memory_gib:.4g}"
    yield f"  {f'of {cluster.memory / GIB:.4g} GiB{shared}':<52}{whole / GIB:>24.2f}  {verdict}"
    yield f"  largest batch a {machine.unit}: " + "; ".join(
        f"{'none' if most is None else f'{most:,}'}{f' with recompute {every}' if every else ''}"
        for every, most in plan.largest.items()
    )


def work_lines(plan: Plan) -> Iterator[str]:
    """Yield the operations of a step and rank."""
    work, calls = plan.work, sum(plan.counts.host_calls.values())
    shares = (f"{name} {part / work.needed:.1%}" for name, part in _named(work.student, work.teacher, work.loss))
    yield (
        f"work of a step and rank   {work.needed / 1e12:,.2f} TFLOP needed ({', '.join(shares)}), "
        f"{work.executed / 1e12:,.2f} executed"
    )
    launches = sum(plan.counts.launches().values())
    nbytes = sum(found.nbytes for found in plan.counts.operators if found.group not in ("products", "attention"))
    yield (
        f"  {nbytes / 1e9:,.1f} GB read and written outside of products and attention; {launches:,} launches; "
        f"the host calls {calls:,} operators"
    )


def traffic_lines(plan: Plan) -> Iterator[str]:
    """Yield what a rank exchanges in a step."""
    rows = plan.traffic()
    if not rows:
        yield "traffic of a rank   none"
        return
    yield f"{'traffic of a rank and step':<54}{'calls':>6}{'MB':>10}{'across nodes':>14}  hidden behind"
    for row in rows:
        hidden = f"{row.hidden:.0%}, {row.behind}" if row.hidden else "nothing"
        yield f"  {row.purpose:<52}{row.calls:>6,}{row.received / 1e6:>10,.2f}{row.across / 1e6:>14,.2f}  {hidden}"
    received, across = (sum(getattr(row, name) for row in rows) for name in ("received", "across"))
    yield f"  {'total':<52}{sum(row.calls for row in rows):>6,}{received / 1e6:>10,.2f}{across / 1e6:>14,.2f}"


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
    text = "  ".join(f"{owner} {nbytes / GIB:.2f}" for owner, nbytes in shown.items())
    rest = total - sum(shown.values())
    if rest:
        text += f"  others {rest / GIB:.2f}" if rest >= SHOWN * GIB else ""
    yield f"  {name:<8} {text:<60} {total / GIB:>6.2f}"


def _named(student: int, teacher: int, loss: int) -> list[tuple[str, int]]:
    return [("student", student), ("teacher", teacher), ("loss", loss)]
