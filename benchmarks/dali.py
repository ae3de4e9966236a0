"""What DALI takes from a loader's worker, and what it costs where it runs: the GPU, or this CPU without one.

The photos are those of benchmarks/loader.py, with 2 views of 224 and 6 of 96 pixels. Both decoders take turns batch by
batch. A worker's work is measured as processor time of one thread. So is DALI's work on a CPU; on a GPU the time until
the GPU has done all is measured.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/dali.py`

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import DaliConfig, ViewsConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.crop_colour import colour_crops_
from cosmos_scale.data.decode.dali import DaliDecoder, Encoded, picture_for_dali, require_dali, stack
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.errors import UserError
from cosmos_scale.testing.photos import PIXELS, jpeg_photos

PHOTOS, ROUNDS, BATCH = 256, 5, 32
SIDE = 224
VIEWS = ViewsConfig()
MAX_PIXELS = 10 * PIXELS

T = TypeVar("T")
Batches = Sequence[tuple[int, list[bytes]]]


def by_torch(first: int, photos: list[bytes], batch: Views) -> None:
    """Do all of the CPU decoder's work, as a worker does."""
    for place, photo in enumerate(photos):
        picture = decode_rgbx(photo, MAX_PIXELS)
        plan = plan_views(VIEWS, SIDE, SampleKey(0, 0, first + place), *picture.shape[:2])
        execute(picture, plan, batch.global_crops[:, place], batch.local_crops[:, place])


def for_dali(first: int, photos: list[bytes]) -> Encoded:
    """Do a worker's work for DALI: check photos, plan views, and put both together."""
    pictures, plans = [], []
    for sample, photo in enumerate(photos, first):
        picture, height, width = picture_for_dali(photo, MAX_PIXELS)
        pictures.append(picture)
        plans.append(plan_views(VIEWS, SIDE, SampleKey(0, 0, sample), height, width))
    return stack(pictures, plans)


def colour_global_crops(encoded: Encoded, device: torch.device) -> Callable[[], None]:
    """Return a call that changes only the colour of a batch's global crops, which are noise here."""
    plan, samples = encoded.colour(slice(VIEWS.global_crops)), encoded.boxes.shape[1]
    shape = (VIEWS.global_crops, samples, SIDE, SIDE, 3)
    pixels = list(torch.randint(0, 256, shape, dtype=torch.uint8, device=device))
    views = torch.empty(VIEWS.global_crops, samples, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    return lambda: colour_crops_(views, pixels, *plan)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds that some work takes on a device, and its result."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - start, result


def measure(batches: Batches, rounds: int, device: torch.device) -> dict[str, float]:
    """Return milliseconds an image by part, medians of rounds."""
    size = len(batches[0][1])
    count = sum(len(photos) for _, photos in batches)
    decoder = DaliDecoder(VIEWS, SIDE, size, device, DaliConfig(threads=1 if device.type == "cpu" else 4, prefetch=0))
    on_cpu = Views(
        torch.empty(VIEWS.global_crops, size, 3, SIDE, SIDE, dtype=torch.uint8),
        torch.empty(VIEWS.local_crops, size, 3, VIEWS.local_size, VIEWS.local_size, dtype=torch.uint8),
    )

    here = torch.device("cpu")
    rounds_by_part: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        seconds: dict[str, float] = defaultdict(float)
        for first, photos in batches:
            seconds["torch_worker"] += timed(partial(by_torch, first, photos, on_cpu), here)[0]
            spent, encoded = timed(partial(for_dali, first, photos), here)
            seconds["worker"] += spent
            seconds["decoder"] += timed(partial(list, decoder.stream(iter([(encoded, None)]))), device)[0]
            seconds["colour"] += timed(colour_global_crops(encoded, device), device)[0]
        if number > 0:  # the first round fills caches
            for name, value in seconds.items():
                rounds_by_part[name].append(1000 * value / count)
    return {name: statistics.median(values) for name, values in rounds_by_part.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("dali", (__doc__ or "").partition("\n")[0], ("", "--rounds 9 --json dali.json"))
    parser.add_argument("--photos", type=int, default=PHOTOS, metavar="N", help=f"photos a round; default: {PHOTOS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measured rounds; default: {ROUNDS}")
    arguments = parser.parse_args(argv)
    for name in ("photos", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: {getattr(arguments, name)} must be at least 1")
    try:
        require_dali()
    except UserError as absent:
        print(f"nothing to measure: {absent}")
        return 0
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photos = jpeg_photos(arguments.photos)
    batches = [(start, photos[start : start + BATCH]) for start in range(0, len(photos), BATCH)]
    took = measure(batches, arguments.rounds, device)
    setting = f"{len(photos)} photos of {PIXELS / 1e6:g} MP in batches of {BATCH}, medians of {arguments.rounds} rounds"
    report(
        "Decoding by DALI",
        [
            Figure(
                "dali_worker_speedup",
                took["torch_worker"] / took["worker"],
                "x",
                f"a worker's work, decoder torch over decoder dali; {setting}",
            ),
            Figure("dali_worker_ms", took["worker"], "ms/image", f"check, plan and stack; {setting}"),
            Figure("dali_torch_worker_ms", took["torch_worker"], "ms/image", f"decode, plan and execute; {setting}"),
            Figure("dali_decoder_ms", took["decoder"], "ms/image", f"all of DALI's and colour's work on {device.type}"),
            Figure("dali_colour_ms", took["colour"], "ms/image", f"of it the global crops' colour, on {device.type}"),
        ],
        arguments.json,
    )
    return 0


if __name__ == "__main__":
    leave_after(main)
