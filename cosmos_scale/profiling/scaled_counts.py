"""A counted step for another number of ranks, without counting it again.

With as many samples a rank, the student's and the teacher's work stays as it is. The loss grows with the global batch,
and what each rank updates shrinks with its share.
"""

from dataclasses import replace

from cosmos_scale.profiling.counts import Counts, Exchange, OperatorCount

SMALL = 4096  # bytes: flags, norms and scales, whose size no number of ranks changes


def scaled_counts(counts: Counts, world_size: int) -> Counts:
    """Return the counts of one of so many ranks, each with as many samples; counts: of 2 ranks at least.

    Exact but for what is padded to a multiple of the ranks, for rows of the loss that do not grow with the global
    batch, and for memory: it stays as counted.
    """
    if counts.world_size < 2:
        raise ValueError(f"{counts.world_size} rank exchanges nothing, so the traffic of more is not known")
    ratio = world_size / counts.world_size
    exchanges = () if world_size == 1 else tuple(_exchange(exchange, ratio) for exchange in counts.exchanges)
    operators = tuple(_operator(count, ratio, counts.stage) for count in counts.operators)
    return replace(counts, world_size=world_size, exchanges=exchanges, operators=operators)


def _exchange(exchange: Exchange, ratio: float) -> Exchange:
    """The loss's columns and statistics are those of the global batch; all other tensors are the model's."""
    if exchange.phase != "loss" or exchange.nbytes <= SMALL:
        return exchange
    return replace(exchange, nbytes=round(exchange.nbytes * ratio))


def _operator(count: OperatorCount, ratio: float, stage: int) -> OperatorCount:
    if count.phase == "loss":
        factor = ratio
    elif count.phase == "update" and stage > 0:
        factor = 1 / ratio
    else:
        return count
    return replace(
        count,
        read=round(count.read * factor),
        written=round(count.written * factor),
        flops=round(count.flops * factor),
    )
