"""Evaluation against the loops that others use: pictures a second, in turns, with one model, threads and files.

- features: JPEG files to features, as retrieval makes them, against clip-benchmark's loop, which is restated here:
  torchvision's preprocessing in a DataLoader with a worker a core, encode_image of a batch, normalise.
- classification: the same with a classifier and the place of the right class, against clip-benchmark's loop with topk.
- segmentation: all windows of a picture in one batch, against a loop that encodes one window at a time and adds its
  enlarged logits into the whole picture's.

Both forms give the same numbers, which is checked. Peak memory is that of torch's tensors for one picture, counted.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/evaluation.py`

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import MEAN, STD
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RemoteConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.evaluation.classification import LOGIT_SCALE, ranks_of
from cosmos_scale.evaluation.datasets.pictures import FilePictures, PlacedFile, RankPictures
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.evaluation.segmentation.pixels import decode_upright, normalise_levels, resize_for_windows
from cosmos_scale.evaluation.segmentation.segmenter import Queries, Recipe, segment
from cosmos_scale.evaluation.segmentation.windows import sliding_windows
from cosmos_scale.host import usable_cores
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.photos import jpeg_photos

MODEL = "cc3m_vitb16"
ROUNDS, PICTURES, SEGMENTED = 10, 32, 4
BATCH, CLASSES = 16, 171  # classes: COCO-Stuff's
CLOSE = 1e-4  # of features, whose pictures are resized by Pillow in both loops
AGREE = 0.999  # of pixels: equal but for near ties


class Bench(NamedTuple):
    """What all loops share: JPEG files, a model, and a feature of length 1 for each class: [C, E]."""

    files: Sequence[Path]
    encoder: Encoder
    classes: Tensor


class JpegFiles(Dataset[tuple[Tensor, int]]):
    """Files with torchvision's preprocessing, as CLIP's and OpenCLIP's packages build it."""

    def __init__(self, files: Sequence[Path], image_size: int) -> None:
        self._files = files
        self._prepare = Compose(
            [
                Resize(image_size, interpolation=InterpolationMode.BICUBIC),
                CenterCrop(image_size),
                lambda picture: picture.convert("RGB"),
                ToTensor(),
                Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        """How many files there are."""
        return len(self._files)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """Decode and prepare a picture; its label is 0."""
        return self._prepare(Image.open(self._files[place])), 0


def make_bench(model: str, pictures: int, folder: Path) -> Bench:
    """Write photos, and draw a model of a shipped config's sizes."""
    files = [folder / f"{number:04d}.jpg" for number in range(pictures)]
    for file, photo in zip(files, jpeg_photos(pictures), strict=True):
        file.write_bytes(photo)
    torch.manual_seed(0)
    config = load_config(shipped_file(model), ["train.schedule_steps=100000"]).model
    network = CosmosModel(config)
    network.init_weights(torch.Generator().manual_seed(0))
    setting = Setting(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        image_size=config.vision.image_size,
        tokenizer=Tokenizer(config.text.context_length),
        max_pixels=10**9,
        background=KEEP,
        remote=RemoteConfig(),
    )
    return Bench(files, Encoder(network.eval(), setting), F.normalize(torch.randn(CLASSES, config.embed_dim), dim=-1))


@torch.no_grad()
def our_features(bench: Bench) -> Iterator[Tensor]:
    """Yield batches of features as the evaluators make them."""
    placed = [PlacedFile(str(file), file.name) for file in bench.files]
    pictures = FilePictures(placed, [0] * len(placed), ["any"])
    for images, _ in RankPictures(pictures, bench.encoder.setting, BATCH).batches():
        yield bench.encoder.images(images)


def loop_features(bench: Bench) -> Callable[[Bench], Iterator[Tensor]]:
    """Return clip-benchmark's loop, whose workers stay from one round to the next."""
    files = JpegFiles(bench.files, bench.encoder.setting.image_size)
    workers = usable_cores()
    loader = DataLoader(files, batch_size=BATCH, num_workers=workers, persistent_workers=True)

    @torch.no_grad()
    def features(bench: Bench) -> Iterator[Tensor]:
        for images, _ in loader:
            yield F.normalize(bench.encoder.model.encode_image(images), dim=-1)

    return features


def our_top5(bench: Bench) -> Tensor:
    """Return for each picture whether class 0 is among its first five [N] bool, as classification does."""
    ranks = []
    for features_NE in our_features(bench):
        logits_NC = LOGIT_SCALE * features_NE.float() @ bench.classes.T
        ranks.append(ranks_of(logits_NC, torch.zeros(len(logits_NC), dtype=torch.int64)))
    return torch.cat(ranks) < 5


def loop_top5(bench: Bench, features: Callable[[Bench], Iterator[Tensor]]) -> Tensor:
    """Return the same as clip-benchmark's loop does."""
    logits_NC = torch.cat([100.0 * features_NE @ bench.classes.T for features_NE in features(bench)])
    return (logits_NC.topk(5, 1, True, True)[1] == 0).any(1)


def recipe_of_bench(bench: Bench) -> Recipe:
    """The published recipe of most sets, in proportion to the model's image size."""
    crop = bench.encoder.setting.image_size
    return Recipe(short_side=crop * 3 // 2, crop=crop, stride=crop // 2)


def our_labels(bench: Bench, file: Path) -> Tensor:
    """Return the labels of a picture as segmentation makes them."""
    queries = Queries(bench.classes, (1,) * CLASSES)
    pixels = decode_upright(file.read_bytes(), bench.encoder.setting.max_pixels, KEEP)
    return segment(bench.encoder.model.visual, pixels, queries, recipe_of_bench(bench))


@torch.no_grad()
def loop_labels(bench: Bench, file: Path) -> Tensor:
    """Return the same by a loop over windows, with all logits at each pixel in memory."""
    recipe, tower = recipe_of_bench(bench), bench.encoder.model.visual
    pixels = decode_upright(file.read_bytes(), bench.encoder.setting.max_pixels, KEEP)
    picture_CHW = normalise_levels(resize_for_windows(pixels, recipe.short_side))
    height, width = picture_CHW.shape[1:]
    patch = tower.conv1.patch_size
    logits_CHW, count_HW = torch.zeros(CLASSES, height, width), torch.zeros(height, width)
    for top, bottom, left, right in sliding_windows(height, width, recipe.crop, recipe.stride):
        window = picture_CHW[None, :, top:bottom, left:right]
        features_PE = F.normalize(tower.patch_features(window, correlative=False)[1][0].float(), dim=-1)
        grid = (features_PE @ bench.classes.T).T.unflatten(1, ((bottom - top) // patch, (right - left) // patch))
        logits_CHW[:, top:bottom, left:right] += F.interpolate(
            grid[None], (bottom - top, right - left), mode="bilinear", align_corners=False
        )[0]
        count_HW[top:bottom, left:right] += 1
    mean = F.interpolate((logits_CHW / count_HW)[None], pixels.shape[:2], mode="bilinear", align_corners=False)[0]
    return (recipe.logit_scale * mean).softmax(0).argmax(0)


def in_turns(
    ours: Callable[[], object], loop: Callable[[], object], rounds: int, advance: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    """Return the seconds of both forms, each once a round, in turns the first; a first round is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for seconds, form in ((times[0], ours), (times[1], loop))[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            form()
            if number:
                seconds.append(time.perf_counter() - began)
        advance(1)
    return times


def check_same(bench: Bench, features: Callable[[Bench], Iterator[Tensor]]) -> None:
    """Raise ValueError where the two forms do not give the same numbers."""
    mine, theirs = (torch.cat(list(form(bench))) for form in (our_features, features))
    worst = float((mine - theirs).abs().max())
    labels = [form(bench, bench.files[0]) for form in (our_labels, loop_labels)]
    agree = float((labels[0] == labels[1]).float().mean())
    if worst > CLOSE or agree < AGREE:
        raise ValueError(f"features differ by {worst:.1e} and labels agree on {agree:.2%}: the forms are not the same")


def figures(bench: Bench, rounds: int, segmented: int) -> list[Figure]:
    """Measure each pair of forms in turns, and their peak memory."""
    features = loop_features(bench)
    check_same(bench, features)
    files = bench.files[:segmented]
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "features": (lambda: list(our_features(bench)), lambda: list(features(bench)), len(bench.files)),
        "classification": (lambda: our_top5(bench), lambda: loop_top5(bench, features), len(bench.files)),
        "segmentation": (
            lambda: [our_labels(bench, file) for file in files],
            lambda: [loop_labels(bench, file) for file in files],
            segmented,
        ),
    }
    against = "clip-benchmark's loop, restated"
    loops = {"features": against, "classification": against, "segmentation": "windows one by one"}
    found = []
    with progress_bar("rounds", len(pairs) * (rounds + 1), show=True) as advance:
        for name, (ours, loop, pictures) in pairs.items():
            mine, theirs = in_turns(ours, loop, rounds, advance)
            medians = statistics.median(mine), statistics.median(theirs)
            note = f"{pictures} photos, median of {rounds} rounds in turns"
            ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f} in a round"
            found += [
                Figure(f"evaluation_{name}", pictures / medians[0], "pictures/s", note),
                Figure(f"evaluation_{name}_loop", pictures / medians[1], "pictures/s", f"{loops[name]}; {note}"),
                Figure(
                    f"evaluation_{name}_speedup", statistics.median(ratios), "x", f"of {loops[name]}; {note}, {spread}"
                ),
            ]
    for form, end, what in ((our_labels, "", "ours"), (loop_labels, "_loop", loops["segmentation"])):
        peak = peak_bytes(partial(form, bench, files[0])) / 2**20
        note = f"{what}; tensors of one picture beside the model, {CLASSES} classes"
        found.append(Figure(f"evaluation_segmentation_peak{end}", peak, "MiB", note))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("evaluation", (__doc__ or "").partition("\n")[0], ("", "--model demo --rounds 9"))
    parser.add_argument("--model", default=MODEL, metavar="CONFIG", help=f"a shipped run config; default: {MODEL}")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help=f"default: {ROUNDS}")
    parser.add_argument("--pictures", type=positive, default=PICTURES, metavar="N", help=f"default: {PICTURES}")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        bench = make_bench(arguments.model, arguments.pictures, Path(folder))
        measured = figures(bench, arguments.rounds, min(SEGMENTED, arguments.pictures))
    report(f"Evaluation, {arguments.model} on the CPU", measured, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
