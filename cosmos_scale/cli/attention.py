"""The command `cosmos-scale attention`: attention maps of pictures and captions, as pictures and as a page."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_scale.cli.arguments import add_checkpoint, path, place, positive, say, say_notes, with_examples
from cosmos_scale.cli.earlier_files import EarlierFiles
from cosmos_scale.cli.eval_retrieval import DATASETS
from cosmos_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cosmos_scale.evaluation.attention_pictures import SampleMaps
    from cosmos_scale.evaluation.evaluator import Encoder

EXAMPLES = """\
examples:
  cosmos-scale attention --checkpoint runs/demo/checkpoints --image dog.jpg --caption "a dog on a beach" --out maps
  cosmos-scale attention --checkpoint runs/demo/checkpoints --data shards/held_out --samples 20 --out maps
  cosmos-scale attention --checkpoint runs/demo/checkpoints --dataset coco_val2017 --data /data/coco --out maps --json
"""
PAGE = "attention.html"
CAPTION_WIDTH = 26  # in the table
SAMPLES = 12
OF_DATA = ("dataset", "index", "captions", "samples")  # options that say something of --data


def add_attention_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = commands.add_parser("attention", help="what a model looks at in pictures and captions")
    with_examples(parser, EXAMPLES)
    parser.description = (
        "Draw which patches of a picture a caption looks at, and which words the picture looks at: a PNG for each\n"
        f"sample, and {PAGE} with all of them, which opens in any browser and needs no other file."
    )
    add_checkpoint(parser)
    parser.add_argument("--image", type=path, action="append", metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--caption", action="append", metavar="TEXT", help="the caption of each --image, in order")
    parser.add_argument("--data", type=place, metavar="PLACE", help="instead: samples, as in eval retrieval")
    parser.add_argument("--dataset", choices=DATASETS, metavar="NAME", help="of --data, as in eval retrieval")
    parser.add_argument("--index", type=place, metavar="DIR", help="folder of the index; default: beside the shards")
    parser.add_argument("--captions", metavar="KEY", help="key of the captions, of which the first is taken")
    parser.add_argument("--samples", type=positive, metavar="N", help=f"first samples of --data (default: {SAMPLES})")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="default: student")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for the pictures and the page")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each sample instead of a table")
    parser.set_defaults(command="attention", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from cosmos_scale.checkpoint.interchange.reading import of_newest
    from cosmos_scale.console import make_console
    from cosmos_scale.evaluation.attention_maps import peak_of, require_heads, strongest
    from cosmos_scale.evaluation.attention_pictures import write_page, write_picture
    from cosmos_scale.evaluation.bar import WorkBar
    from cosmos_scale.evaluation.loading import load_encoder, models_of
    from cosmos_scale.files import make_folder

    _check(arguments)

    def read(checkpoint: Path) -> "tuple[Path, str, Encoder]":
        ((weights, which),) = models_of(checkpoint, arguments.weights).items()
        return checkpoint, weights, load_encoder(checkpoint, which, arguments.device, arguments.activation)

    checkpoint, weights, encoder = of_newest(arguments.checkpoint, read, say)
    require_heads(encoder.model, str(checkpoint))
    say_notes(checkpoint, encoder.notes)
    total = len(arguments.image) if arguments.image else arguments.samples or SAMPLES
    pages = []
    table = Table("", "caption", "on words", "strongest word", "peak (top, left)")
    make_folder(arguments.out)
    earlier = EarlierFiles([arguments.out])
    with WorkBar(show=True) as bar:
        for sample in _samples(arguments, encoder):
            pages.append(sample)
            picture = arguments.out / f"attention-{len(pages):04d}.png"
            write_picture(sample, picture)
            bar.report("samples", len(pages), total)
            if arguments.json:
                named = {"checkpoint": str(checkpoint), "weights": weights}
                print(json.dumps({**named, **_as_json(sample), "png": str(picture)}))
            top, left = peak_of(sample.maps.image_map)
            share, peak = f"{100 * sample.maps.share_on_words:.1f} %", f"{100 * top:.0f} %, {100 * left:.0f} %"
            caption = textwrap.shorten(sample.caption, CAPTION_WIDTH, placeholder="...")
            table.add_row(f"{len(pages)}", caption, share, strongest(sample.words), peak)
    if not pages:
        raise UserError(f"{arguments.data or arguments.image[0]}: no sample can be used")
    page = arguments.out / PAGE
    write_page(pages, page, "Attention maps", f"{weights} of {checkpoint}")
    earlier.say(arguments.out)
    if not arguments.json:
        console = make_console()
        console.print(table)
        console.print(str(page), style="italic", highlight=False, soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError unless there are pictures with as many captions, or samples."""
    images, captions = arguments.image or [], arguments.caption or []
    if bool(images) == bool(arguments.data):
        raise UserError("--image and --data: exactly one of both must be there; --image needs --caption")
    lone = next((name for name in OF_DATA if images and getattr(arguments, name) is not None), None)
    if lone is not None:
        raise UserError(f"--{lone}: {getattr(arguments, lone)} is for samples of --data, not for --image")
    if arguments.data and captions:
        raise UserError("--caption: is for --image; samples of --data have captions of their own")
    if len(images) != len(captions):
        raise UserError(f"--caption: {len(captions)} for {len(images)} of --image; rule: one for each picture")
    empty = next((place for place, caption in enumerate(captions, start=1) if not caption.strip()), None)
    if empty is not None:
        raise UserError(f"--caption: number {empty} is empty; rule: a text")
    for number, caption in enumerate(captions, start=1):
        if caption.encode(errors="ignore").decode() != caption:
            raise UserError(f"--caption: number {number} is {caption!r}, which is no UTF-8; rule: a text in UTF-8")


