"""Counts a run's step in a process of its own, so that the process that asks stays as it was.

`python -m cosmos_scale.profiling.fake_run` reads a job as JSON and writes `Counts` as JSON.
"""

import json
import os
import subprocess
import sys

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.profiling.counts import Counts, counts_of_json

MINUTES = 20  # of one count, at most; at stage 3 and 1,024 ranks DeepSpeed itself takes one or two


def count_run(config: RunConfig, world_size: int, samples: int, *, as_gpu: bool = True, rank: int = 0) -> Counts:
    """Count a step of one of so many ranks with so many samples each, whatever the config's batch.

    as_gpu: count what a GPU would run; else what a CPU runs. Takes 10 s or more. Raises UserError where the run cannot
    be counted, and says what its process said last.
    """
    job = {"world_size": world_size, "samples": samples, "as_gpu": as_gpu, "rank": rank}
    command = [sys.executable, "-W", "ignore", "-m", "cosmos_scale.profiling.fake_run"]
    # Nothing of a launcher that may have started this process, and one thread: there is little to compute.
    dropped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    text = json.dumps({"config": config.model_dump(mode="json"), **job})
    try:
        found = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, timeout=60 * MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"plan: counting a step of {world_size:,} ranks took over {MINUTES} minutes") from None
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:] or [f"exit status {found.returncode}"]
        raise UserError(f"plan: a step of {world_size:,} ranks with {samples:,} samples cannot be counted: {last[0]}")
    return counts_of_json(found.stdout.splitlines()[-1])


def main() -> None:
    """Count the job of standard input."""
    import torch

    from cosmos_scale.profiling.fake_ranks import start_fake_ranks
    from cosmos_scale.profiling.fake_step import count_fake_step
    from cosmos_scale.profiling.planned_batch import planned_lengths

    job = json.load(sys.stdin)
    config = RunConfig.model_validate_json(json.dumps(job["config"]))
    torch.set_num_threads(1)
    lengths = planned_lengths(config, job["samples"])
    ranks = start_fake_ranks(job["world_size"], job["rank"])
    counts = count_fake_step(config, ranks, lengths, as_gpu=job["as_gpu"])
    print(counts.to_json(), flush=True)
    os._exit(0)  # DeepSpeed and the group would take seconds to end


if __name__ == "__main__":
    main()
