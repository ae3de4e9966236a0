"""The frame of all evaluations: what an evaluator is, what it sees, and what it gives."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from cosmos_scale.config import DataConfig, EvaluatorConfig, ModelConfig, RemoteConfig, RunConfig
from cosmos_scale.data.shards.reader import ShardFile
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.feature_cache import FeatureCache
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer

Gather = Callable[[Tensor], Tensor]
"""[n, ...] to [W * n, ...] in rank order. Every rank calls it equally often, with tensors of one shape and dtype."""

Numbers = dict[str, float]
"""What an evaluator measured, by name; counts are whole numbers."""


Report = Callable[[str, int, int], None]
"""Told of long work as it goes on: what it is, how much of it this rank has done, and how much it has to do."""


def no_report(work: str, done: int, total: int) -> None:
    """The report that nobody hears."""


DIGITS = 15  # hexadecimal, of a digest of data: as many as an int64 has room for


DIFFERENT_DATA = "ranks see different data"


def digest_of(text: str) -> str:
    """A digest of a text that says what data was read, in DIGITS hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:DIGITS]


def one_process(tensor: Tensor) -> Tensor:
    """The gather of a process without other ranks."""
    return tensor


@dataclass(frozen=True)
class Setting:
    """What evaluators must know before there is a model: this rank among all, the model's inputs, the run's limits.

    device: where models lie and where gathered tensors must be. image_size: side of the model's pictures in pixels.
    max_pixels: of a picture; larger ones are left out. background: what stands behind transparent pixels.
    remote: how shards that lie elsewhere are read. report: what evaluators tell of long work as it goes on.
    cache: where features are kept from one evaluation of a checkpoint to the next; None: nowhere.
    """

    rank: int
    world_size: int
    device: torch.device
    image_size: int
    tokenizer: Tokenizer
    max_pixels: int
    background: str
    remote: RemoteConfig
    report: Report = no_report
    cache: FeatureCache | None = None

    @classmethod
    def of_run(
        cls, config: RunConfig, rank: int, world_size: int, device: torch.device, report: Report = no_report
    ) -> "Setting":
        """The setting of one rank of a run."""
        setting = cls.of_model(config.model, config.data, device)
        return replace(setting, rank=rank, world_size=world_size, report=report)

    @classmethod
    def of_model(cls, model: ModelConfig, data: DataConfig, device: torch.device) -> "Setting":
        """The setting of a model alone, in one process; data: its limits and remote keys count."""
        return cls(
            rank=0,
            world_size=1,
            device=device,
            image_size=model.vision.image_size,
            tokenizer=Tokenizer(model.text.context_length),
            max_pixels=data.max_pixels,
            background=data.background,
            remote=data.remote,
        )


@dataclass(frozen=True)
class Encoder:
    """A student or a teacher to measure, with its whole weights on every rank.

    Calls do not communicate: each rank makes as many of them as it likes. `model` is for what the methods do not give.
    weights: a text that says which weights these are, for a cache of features; "" where they are still trained.
    has_heads: False where the weights came without the cross-modality heads, which are then NaN. notes: what the user
    should hear of where the weights come from, such as what was assumed of them; each on one line.
    """

    model: CosmosModel
    setting: Setting
    weights: str = ""
    has_heads: bool = True
    notes: tuple[str, ...] = ()

    def images(self, images: Tensor) -> Tensor:
        """Normalised features [N, E] on the setting's device of pictures [N, 3, H, W] on any."""
        on_device = images.to(self.setting.device)
        parts = on_device.split(self.model.visual.crops_a_pass(on_device))
        return torch.cat([self.model.encode_image(part) for part in parts])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised features [N, E] on the setting's device of N texts."""
        return self.model.encode_text(self.setting.tokenizer(texts).to(self.setting.device))


class Evaluator(ABC):
    """Measures a model on its own data, as often as it is asked.

    Its constructor takes its section of the config and the setting. It looks for all that `measure` needs, and raises
    UserError where anything is missing or wrong: then a run ends at its start, and not at its first evaluation.
    """

    def __init__(self, config: EvaluatorConfig, setting: Setting) -> None:
        self.name, self.kind, self.every = config.name, config.kind, config.every
        self.setting = setting

    def subject(self) -> dict[str, str]:
        """What was measured on, by name: stands before the numbers in a line of JSON."""
        return {}

    def gallery(self) -> str:
        """What `measure` reads, in words with digests: equal on ranks that read equal data, empty for no data."""
        return ""

    def shard_files(self) -> list[ShardFile]:
        """Return the indexed shards that `measure` reads; empty where it reads other files."""
        return []

    def same_data(self) -> str:
        """The rule that ranks with unequal galleries break: what every host has, and what mends it; empty: no data."""
        return ""

    def require_same_data(self, gather: Gather) -> None:
        """Raise UserError, on all ranks, where ranks would measure on parts of different data, as `gallery` says.

        A run's start compares galleries too, but a gallery may be opened later.
        """
        own = digest_of(self.gallery())
        digests = gather(torch.tensor([int(own, 16)], device=self.setting.device)).tolist()
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            seen = ", ".join(f"rank {rank}: digest {digests[rank]:0{DIGITS}x}" for rank in (0, other))
            raise UserError(f"eval.{self.name}: {DIFFERENT_DATA} ({seen}); {self.same_data()}")

    @abstractmethod
    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield (name, value) of each number; every rank yields the same.

        A rank measures its share and hands it to `gather`. It may raise anything at any time, but must not catch what
        `gather` raises: the frame sees to it that no other rank waits for it (`together.py`).
        folder: for files that a person looks at; it may not exist yet. None: leave no files.
        """

    def details(self) -> Sequence[RenderableType]:
        """What else the last `measure` found, for people who look at one model: printed below its table."""
        return []

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table for people of the numbers of some models by the models' names: a row a number, a column a model."""
        table = Table("", *results, title=title)
        for name in next(iter(results.values())):
            table.add_row(name, *(f"{numbers[name]:g}" for numbers in results.values()))
        return table


@torch.no_grad()
def measure(
    evaluator: Evaluator, encoder: Encoder, gather: Gather = one_process, folder: Path | None = None
) -> Numbers:
    """Return the numbers of one model, as floats and ints; whatever the evaluator raises passes through."""
    numbers = {}
    for name, value in evaluator.measure(encoder, gather, folder):
        numbers[name] = value if isinstance(value, int) else float(value)
    return numbers
