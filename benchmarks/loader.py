"""CPU time an image: from JPEG and captions to eight normalised views and token ids, against the published recipe.

One process, one thread, 256 photos of about 0.24 megapixels. Both sides decode once and make 2 views of 224 and 6 of 96
pixels as normalised float32; ours writes levels of 8-bit pixels into a batch, as a worker does, and then cuts the batch
into normalised patches, as the image tower does. Captions are drawn from parsed json. The sides take turns
every few photos, so that other programs slow both sides alike. Processor time counts, not the time of day.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/loader.py`

import torch
from torch import Tensor

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import MEAN, STD
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import CaptionsConfig, ViewsConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import blur_and_solarise, crop, execute, recolour, split_channels
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.kernels.patches import level_values, normalised_patches
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.photos import PIXELS, caption_documents, jpeg_photos
from cosmos_scale.testing.published_views import (
    GLOBAL_CROPS,
    GLOBAL_SIDE,
    LOCAL_CROPS,
    LOCAL_SIDE,
    Lap,
    published_texts,
    published_views,
    seed_published,
)

PHOTOS, ROUNDS = 256, 5
TURN = 16  # photos that one side takes before the other's turn; also our batch
MAX_PIXELS = 10 * PIXELS
CONTEXT_LENGTH = 77
VIEWS = ViewsConfig(global_crops=GLOBAL_CROPS, local_crops=LOCAL_CROPS, local_size=LOCAL_SIDE)
CAPTIONS = CaptionsConfig()
PIXEL_PARTS = ("decode", "plan", "crops", "colour", "blur", "channels", "normalise")
PUBLISHED_PARTS = ("decode", "crops", "colour", "blur", "normalise")
PATCH_SIZE = 16
TEXT_PARTS = ("captions", "tokens")

Seconds = defaultdict[str, float]
Samples = Sequence[tuple[int, bytes, dict[str, Any]]]


class Stopwatch:
    """Adds processor seconds to the name that each lap is given."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(float)
        self._last = time.process_time()

    def restart(self) -> None:
        """Leave out what has passed since the last lap."""
        self._last = time.process_time()

    def __call__(self, name: str) -> None:
        """End a lap."""
        now = time.process_time()
        self.seconds[name] += now - self._last
        self._last = now


class Ours:
    """Our side, with the batch that it writes into."""

    def __init__(self) -> None:
        self.batch = Views(
            torch.empty(GLOBAL_CROPS, TURN, 3, GLOBAL_SIDE, GLOBAL_SIDE, dtype=torch.uint8),
            torch.empty(LOCAL_CROPS, TURN, 3, LOCAL_SIDE, LOCAL_SIDE, dtype=torch.uint8),
        )
        self._tokenizer = Tokenizer(CONTEXT_LENGTH)
        self._values = level_values(MEAN, STD, torch.float32)

    def views(self, samples: Samples) -> Tensor:
        """Make the views of up to TURN samples, and return their patches."""
        for place, (number, photo, _) in enumerate(samples):
            picture = decode_rgbx(photo, MAX_PIXELS)
            plan = plan_views(VIEWS, GLOBAL_SIDE, SampleKey(0, 0, number), *picture.shape[:2])
            execute(picture, plan, *(crops[:, place] for crops in self.batch))
        return self._patches(len(samples))

    def _patches(self, samples: int) -> Tensor:
        crops = [kind[:, :samples].flatten(0, 1) for kind in self.batch]
        return normalised_patches(crops, PATCH_SIZE, self._values)

    def views_by_parts(self, samples: Samples, lap: Lap) -> None:
        """Make the same views, calling `lap` after each part."""
        for place, (number, photo, _) in enumerate(samples):
            picture = decode_rgbx(photo, MAX_PIXELS)
            lap("decode")
            plan = plan_views(VIEWS, GLOBAL_SIDE, SampleKey(0, 0, number), *picture.shape[:2])
            lap("plan")
            outs = [crop for crops in self.batch for crop in crops[:, place]]
            for view, out in enumerate(outs):
                pixels = crop(picture, plan, view)
                lap("crops")
                pixels = recolour(pixels, plan, view)
                lap("colour")
                pixels = blur_and_solarise(pixels, plan, view)
                lap("blur")
                split_channels(pixels, out)
                lap("channels")
        self._patches(len(samples))
        lap("normalise")

    def texts(self, samples: Samples, lap: Lap) -> Tensor:
        """Draw the captions of samples and return their ids, [K * B, L]."""
        captions = [draw_captions(CAPTIONS, document, SampleKey(0, 0, number)) for number, _, document in samples]
        lap("captions")
        ids = self._tokenizer([texts[k] for k in range(CAPTIONS.count) for texts in captions])
        lap("tokens")
        return ids


