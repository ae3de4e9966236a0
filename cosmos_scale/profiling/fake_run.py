"""Counts a run's steps in a process of its own, so that the process that asks stays as it was.

`python -m cosmos_scale.profiling.fake_run` reads jobs as JSON and writes `Counts` as JSON, a line for each.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.host import python_command
from cosmos_scale.profiling.counts import Counts, counts_of_json
from cosmos_scale.words import counted

MINUTES = 20  # of a process, at most; at stage 3 and 1,024 ranks DeepSpeed itself takes one or two for a count
_ERROR = re.compile(r"[\w.]+Error: ")
# What a launcher may have set for this process is not for the process that counts.
_OF_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}


def count_run(config: RunConfig, world_size: int, samples: int, *, as_gpu: bool = True) -> Counts:
    """Count one step; see `count_runs`."""
    (counts,) = count_runs([(config, samples)], world_size, as_gpu=as_gpu)
    return counts


def count_runs(runs: Sequence[tuple[RunConfig, int]], world_size: int, *, as_gpu: bool = True) -> list[Counts]:
    """Count a step of each run, of the first of so many ranks; a run comes with the samples of a rank.

    The configs' own batches play no part. as_gpu: count what a GPU would run; else what a CPU runs. Takes 5 s and then
    2 to 10 s for a run. Raises UserError where a run cannot be counted, with what its process said last.
    """
    command = python_command("cosmos_scale.profiling.fake_run")
    command[1:1] = ["-W", "ignore"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    # One thread: there is little to compute.
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    jobs = [{"config": config.model_dump(mode="json"), "samples": samples} for config, samples in runs]
    text = json.dumps({"world_size": world_size, "as_gpu": as_gpu, "runs": jobs})
    try:
        found = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, timeout=60 * MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"plan: counting a step of {counted(world_size, 'rank')} took over {MINUTES} minutes") from None
    if found.returncode:
        lines = [line.removeprefix("[rank0]: ") for line in found.stderr.strip().splitlines()]
        errors = [line for line in lines if _ERROR.match(line)] or lines or [f"exit status {found.returncode}"]
        raise UserError(f"plan: a step of {counted(world_size, 'rank')} cannot be counted: {errors[-1]}")
    return [counts_of_json(line) for line in found.stdout.splitlines()[-len(runs) :]]


def main() -> None:
    """Count the jobs of standard input."""
    import torch

    from cosmos_scale.profiling.fake_ranks import start_fake_ranks
    from cosmos_scale.profiling.fake_step import count_fake_step
    from cosmos_scale.profiling.planned_batch import planned_lengths

    jobs = json.load(sys.stdin)
    torch.set_num_threads(1)
    ranks = start_fake_ranks(jobs["world_size"])
    found = []
    for job in jobs["runs"]:
        config = RunConfig.model_validate_json(json.dumps(job["config"]))
        lengths = planned_lengths(config, job["samples"])
        found.append(count_fake_step(config, ranks, lengths, as_gpu=jobs["as_gpu"]).to_json())
    print("\n".join(found), flush=True)
    os._exit(0)  # DeepSpeed and the group would take seconds to end


if __name__ == "__main__":
    main()
