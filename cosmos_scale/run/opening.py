"""What a run needs, looked for in one order before anything is built: by a launch, and by the dry run."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from cosmos_scale.checkpoint.initial import InitialWeights, open_initial
from cosmos_scale.checkpoint.resume import Start, find_start
from cosmos_scale.checkpoint.state import KINDS
from cosmos_scale.config import RunConfig
from cosmos_scale.data.shards.index import MergedIndex, open_sources
from cosmos_scale.data.shards.shared import describe_shared
from cosmos_scale.data.training.caption_check import check_captions
from cosmos_scale.data.training.loader import check_loading, ready_batches
from cosmos_scale.data.training.lost import check_shards
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.data.training.picture_check import check_pictures
from cosmos_scale.engine.ranks import check_precision
from cosmos_scale.engine.requirements import check_model
from cosmos_scale.engine.teacher import DTYPES
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.run.evaluations import Evaluations, RankPlace
from cosmos_scale.run.folder import CHECKPOINTS, check_disk_room, check_file_size, check_folder
from cosmos_scale.run.trackers import check_trackers
from cosmos_scale.words import counted


class Look(NamedTuple):
    """One thing that a run needs: `find` says what was found, and raises UserError where the launch is to be refused.

    needs: the Look without which this one cannot be taken.
    """

    name: str
    find: Callable[[], str]
    needs: str | None = None


class Opening:
    """What one rank of a run finds before anything is built. Each of `looks`, taken in order, fills an attribute."""

    index: MergedIndex
    start: Start
    evaluations: Evaluations
    initial: InitialWeights | None = None  # if the weights come from there

    def __init__(self, config: RunConfig, ranks: RankPlace) -> None:
        self.folder = config.output / config.name
        self.tokenizer = Tokenizer(config.model.text.context_length)
        self._config, self._ranks = config, ranks

    def looks(self) -> list[Look]:
        """Return everything to look for, in order; the main rank alone looks at what all ranks share."""
        is_main = self._ranks.rank == 0
        samples = [
            Look("captions", self._captions, needs="shards"),
            Look("pictures", self._pictures, needs="shards"),
        ]
        output = [Look("output", self._output)] if is_main else []
        return [
            Look("device", self._device),
            Look("data", self._data),
            Look("starts from", self._start),
            Look("shards", self._shards, needs="data"),
            *(samples if is_main else []),
            Look("evaluation", self._evaluation),
            Look("loaders", self._loaders),
            Look("weights", self._weights, needs="starts from"),
            *output,
        ]

    @property
    def _found_start(self) -> Start:
        """The start that was found; a new run's where a dry run found none."""
        return getattr(self, "start", Start(None, None))

    @property
    def _is_resumed(self) -> bool:
        return self._found_start.state is not None

    def _device(self) -> str:
        config, device = self._config, self._ranks.device
        check_precision(config.precision)
        check_model(config.model, device, DTYPES[config.precision])
        return f"{device.type}, {config.precision}, attention {config.model.attention}"

    def _data(self) -> str:
        self.index = open_sources(self._config.data.sources, self._config.data.remote)
        check_loading(self._config, self.index, self._ranks.world_size)
        if self._ranks.rank == 0 and self._config.train.global_batch == 1:
            one = "with one sample there is none to tell it from: each loss is 0, and nothing is learned"
            print(f"warning: train.global_batch: 1: {one}; rule: 2 or more", file=sys.stderr)
        shards = counted(len(self.index.shard_samples), "indexed shard")
        return f"{counted(self.index.epoch_samples, 'sample')} an epoch, in {shards}"

    def _start(self) -> str:
        # A dry run may have no index: then only the checkpoint's data is not compared with it.
        index = self.index.fingerprint() if hasattr(self, "index") else None
        self.start = find_start(self._config, self.folder / CHECKPOINTS, index)
        if self.start.state is None:
            return "step 0, a new run"
        broken = (
            f"; {counted(len(self.start.broken), 'newer one is', 'newer ones are')} broken" if self.start.broken else ""
        )
        unread = f"; {self.start.describe_unread()}" if self.start.unread else ""
        return f"{self.start.checkpoint}, after step {self.start.state.step:,}{broken}{unread}"

    def _shards(self) -> str:
        check_shards(self.index, self._config, self._found_start.lost_shards, resumed=self._is_resumed)
        found = ["shards and the tables of their samples are there"]
        if self._ranks.rank == 0 and not self._is_resumed:
            found += filter(None, (describe_shared(self.index.sources), self.index.unindexed().describe()))
        for line in found[1:]:
            print(f"warning: {line}", file=sys.stderr)
        return "; ".join(found)

    def _captions(self) -> str:
        """Look at some samples; where a run is resumed they were looked at before."""
        found = ["each source has captions"]
        if not self._is_resumed:
            found += check_captions(self.index, self._config.data.captions, self._config.data.remote)
        for line in found[1:]:
            print(f"warning: {line}", file=sys.stderr)
        return "; ".join(found)

    def _pictures(self) -> str:
        """Look at the sizes of some pictures; where a run is resumed they were looked at before."""
        if self._is_resumed:
            return "looked at when the run began"
        return check_pictures(self.index, self._config.data)

    def _evaluation(self) -> str:
        self.evaluations = Evaluations(self._config, self._ranks, self.folder, resumed=self._is_resumed)
        opened = [f"{section.name}: {section.describe()}" for section in self._config.eval if section.every]
        unopened = self.evaluations.unopened
        if self._ranks.rank == 0 and hasattr(self, "index"):  # a dry run may have none
            for name, seen in self.evaluations.seen_in_training(self.index.sources).items():
                print(f"warning: eval.{name}: {seen}", file=sys.stderr)
        return "; ".join([*opened, *([f"cannot be opened now: {', '.join(unopened)}"] if unopened else [])]) or "none"

    def _loaders(self) -> str:
        batches = ready_batches(self._config, self._ranks.world_size, self._ranks.device)
        batches.check_shared_memory()
        free = batches.check_host()
        return f"{batches.describe()} of {free / 2**30:,.1f} free" if batches.total else batches.describe()

    def _weights(self) -> str:
        if self.start.checkpoint is not None:
            return "those of the checkpoint"
        if self._config.init_from is None:
            return "freshly drawn"
        self.initial = open_initial(self._config)
        self.initial.digest()  # reads the weights of other programs, of which a launch would refuse what is not finite
        found = f"{self.initial.path}: {self.initial.kind}, {self.initial.tensors} tensors fit the model"
        return "; ".join([found, *self.initial.notes])

    def _output(self) -> str:
        check_folder(self._config, self.folder)
        check_trackers(self._config.log)
        if not self._is_finished():
            needed = checkpoint_bytes(self._config)
            check_file_size(needed, self._ranks.world_size)
            check_disk_room(self.folder, needed, self._config.checkpoint)
        return f"{self.folder} can be written to"

    def _is_finished(self) -> bool:
        """Whether the run has no step left, so that it saves nothing."""
        if self._found_start.state is None or not hasattr(self, "index"):
            return False
        last = self._config.last_step(steps_per_epoch(self.index.epoch_samples, self._config))
        return self._found_start.state.step >= last


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of the tensors in a run's checkpoint, all in float32; no memory is allocated."""
    with torch.device("meta"):
        model = CosmosModel(config.model)
    return 4 * len(KINDS) * sum(parameter.numel() for parameter in model.parameters())
