"""Memory of the loss on one rank of very many: peak beside the gathered features, by the samples of all ranks.

This process plays rank 0 of 512 to 32,768 ranks of 32 samples each (torch's fake process group), with bfloat16 features
of width 512, 8 image views and 8 captions, two of each global. Counted is what torch's allocator holds at most during a
loss with all gradients, less the gathered columns themselves, 6 kB a sample. Columns are taken in parts; for comparison
the same loss also takes all of them at once, where that fits. Numbers of bytes are the same on every machine.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/loss_memory.py`

import torch
from torch.nn.functional import normalize

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.loss.cosmos_loss import COLUMNS_AT_ONCE, CosmosLoss
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.testing.allocation import peak_bytes

VIEWS, GLOBAL_VIEWS, WIDTH, RANK_SAMPLES = 8, 2, 512, 32
SAMPLES = (16_384, 65_536, 262_144, 1_048_576)
MOST_AT_ONCE = 65_536  # samples whose columns are also taken all at once
PAIRS = (
    GLOBAL_VIEWS * VIEWS + 2 * VIEWS * 2 * GLOBAL_VIEWS
)  # of views: of captions and images, of students and teachers
A_TENTH = 8e9  # bytes of a GPU's 80 GB
GATHERED = 3 * GLOBAL_VIEWS * WIDTH * 2  # bytes of a sample's columns


def drawn_features() -> tuple[Features, TeacherFeatures]:
    """Return one rank's features."""
    generator = torch.Generator().manual_seed(0)

    def views(count: int) -> torch.Tensor:
        drawn = torch.randn(count, RANK_SAMPLES, WIDTH, generator=generator)
        return normalize(drawn, dim=-1).to(torch.bfloat16)

    scale = torch.tensor([1 / 0.07]).log()
    features = Features(views(VIEWS), views(VIEWS), views(VIEWS), views(VIEWS), scale, scale.clone())
    return features, TeacherFeatures(views(GLOBAL_VIEWS), views(GLOBAL_VIEWS))


def measure(samples: int, columns_at_once: int) -> tuple[float, float]:
    """Return the peak in bytes beside the gathered columns, and the seconds that the loss takes."""
    start_fake_ranks(samples // RANK_SAMPLES)
    loss, features = CosmosLoss("true", columns_at_once=columns_at_once), drawn_features()
    began = time.perf_counter()
    peak = peak_bytes(lambda: loss(*features))
    return peak - GATHERED * samples, time.perf_counter() - began


def figures(most_samples: int) -> list[Figure]:
    """Measure all numbers of samples up to a limit."""
    cases = [(samples, COLUMNS_AT_ONCE, "") for samples in SAMPLES if samples <= most_samples]
    cases += [(samples, 2**40, "_at_once") for samples in SAMPLES if samples <= min(most_samples, MOST_AT_ONCE)]
    found = []
    with progress_bar("losses", len(cases), show=True) as advance:
        for samples, columns_at_once, end in cases:
            peak, seconds = measure(samples, columns_at_once)
            how = "all columns at once" if end else f"{columns_at_once:,} columns at a time"
            note = f"peak beside {GATHERED * samples / 2**30:.2f} GiB of gathered features, {how}; took {seconds:.0f} s"
            found.append(Figure(f"loss_memory_{samples}{end}", peak / 2**20, "MiB", note))
            advance(1)
    return [*found, *sample_figures(found)]


def sample_figures(measured: Sequence[Figure]) -> list[Figure]:
    """Return bytes that a sample takes: by its columns' shapes, and what more samples took where all columns are taken.

    measured: the peaks in MiB.
    """
    peaks = {figure.name: figure.value * 2**20 for figure in measured}
    found = [
        Figure(
            "loss_gathered_sample", GATHERED, "bytes/sample", "of gathered features: 3 kinds of global views, in bf16"
        ),
        Figure(
            "loss_statistics_sample", 4 * PAIRS, "bytes/sample", f"a float32 number for each of {PAIRS} pairs of views"
        ),
        Figure(
            "loss_ring_samples", A_TENTH / GATHERED, "samples", f"whose gathered features take {A_TENTH / 1e9:.0f} GB"
        ),
    ]
    few, many = (f"loss_memory_{samples}_at_once" for samples in SAMPLES[:2])
    if many in peaks:
        each = (peaks[many] - peaks[few]) / (SAMPLES[1] - SAMPLES[0])
        note = f"all columns at once; {SAMPLES[-1]:,} samples would take {each * SAMPLES[-1] / 2**30:.0f} GiB"
        found.append(Figure("loss_at_once_sample", each, "bytes/sample", note))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("loss_memory", __doc__ or "", ("", "--samples 65536"))
    parser.add_argument(
        "--samples", type=positive, default=SAMPLES[-1], metavar="N", help=f"at most; default: {SAMPLES[-1]:,}"
    )
    arguments = parser.parse_args(argv)
    report("Memory of the loss on one of many ranks", figures(arguments.samples), arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
