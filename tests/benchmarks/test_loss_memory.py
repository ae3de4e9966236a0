"""Memory of the loss hardly grows with the columns where these are taken by parts."""

from benchmarks.loss_memory import measure
from cosmos_scale.testing.ranks import run_ranks

FEW, MANY = 2048, 8192
PAIRS = 80  # each has a float32 number a column


def _peaks(rank: int, world_size: int) -> list[float]:
    return [measure(samples, columns)[0] for columns in (256, 2**40) for samples in (FEW, MANY)]


def test_memory_by_parts_grows_by_the_columns_statistics_alone() -> None:
    (peaks,) = run_ranks(_peaks, 1)
    by_parts, at_once = ((peaks[place + 1] - peaks[place]) / (MANY - FEW) for place in (0, 2))
    # Bytes a sample. All at once: the columns once more, in float32 too, and gradients of the global image views.
    assert 0 < by_parts <= 4 * PAIRS, by_parts
    assert at_once > 10_000
