"""What lies in shards, measured on some of their samples: `cosmos-scale data inspect`.

Everything is counted by value. So the tallies of many processes add up exactly, and stay small for any number of
samples. Headers tell the pictures' sizes and formats; only pictures with transparency are decoded, to see whether it is
used. `data verify` reads pictures whole.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.batch import caption_lengths
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.orientation import UPRIGHT, orientation_of
from cosmos_scale.data.decode.picture import decode_rgbx, is_animated, is_transparent, open_picture
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.samples.captions import caption_pool, draw_captions
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey, reason_class
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.shards.index_report import Unindexed
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.tools.contact_sheet import Original, contact_sheet
from cosmos_scale.data.tools.passes import Pass, begin_pass, opened_index
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.data.training.worker import Tokenize
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.words import counted

SAMPLES_A_JOB = 64
SHOWN_SIDE = 224  # about the side of a global crop on a contact sheet
SHOWN_TEXT = 1000  # characters of a caption on it: more than a text tower reads
CHOICE_STREAM = 0x494E5350454354  # the choice of samples shares no random stream with the draws for a sample


@dataclass
class Tally:
    """Counts over samples, by value. Pixels, bytes and tokens as whole numbers.

    damaged: samples left out of all else, by reason. formats: by format and colour mode. sizes: by (width, height).
    sentences: by how many the sampler chooses from. global_tokens, local_tokens: captions by tokens, start and EOT
    included, before anything is cut off. transparent, turned, animated: pictures with transparent pixels, those whose
    EXIF tag says to turn them, and those of several frames, of which the first is read.
    """

    samples: int = 0
    transparent: int = 0
    turned: int = 0
    animated: int = 0
    image_bytes: int = 0
    text_bytes: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    sentences: Counter[int] = field(default_factory=Counter)
    global_tokens: Counter[int] = field(default_factory=Counter)
    local_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Add another tally's counts to this one's."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, one.name, mine + theirs)


class SourceCounts(NamedTuple):
    """What the index of one source says; size in bytes."""

    name: str
    shards: int
    samples: int
    size: int


class Survey(NamedTuple):
    """What `survey` found; `tally` is of `read` samples out of `total`.

    unindexed: what the index leaves out or has twice.
    """

    sources: list[SourceCounts]
    total: int
    read: int
    tally: Tally
    unindexed: Unindexed = Unindexed()


def survey(
    config: RunConfig,
    tokenize: Tokenize,
    *,
    samples: int | None,
    epoch: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Survey:
    """Read samples of the config's sources and count what they hold; captions are those of an epoch of the run.

    tokenize: texts to ids [N, L], with an L that cuts nothing off. samples: how many are read, drawn at random from the
    index by the run's seed; None: all.
    Raises: UserError where the index or a shard is missing or stale.
    """
    index = open_sources(config.data.sources, config.data.remote)
    index.check_tables(range(len(index.shard_samples)))
    reader = ShardReader(config.data.remote)
    reader.check(index.shard_files())
    reader.close()
    sources = [
        SourceCounts(
            source.name,
            shards=len(source.rows),
            samples=sum(row.samples for row in source.rows),
            size=sum(row.size for row in source.rows),
        )
        for source in index.sources
    ]
    chosen = len(index) if samples is None else min(samples, len(index))
    work = partial(_tally, begin_pass(config.data), config.seed, epoch, tokenize)
    tally = Tally()
    with progress_bar("reading samples", chosen, show=progress) as advance:
        for part in map_jobs(work, _jobs(len(index), chosen, config.seed), workers):
            tally.add(part)
            advance(part.samples + part.damaged.total())
    return Survey(sources, len(index), chosen, tally, index.unindexed())


def _jobs(total: int, chosen: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield sample ids in ascending order, some at a time: neighbours lie in one shard."""
    if chosen == total:
        for first in range(0, total, SAMPLES_A_JOB):
            yield np.arange(first, min(first + SAMPLES_A_JOB, total))
        return
    key = np.array([seed, CHOICE_STREAM], dtype=np.uint64)
    ids = np.sort(np.random.Generator(np.random.Philox(key=key)).choice(total, chosen, replace=False))
    yield from np.split(ids, range(SAMPLES_A_JOB, chosen, SAMPLES_A_JOB))


@lru_cache(maxsize=1)
def _opened_reader(pass_: Pass) -> ShardReader:
    """One reader a process, which keeps shards and connections open from job to job."""
    return ShardReader(pass_.data.remote)