def measure(photos: int, rounds: int) -> tuple[dict[str, list[Seconds]], float]:
    """Return each side's seconds by part in each round, and the mean size of a photo in bytes.

    "pixels" is all of a side's work on pixels, timed without a stop between parts; a second pass times the parts.
    """
    samples = list(zip(range(photos), jpeg_photos(photos), caption_documents(photos), strict=True))
    turns = [samples[start : start + TURN] for start in range(0, photos, TURN)]
    ours = Ours()
    results: dict[str, list[Seconds]] = {"ours": [], "published": []}
    with progress_bar("rounds", rounds + 1, show=True) as advance:
        for number in range(rounds + 1):
            seed_published(number)
            watches = {name: Stopwatch() for name in results}
            for turn in turns:
                _our_turn(ours, turn, watches["ours"])
                _published_turn(turn, watches["published"])
            if number > 0:  # the first round fills caches on both sides
                for name, watch in watches.items():
                    results[name].append(watch.seconds)
            advance(1)
    return results, statistics.mean(len(photo) for _, photo, _ in samples)


def _our_turn(ours: Ours, turn: Samples, watch: Stopwatch) -> None:
    watch.restart()
    ours.views(turn)
    watch("pixels")
    ours.views_by_parts(turn, watch)
    watch.restart()
    ours.texts(turn, watch)


def _published_turn(turn: Samples, watch: Stopwatch) -> None:
    watch.restart()
    for _, photo, _ in turn:
        published_views(photo, _go_on)
    watch("pixels")
    for _, photo, _ in turn:
        published_views(photo, watch)
    watch.restart()
    for _, _, document in turn:
        published_texts(document, watch)


def _go_on(part: str) -> None:
    """Take no time: a lap for work that is timed as a whole."""


def figures(photos: int, rounds: int) -> list[Figure]:
    """Measure both sides; milliseconds are medians of rounds."""
    results, photo_bytes = measure(photos, rounds)
    setting = (
        f"{photos} photos of {PIXELS / 1e6:g} MP ({photo_bytes / 1000:.0f} kB), {GLOBAL_CROPS} x {GLOBAL_SIDE} + "
        f"{LOCAL_CROPS} x {LOCAL_SIDE}, one thread, medians of {rounds} rounds in turns"
    )

    def milliseconds(side: str, of: Callable[[Seconds], float]) -> float:
        return 1000 * statistics.median(of(seconds) for seconds in results[side]) / photos

    def speedup(
        name: str, what: str, of: Callable[[Seconds], float], ours_of: Callable[[Seconds], float] | None = None
    ) -> Figure:
        ours, published = milliseconds("ours", ours_of or of), milliseconds("published", of)
        return Figure(name, published / ours, "x", f"{what}: {ours:.3g} ms an image over {published:.3g}; {setting}")

    def total(seconds: Seconds) -> float:
        return seconds["pixels"] + seconds["captions"] + seconds["tokens"]

    def part(side: str, name: str) -> Figure:
        return Figure(f"loader_{side}_{name}_ms", milliseconds(side, lambda seconds: seconds[name]), "ms/image", name)

    return [
        speedup("loader_speedup", "decode to normalised patches", lambda seconds: seconds["pixels"]),
        speedup(
            "loader_worker_speedup",
            "a loader process's part of it: without our normalisation, which the towers do",
            lambda seconds: seconds["pixels"],
            lambda seconds: seconds["pixels"] - seconds["normalise"],
        ),
        speedup("loader_total_speedup", "with captions drawn and token ids", total),
        *(part("ours", name) for name in PIXEL_PARTS + TEXT_PARTS),
        *(part("published", name) for name in PUBLISHED_PARTS + TEXT_PARTS),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("loader", (__doc__ or "").partition("\n")[0], ("", "--rounds 9 --json loader.json"))
    parser.add_argument("--photos", type=int, default=PHOTOS, metavar="N", help=f"photos a round; default: {PHOTOS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measured rounds; default: {ROUNDS}")
    arguments = parser.parse_args(argv)
    for name in ("photos", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: {getattr(arguments, name)} must be at least 1")
    torch.set_num_threads(1)
    report("CPU time of the loader's work", figures(arguments.photos, arguments.rounds), arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
