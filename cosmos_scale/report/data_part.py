"""The data's part of the report: what the towers see, how long captions are, and what could not be used."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.data.tools.contact_sheet import framed_original, to_image
from cosmos_scale.data.tools.inspect import survey, visits
from cosmos_scale.data.tools.inspect_report import histogram
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.report.figures import Bar, Drawn, draw_bars
from cosmos_scale.report.pictures import PagePicture, picture_of
from cosmos_scale.report.records import RunRecords, number_of
from cosmos_scale.words import counted

SAMPLES_SHOWN, SAMPLES_COUNTED = 4, 256
LONGEST_CAPTION = 4096  # tokens: so that nothing is cut off before it is counted
ORIGINAL_SIDE, CROP_SIDE = 280, 224  # pixels at most
LEAST_WAITED = 2  # ranks, for a histogram of who waits longest
MOST_RANKS = 64


class SeenSample(NamedTuple):
    """A sample as the towers see it. original: with a frame for each crop. captions: each with its kind."""

    title: str
    original: PagePicture
    global_crops: Sequence[PagePicture]
    local_crops: Sequence[PagePicture]
    captions: Sequence[tuple[str, str]]


def seen_samples(config: RunConfig) -> list[SeenSample]:
    """Return the crops and captions of the first samples that the run's first epoch visits."""
    found = []
    tokenize = Tokenizer(config.model.text.context_length)
    global_captions = config.data.captions.global_count
    for original, views, captions in visits(config, tokenize, epoch=0, first=0, count=SAMPLES_SHOWN):
        framed = framed_original(original, len(views.global_crops), ORIGINAL_SIDE, ORIGINAL_SIDE)
        crops = {
            kind: [
                picture_of(to_image(view), f"{kind} crop {place}", width=CROP_SIDE, quality=88)
                for place, view in enumerate(of_kind, start=1)
            ]
            for kind, of_kind in (("global", views.global_crops), ("local", views.local_crops))
        }
        kinds = ["global" if place < global_captions else "local" for place in range(len(captions))]
        shown = picture_of(framed, "the picture, with a frame for each crop", width=ORIGINAL_SIDE)
        said = list(zip(kinds, captions, strict=True))
        found.append(SeenSample(original.title, shown, crops["global"], crops["local"], said))
    return found


def caption_lengths_of(config: RunConfig, name: str) -> Drawn:
    """Return a histogram of the captions' lengths in tokens, of some samples drawn at random. name: in the page."""
    found = survey(config, Tokenizer(LONGEST_CAPTION), samples=SAMPLES_COUNTED, workers=1, progress=False)
    both = found.tally.global_tokens + found.tally.local_tokens
    bins = histogram(both)
    kinds: dict[str, Counter[int]] = {"local": found.tally.local_tokens, "global": found.tally.global_tokens}
    bars = []
    for one in bins:
        last = max(both) if one.last is None else one.last
        heights = {
            kind: float(sum(count for length, count in lengths.items() if one.first <= length <= last))
            for kind, lengths in kinds.items()
        }
        bars.append(Bar(str(one.first) if one.first == last else f"{one.first}\N{EN DASH}{last}", heights))
    read = config.model.text.context_length
    cut = sum(count for length, count in both.items() if length > read)
    note = (
        f"{counted(both.total(), 'caption')} of {counted(found.tally.samples, 'sample')}; the text tower reads "
        f"{read} tokens, so that {100 * cut / max(1, both.total()):.1f} % are cut."
    )
    return draw_bars(name, "Length of captions", bars, "tokens, start and end included", "captions", note)


def substitutes_of(run: RunRecords) -> list[str]:
    """Return sentences on samples that were replaced, and on shards that were given up."""
    replaced = sum(number_of(record, "substituted") or 0.0 for record in run.train)
    said = []
    if run.train:
        samples = run.last_step * (run.global_batch or 0)
        share = f" of {samples:,}, {100 * replaced / samples:.3f} %" if samples else ""
        said.append(f"Samples replaced by others: {replaced:,.0f}{share}.")
    lost = {str(record.get("shard")): record["reason"] for record in run.damages if record.get("sample") is None}
    said += [f"Lost: {shard}: {reason}." for shard, reason in lost.items()]
    reasons = Counter(record["reason"] for record in run.damages if record.get("sample") is not None)
    said += [f"Damaged: {counted(times, 'sample')}: {reason}." for reason, times in reasons.most_common(10)]
    return said


def waits_by_rank(run: RunRecords, number: int, of: str) -> Drawn | None:
    """Return which rank waited longest for data how often; None for one rank.

    number: of the run, in the picture's name. of: what stands before the title.
    """
    ranks = Counter(int(rank) for record in run.train if (rank := number_of(record, "data_wait_rank")) is not None)
    world_size = run.world_size or max(ranks, default=0) + 1
    if world_size < LEAST_WAITED or not ranks:
        return None
    shown = range(world_size) if world_size <= MOST_RANKS else [rank for rank, _ in ranks.most_common(MOST_RANKS)]
    bars = [Bar(str(rank), {"records": float(ranks[rank])}) for rank in shown]
    note = "Equal bars are chance. One high bar: that rank's host reads its data more slowly."
    return draw_bars(f"data-wait-ranks-{number}", f"{of}Who waited longest for data", bars, "rank", "records", note)