def _tally(pass_: Pass, seed: int, epoch: int, tokenize: Tokenize, samples: NDArray[np.int64]) -> Tally:
    index, reader = opened_index(pass_), _opened_reader(pass_)
    captions = pass_.data.captions
    tally = Tally()
    for sample in samples.tolist():
        location = index.locate(sample)
        try:
            image_bytes, document = reader.read(location)
            kind, width, height = picture_header(image_bytes, pass_.data.max_pixels)
            pool = caption_pool(captions.sampling, document, captions.keys)
            texts = draw_captions(captions, document, SampleKey(seed, epoch, sample))
        except DamagedSample as damage:
            tally.damaged[reason_class(str(damage), numbers=False)] += 1
            continue
        tally.samples += 1
        tally.transparent += is_transparent(image_bytes, pass_.data.max_pixels)
        tally.turned += orientation_of(image_bytes) != UPRIGHT
        tally.animated += is_animated(image_bytes, pass_.data.max_pixels)
        tally.image_bytes += location.entry.image_size
        tally.text_bytes += location.entry.text_size
        tally.formats[kind] += 1
        tally.sizes[width, height] += 1
        tally.sentences[len(pool)] += 1
        lengths = caption_lengths(tokenize(texts)).tolist()
        tally.global_tokens.update(lengths[: captions.global_count])
        tally.local_tokens.update(lengths[captions.global_count :])
    return tally


def picture_header(image_bytes: bytes, max_pixels: int) -> tuple[str, int, int]:
    """Return a picture's format with its colour mode, width and height, without decoding it.

    Raises DamagedSample.
    """
    try:
        with open_picture(image_bytes, max_pixels) as image:
            return f"{image.format} {image.mode}", image.width, image.height
    except DamagedSample:
        raise
    except Exception as error:  # broken bytes raise almost any type: OSError, SyntaxError, ValueError, struct.error
        raise DamagedSample(f"no picture header: {error}") from error


class Visit(NamedTuple):
    """A sample that training visits: what its views are made of, its views, and its captions, global ones first."""

    original: Original
    views: Views
    captions: list[str]


def draw_visits(config: RunConfig, tokenize: Tokenize, path: Path, *, epoch: int, first: int, count: int) -> None:
    """Write a contact sheet of the samples that training visits from one position of an epoch on, with their views.

    As `visits`, whose errors it raises.
    """
    shown = visits(config, tokenize, epoch=epoch, first=first, count=count)
    zoom = max(1, SHOWN_SIDE // config.model.vision.image_size)  # views of few pixels would be small on a screen
    rows = [(visit.views, visit.captions) for visit in shown]
    contact_sheet(rows, path, config.data.captions.global_count, zoom, [visit.original for visit in shown])


def visits(config: RunConfig, tokenize: Tokenize, *, epoch: int, first: int, count: int) -> list[Visit]:
    """Return the samples that training visits from one position of an epoch on, with their views and captions.

    tokenize: needed by the loader alone; a visit has texts.
    Raises: UserError where there is no such position, a shard is missing or stale, or too many samples are damaged.
    """
    # In batches of one sample a step is a position. Everything else is as in the run, substitutes included.
    one = config.train.model_copy(update={"global_batch": 1, "epoch_steps_multiple": 1})
    data = config.data.model_copy(update={"workers": 0, "max_damaged": 1.0, "decoder": "torch"})
    config = config.model_copy(update={"train": one, "data": data})
    index = open_sources(data.sources, data.remote)
    order = EpochOrder(index.source_shards(), config.seed, data.window)
    if first >= order.samples:
        raise UserError(
            f"--first {first}: an epoch of this data has {counted(order.samples, 'position')}, counted from 0"
        )
    count = min(count, order.samples - first)
    places = order.visits(epoch, np.arange(first, first + count))
    side = config.model.vision.image_size
    index.check_tables(range(len(index.shard_samples)))
    reader = ShardReader(data.remote)
    reader.check(index.shard_files())
    found = []
    loader = TrainLoader(config, index, tokenize, 0, 1)
    with closing(loader.batches(epoch * order.samples + first)) as batches, _nothing_to_lose():
        for position, batch in enumerate(islice(batches, count)):
            sample = int(batch.sample_ids[0])
            wanted, repeat = int(places.samples[position]), int(places.repeats[position])
            key = SampleKey(config.seed, epoch, sample, repeat)
            location = index.locate(sample)
            image_bytes, document = reader.read(location)
            picture = decode_rgbx(image_bytes, data.max_pixels, data.background)
            boxes = plan_views(data.views, side, key, *picture.shape[:2]).boxes
            title = f"{location.entry.key} in {location.shard}, position {first + position:,} of epoch {epoch}"
            if sample != wanted:
                title += f", in place of damaged {index.locate(wanted).entry.key}"
            texts = draw_captions(data.captions, document, key)
            shown = [text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} \u2026" for text in texts]
            views = Views(batch.global_crops[:, 0], batch.local_crops[:, 0])
            found.append(Visit(Original(title, picture, boxes), views, shown))
    reader.close()
    return found


@contextmanager
def _nothing_to_lose() -> Iterator[None]:
    """Turn a lost shard into the user's error: there is no run that could go on without the shard."""
    try:
        yield
    except ShardsToGiveUp as loss:
        raise UserError(str(loss)) from loss
