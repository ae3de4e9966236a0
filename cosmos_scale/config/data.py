"""The typed configuration of a run's data: sources, views, captions, and how they are loaded."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import (
    MAY_DIFFER_BY_HOST,
    RESUME_MAY_CHANGE,
    Fraction,
    Place,
    Range,
    Section,
    check_range,
    refuse,
)

BACKGROUND = re.compile("keep|white|black|#[0-9a-fA-F]{6}")  # what stands behind transparent pixels


class JitterConfig(Section):
    """Colour jitter: the four changes are made together, in random order."""

    probability: Fraction = Field(0.8, description="probability that a crop is jittered")
    brightness: Fraction = Field(0.4, description="the factor is drawn from 1 - brightness to 1 + brightness")
    contrast: Fraction = Field(0.4, description="the factor is drawn from 1 - contrast to 1 + contrast")
    saturation: Fraction = Field(0.2, description="the factor is drawn from 1 - saturation to 1 + saturation")
    hue: float = Field(
        0.1, ge=0.0, le=0.5, description="the shift is drawn from -hue to hue, in turns of the colour circle"
    )


class BlurConfig(Section):
    """Gaussian blur: its radius, and its probability for each kind of crop."""

    radius: Range = Field((0.1, 2.0), description="smallest and largest radius in pixels")
    first_global: Fraction = Field(1.0, description="probability that the first global crop is blurred")
    other_globals: Fraction = Field(0.1, description="probability that another global crop is blurred")
    local: Fraction = Field(0.5, description="probability that a local crop is blurred")

    def _check_rules(self) -> None:
        check_range("radius", self.radius, above=0.0, most=1000.0)


class ViewsConfig(Section):
    """The crops of one image; the side of global crops is model.vision.image_size."""

    global_crops: int = Field(2, ge=1, le=100, description="crops that the teacher and the student see")
    local_crops: int = Field(6, ge=0, le=100, description="smaller crops that only the student sees")
    local_size: int = Field(96, gt=0, le=8_192, description="side of the local crops in pixels")
    global_scale: Range = Field(
        (0.4, 1.0), description="smallest and largest area of a global crop, as shares of the picture's"
    )
    local_scale: Range = Field(
        (0.05, 0.4), description="smallest and largest area of a local crop, as shares of the picture's"
    )
    ratio: Range = Field(
        (3 / 4, 4 / 3), description="smallest and largest width / height of a crop's part of the picture"
    )
    flip: Fraction = Field(0.5, description="probability that a crop is mirrored, left to right")
    jitter: JitterConfig = JitterConfig()
    grey: Fraction = Field(0.2, description="probability that a crop loses its colours")
    blur: BlurConfig = BlurConfig()
    solarise: Fraction = Field(
        0.2, description="probability that the second global crop is solarised; others never are"
    )
    solarise_threshold: int = Field(
        128, ge=0, le=256, description="solarising inverts pixel values from this one on, out of 0 to 255"
    )

    def _check_rules(self) -> None:
        check_range("global_scale", self.global_scale, above=0.0, most=1.0)
        check_range("local_scale", self.local_scale, above=0.0, most=1.0)
        check_range("ratio", self.ratio, above=0.001, most=1000.0)


CaptionSampling = Literal[
    "textcrop", "textcrop_pixelprose", "raw", "random", "short", "long", "raw_pixelprose", "random_pixelprose"
]


class CaptionsConfig(Section):
    """The captions of one sample."""

    count: int = Field(8, ge=1, le=1_000, description="captions per sample, global ones included")
    global_count: int = Field(
        2, ge=1, le=1_000, description="captions that the teacher and the student see; the rest are local"
    )
    sampling: CaptionSampling = Field(
        "textcrop",
        description="textcrop: a global caption has 1 to max_sentences sentences of all texts, a local one has one; "
        "random, raw, short, long: each caption is one sentence, of all texts, the raw text, the raw and short texts, "
        "the long texts; a name that ends in _pixelprose: the same with PixelProse's texts",
    )
    max_sentences: int = Field(5, ge=1, le=1_000, description="most sentences in a global caption")
    keys: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="the only json keys that captions are read from, in this order, for textcrop and random; null: "
        "the sampling's keys, else caption, else captions, text, title; capital letters do not matter there",
    )

    def _check_rules(self) -> None:
        if self.keys is not None and self.sampling not in ("textcrop", "random"):
            rule = f"names all texts; goes with sampling textcrop or random, not {self.sampling}"
            refuse("keys", list(self.keys), rule, ["sampling"])
        if self.global_count > self.count:
            refuse("global_count", self.global_count, f"must be at most count ({self.count})", ["count"])


class SourceConfig(Section):
    """Shards of one dataset, indexed by `cosmos-scale data index` or `data build`."""

    name: str = Field(description="what messages call the source; belongs to the run's identity")
    shards: Place = Field(
        description="folder or glob / brace pattern of .tar files, here or at a URL; or pipe:COMMAND, with braces",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    index: Place | None = Field(
        None, description="folder of the index files; null: beside the shards", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    weight: float = Field(
        1.0,
        gt=0.0,
        le=1000000.0,
        description="how often an epoch visits a sample of the source: at 2.5 each twice and half of them a third "
        "time, at 0.1 a tenth of them; each epoch draws these samples anew",
    )


class RemoteConfig(Section):
    """How shards that lie elsewhere are read: http(s), what fsspec knows (s3://, gs://, ...), pipe:COMMAND."""

    fetch: Literal["parts", "shards"] = Field(
        "parts",
        description="parts: read a shard sample by sample, where its server can; shards: read it whole, by the cache",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    cache: Path | None = Field(
        None,
        description="local folder for whole shards, shared by the host's processes; null: none",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    cache_gb: float = Field(
        100.0,
        gt=0.0,
        le=1000000000.0,
        description="most that the cache holds, in 10^9 bytes; the least recently used shards go first",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    retries: int = Field(
        5,
        ge=0,
        le=10_000,
        description="tries after the first, of local shards too",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    backoff_s: float = Field(
        0.5,
        ge=0.0,
        le=86400.0,
        description="seconds before the first retry; they double each time, up to 30",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    timeout_s: float = Field(
        60.0,
        gt=0.0,
        le=86400.0,
        description="most seconds without a byte (http, pipe:)",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    lowest_speed: float = Field(
        1000.0,
        ge=0.0,
        le=1000000000.0,
        description="fewest bytes per second of an answer that takes longer than timeout_s (http, pipe:); of s3, gs "
        "and abfs a sample may take timeout_s and its bytes at this speed; 0: any",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )

    def _check_rules(self) -> None:
        if self.fetch == "shards" and self.cache is None:
            refuse("fetch", self.fetch, "needs data.remote.cache, the folder they are kept in", ["cache"])


class DaliConfig(Section):
    """NVIDIA DALI, where data.decoder is dali."""

    threads: int = Field(4, ge=1, le=256, description="CPU threads per rank", json_schema_extra=MAY_DIFFER_BY_HOST)
    prefetch: int = Field(
        1, ge=0, le=16, description="batches decoded ahead of the one in use", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    hw_decoder_load: Fraction = Field(
        0.65,
        description="share of the pictures that the GPU's JPEG hardware decodes, where the GPU has any",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    preallocate_width: int = Field(
        0,
        ge=0,
        le=65500,
        description="width in pixels of the largest picture expected, to allocate GPU memory once; 0: as needed",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    preallocate_height: int = Field(
        0,
        ge=0,
        le=65500,
        description="height in pixels of the largest picture expected; 0: as needed",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )

    def _check_rules(self) -> None:
        if (self.preallocate_width == 0) != (self.preallocate_height == 0):
            rule = f"must be 0 or not together with preallocate_height ({self.preallocate_height})"
            refuse("preallocate_width", self.preallocate_width, rule, ["preallocate_height"])


class DataConfig(Section):
    """Where samples come from and how they become views and captions."""

    sources: tuple[SourceConfig, ...] = ()
    remote: RemoteConfig = RemoteConfig()
    samples: int | None = Field(
        None,
        gt=0,
        description="samples per epoch, weights included, for a dry run where the shards are not; null: from the index",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    views: ViewsConfig = ViewsConfig()
    captions: CaptionsConfig = CaptionsConfig()
    window: int = Field(
        65536,
        gt=0,
        le=100_000_000,
        description="samples that are shuffled together; more mix better, fewer read more sequentially",
    )
    last_batch: Literal["drop", "pad"] = Field(
        "drop", description="an epoch's incomplete last batch: drop it, or pad it with the epoch's first samples"
    )
    max_damaged: Fraction = Field(
        0.01,
        description="training stops where more than this share of samples is damaged, out of those that a rank has "
        "read since it started, at least 1,000; all samples of a lost shard count as damaged",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_pixels: int = Field(
        178_956_970,
        gt=0,
        le=10_000_000_000,
        description="most pixels of a picture; larger pictures count as damaged",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    background: str = Field(
        "keep",
        description="behind transparent pixels of PNG and WebP, in training and evaluation: white, black, '#rrggbb', "
        "or keep: hidden colours show, as in the published code",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1_024,
        description="loader processes per rank; 0: the training process loads; null: cores / ranks of the host - 1, "
        "at most 8, and at least 1 with a GPU",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    prefetch: int = Field(
        4, ge=1, le=1_000, description="batches that each worker makes ahead", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    decoder: Literal["torch", "dali"] = Field(
        "torch",
        description="torch: the workers decode and crop pictures, on CPUs; dali: the training process, on its device",
    )
    dali: DaliConfig = DaliConfig()

    def _check_rules(self) -> None:
        if not BACKGROUND.fullmatch(self.background):
            refuse("background", self.background, "must be white, black, '#rrggbb' or keep")
        names = [source.name for source in self.sources]
        for position, name in enumerate(names):
            if name in names[:position]:
                refuse(f"sources.{position}.name", name, "must differ from the other sources' names", ["sources"])
