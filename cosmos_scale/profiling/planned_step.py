"""What a step is planned to exchange and to hold, counted without running it: to stand beside what was measured."""

from typing import Any

from cosmos_scale.config import RunConfig
from cosmos_scale.profiling.fake_run import count_run


def planned_step(config: RunConfig, world_size: int, *, on_gpu: bool) -> dict[str, Any]:
    """Return the plan of a rank's step, as profile.json holds it; takes 10 s or more.

    peak_bytes: of memory. phase_peaks: the peak of each phase, in bytes by the phase that has taken them. collectives:
    by phase and kind, the calls of a step and the megabytes of one, of the whole tensor. Raises UserError where the run
    cannot be counted.
    """
    counts = count_run(config, world_size, config.samples_per_rank(world_size), as_gpu=on_gpu)
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for exchange in counts.exchanges:
        calls, nbytes = sums.get((exchange.phase, exchange.kind), (0, 0))
        sums[exchange.phase, exchange.kind] = (calls + exchange.calls, nbytes + exchange.calls * exchange.nbytes)
    return {
        "peak_bytes": counts.peak.peak,
        "phase_peaks": {memory.phase: memory.taken for memory in counts.memory},
        "collectives": [
            {"phase": phase, "kind": kind, "calls": calls, "mbytes": nbytes / calls / 1e6}
            for (phase, kind), (calls, nbytes) in sums.items()
        ],
    }
