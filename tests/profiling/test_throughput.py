"""What is said of the speed of steps: the operations of all ranks and steps, over time and peak."""

import math

import pytest
import torch

from cosmos_scale.profiling.executed import executed_flops
from cosmos_scale.profiling.flops import step_flops
from cosmos_scale.profiling.throughput import GIB, MOST_KEPT, RankWork, StepCounter, peak_memory, throughput
from cosmos_scale.testing.tiny import tiny_batch, tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_steps_of_a_record_are_added_up(world_size: int) -> None:
    """Lengths of many steps are counted at once: as many operations as step by step. Then nothing is left."""
    config, batches = tiny_config(), [tiny_batch(number) for number in range(MOST_KEPT + 3)]
    counter = StepCounter(config, CPU, world_size)
    for batch in batches:
        contents = {name: getattr(batch, name).to("meta") for name in ("global_crops", "local_crops", "captions")}
        counter.note(batch._replace(**contents))  # on a device that nobody can read
        batch.caption_lengths.zero_()  # as a loader does that writes the next batch there
    work = counter.take()
    again = [tiny_batch(number) for number in range(MOST_KEPT + 3)]
    assert work.needed == sum(step_flops(batch, config, world_size) for batch in again)
    share = executed_flops(again[-1], config, CPU, world_size) / step_flops(again[-1], config, world_size)
    assert work.executed == pytest.approx(share * work.needed)
    assert math.isnan(work.peak)
    assert counter.take().needed == 0


def test_shares_are_of_all_ranks_peaks() -> None:
    """Two ranks with other captions, and other chips: 6 and 2 TFLOP in 2 s, of peaks of 10 and 6 TFLOP/s."""
    work = [RankWork(6e12, 8e12, 10e12, int(3 * GIB)), RankWork(2e12, 4e12, 6e12, int(2 * GIB))]
    numbers = throughput(work, seconds=2.0, samples=64)
    assert numbers == pytest.approx(
        {
            "samples_per_second": 32.0,
            "samples_per_second_per_rank": 16.0,
            "tflops_per_rank": 2.0,
            "executed_tflops_per_rank": 3.0,
            "peak_memory_gib": 3.0,
            "mfu": 4 / 16,
            "hfu": 6 / 16,
        }
    )
    unknown = throughput([work[0], work[1]._replace(peak=math.nan)], seconds=2.0, samples=64)
    assert unknown.keys() == numbers.keys() - {"mfu", "hfu"}


def test_memory_of_a_cpu_is_that_of_the_process() -> None:
    before = peak_memory(CPU)
    held = torch.ones(2**26)  # 256 MiB
    assert peak_memory(CPU) >= max(before, held.nbytes)


@pytest.mark.gpu
def test_counting_on_a_gpu_waits_for_nothing() -> None:
    """The host counts while the device still works on the step."""
    device = torch.device("cuda", 0)
    config, batch = tiny_config(precision="bf16"), tiny_batch(0)
    expected, batch = step_flops(batch, config), batch.to(device)
    counter = StepCounter(config, device, 1)
    counter.note(batch)
    counter.take()  # the first call looks for back ends of attention
    torch.cuda.set_sync_debug_mode("error")
    try:
        counter.note(batch)
        work = counter.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert work.needed == expected < work.executed
    assert work.memory == torch.cuda.max_memory_reserved(device) > 0
