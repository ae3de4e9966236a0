"""The typed configuration of a run's data: sources, views, captions, and how they are loaded."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Fraction, Place, Range, Section, check_range, refuse


class JitterConfig(Section):
    """Colour jitter: each factor is drawn from 1 - x .. 1 + x, the hue shift from -hue .. hue (turns)."""

    probability: Fraction = 0.8
    brightness: float = Field(0.4, ge=0.0, le=1.0)
    contrast: float = Field(0.4, ge=0.0, le=1.0)
    saturation: float = Field(0.2, ge=0.0, le=1.0)
    hue: float = Field(0.1, ge=0.0, le=0.5)


class BlurConfig(Section):
    """Gaussian blur: radius in pixels, and its probability per kind of view."""

    radius: Range = (0.1, 2.0)
    first_global: Fraction = 1.0
    other_globals: Fraction = 0.1
    local: Fraction = 0.5

    def _check_rules(self) -> None:
        check_range("radius", self.radius, above=0.0)


class ViewsConfig(Section):
    """The crops of one image; the side of global crops is model.vision.image_size."""

    global_crops: int = Field(2, ge=1)
    local_crops: int = Field(6, ge=0)
    local_size: int = Field(96, gt=0, description="side of the local crops in pixels")
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)
    ratio: Range = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    jitter: JitterConfig = JitterConfig()
    grey: Fraction = 0.2
    blur: BlurConfig = BlurConfig()
    solarise: Fraction = Field(0.2, description="second global crop only")
    solarise_threshold: int = Field(128, ge=0, le=256)

    def _check_rules(self) -> None:
        check_range("global_scale", self.global_scale, above=0.0, most=1.0)
        check_range("local_scale", self.local_scale, above=0.0, most=1.0)
        check_range("ratio", self.ratio, above=0.0)


CaptionSampling = Literal[
    "textcrop", "textcrop_pixelprose", "raw", "random", "short", "long", "raw_pixelprose", "random_pixelprose"
]


class CaptionsConfig(Section):
    """The captions of one sample."""

    count: int = Field(8, ge=1, description="captions per sample, global ones included")
    global_count: int = Field(2, ge=1)
    sampling: CaptionSampling = "textcrop"
    max_sentences: int = Field(5, ge=1, description="most sentences in a global caption")

    def _check_rules(self) -> None:
        if self.global_count > self.count:
            refuse("global_count", self.global_count, f"must be at most count ({self.count})", ["count"])


class SourceConfig(Section):
    """Shards of one dataset, indexed by `cosmos-scale data index` or `data build`."""

    name: str
    shards: Place = Field(
        description="folder or glob / brace pattern of .tar files, here or at a URL; or pipe:COMMAND, with braces",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    index: Place | None = Field(
        None, description="folder of the index files; default: beside the shards", json_schema_extra=RESUME_MAY_CHANGE
    )
    weight: float = Field(
        1.0,
        gt=0.0,
        description="an epoch visits weight x the source's samples, rounded: at 2.5 each twice and half of them a "
        "third time, at 0.1 a tenth of them; which ones is drawn anew each epoch",
    )


class RemoteConfig(Section):
    """How shards that lie elsewhere are read: http(s), what fsspec knows (s3://, gs://, ...), pipe:COMMAND."""

    fetch: Literal["parts", "shards"] = Field(
        "parts",
        description="parts: of a shard, sample by sample, where its server can; shards: whole, through the cache",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    cache: Path | None = Field(
        None,
        description="local folder for whole shards, shared by a host's processes; null: none",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    cache_gb: float = Field(
        100.0,
        gt=0.0,
        description="most that the cache holds, in 10^9 bytes; what was used least recently goes first",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    retries: int = Field(
        5, ge=0, description="tries after the first, of local shards too", json_schema_extra=RESUME_MAY_CHANGE
    )
    backoff_s: float = Field(
        0.5, ge=0.0, description="wait before the first retry; doubles each time", json_schema_extra=RESUME_MAY_CHANGE
    )
    timeout_s: float = Field(
        60.0, gt=0.0, description="most seconds without a byte (http, pipe:)", json_schema_extra=RESUME_MAY_CHANGE
    )

    def _check_rules(self) -> None:
        if self.fetch == "shards" and self.cache is None:
            refuse("fetch", self.fetch, "needs data.remote.cache, the folder they are kept in", ["cache"])


class DaliConfig(Section):
    """NVIDIA DALI, where it decodes."""

    threads: int = Field(4, ge=1, le=256, description="CPU threads per rank", json_schema_extra=RESUME_MAY_CHANGE)
    prefetch: int = Field(
        1, ge=0, le=16, description="batches decoded ahead of the one in use", json_schema_extra=RESUME_MAY_CHANGE
    )
    hw_decoder_load: Fraction = Field(
        0.65,
        description="share of the pictures for the GPU's JPEG hardware, where it has any",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    preallocate_width: int = Field(
        0,
        ge=0,
        le=65500,
        description="of the largest pictures expected, so that a GPU's memory is asked for once; 0: as they come",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    preallocate_height: int = Field(0, ge=0, le=65500, json_schema_extra=RESUME_MAY_CHANGE)

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
        description="samples per epoch, weights included, to plan a run where the shards are not; else from the index",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    views: ViewsConfig = ViewsConfig()
    captions: CaptionsConfig = CaptionsConfig()
    window: int = Field(
        65536, gt=0, description="samples shuffled together; larger mixes better, smaller reads more sequentially"
    )
    last_batch: Literal["drop", "pad"] = Field(
        "drop", description="an epoch's incomplete last batch: dropped, or filled with the epoch's first samples"
    )
    max_damaged: Fraction = Field(
        0.01,
        description="share of damaged samples past which training stops: of those that a rank has read since it "
        "started, 1,000 at least; all samples of a lost shard count",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_pixels: int = Field(
        178_956_970, gt=0, description="larger images count as damaged", json_schema_extra=RESUME_MAY_CHANGE
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="loader processes per rank; 0 loads in the training process; default: cores / ranks - 1, "
        "at most 8, and with a GPU 1 at least",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    prefetch: int = Field(4, ge=1, description="batches ready per worker", json_schema_extra=RESUME_MAY_CHANGE)
    decoder: Literal["torch", "dali"] = Field(
        "torch",
        description="torch: workers decode and cut, on CPUs; dali: the training process does, on its device",
    )
    dali: DaliConfig = DaliConfig()

    def _check_rules(self) -> None:
        names = [source.name for source in self.sources]
        for position, name in enumerate(names):
            if name in names[:position]:
                refuse(f"sources.{position}.name", name, "must differ from the other sources' names", ["sources"])