def _samples(arguments: argparse.Namespace, encoder: "Encoder") -> "Iterator[SampleMaps]":
    """Yield each sample that can be used, with its maps."""
    from cosmos_scale.evaluation.attention_maps import attention_maps, encode_pairs, levels_of, word_weights
    from cosmos_scale.evaluation.attention_pictures import SampleMaps

    setting, model = encoder.setting, encoder.model
    for title, caption, image in _pictures(arguments, encoder):
        ids = setting.tokenizer([caption])
        (pair,) = encode_pairs(model, image[None].to(setting.device), ids.to(setting.device))
        maps = attention_maps(model, pair, image.shape[1] // model.visual.conv1.patch_size)
        words = word_weights(caption, maps, setting.tokenizer)
        yield SampleMaps(title, caption, levels_of(image).numpy(), maps, words)


def _pictures(arguments: argparse.Namespace, encoder: "Encoder") -> "Iterator[tuple[str, str, Tensor]]":
    """Yield the name, the caption and the crop of each sample; a damaged sample of --data is named and left out."""
    from cosmos_scale.cli.eval_command import section_of
    from cosmos_scale.config import RetrievalConfig
    from cosmos_scale.data.decode.torch_cpu import evaluation_crop
    from cosmos_scale.data.samples.sample import DamagedSample
    from cosmos_scale.evaluation.datasets.captioned_sets import open_captioned
    from cosmos_scale.evaluation.datasets.pictures import PlacedFile, placed_pixels

    setting = encoder.setting
    if arguments.image:
        for file, caption in zip(arguments.image, arguments.caption, strict=True):
            try:
                pixels = placed_pixels(PlacedFile(str(file), str(file)), setting)
            except DamagedSample as damage:
                raise UserError(f"{file}: {damage}") from damage
            yield Path(file).name, caption, evaluation_crop(pixels, setting.image_size)
        return
    dataset = arguments.dataset or "shards"
    where = "shards" if dataset == "shards" else "data"
    keys = {"dataset": dataset, "index": arguments.index, "captions": arguments.captions}
    section = section_of("retrieval", {where: arguments.data, "max_samples": arguments.samples or SAMPLES, **keys})
    assert isinstance(section, RetrievalConfig)
    gallery = open_captioned(section, setting)
    for batch in gallery.batches(0, 1, 1):
        name = gallery.name(int(batch.sample_ids[0]))
        yield name, batch.texts[0][0], batch.images[0]


def _as_json(sample: "SampleMaps") -> dict[str, Any]:
    maps = sample.maps
    words = [
        {"word": one.word, "tokens": one.tokens, "weights": one.weights, "value": one.value} for one in sample.words
    ]
    return {
        "image": sample.title,
        "caption": sample.caption,
        "share_on_words": maps.share_on_words,
        "words": words,
        "image_weights": maps.image_weights.mean(0).tolist(),
    }
