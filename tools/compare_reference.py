"""Compare the trainer's step with the public COSMOS implementation, run from a checkout of your own.

The checkout's own model, loss and training loop are imported from the folder that --reference names; nothing of them
is part of this project. The trainer, the public step and its plain restatement
(cosmos_scale/testing/published_step.py) take the same steps in turns, in float32 on the CPU, from the same weights.
Prints how long each takes; exits with 1 where losses differ, with 2 where the checkout cannot be used.
"""

import argparse
import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/compare_reference.py`

import torch
from torch import Tensor

from benchmarks.report import Figure, report
from cosmos_scale.batch import Batch
from cosmos_scale.cli.arguments import result_file
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.testing.published_step import Losses, decay_groups
from cosmos_scale.testing.step_race import (
    CASES,
    LossesDifferError,
    Side,
    TrainerStep,
    case_config,
    initial_weights,
    race,
    restated_step,
    spread,
)

NEEDED = ("open_clip.model", "open_clip.loss", "training.train")
# What the public model always has, whatever its configuration file says.
POOLER_HEADS = 8


class Reference:
    """The modules of a checkout. Raises UserError where they cannot be imported from it, or lack what is called."""

    def __init__(self, folder: Path) -> None:
        source = (folder / "src").resolve()
        if not (source / "open_clip" / "model.py").is_file():
            raise UserError(f"--reference: {folder}: has no src/open_clip/model.py: not a checkout of the public code")
        loaded = [name for name in sys.modules if name.partition(".")[0] in ("open_clip", "training")]
        for name in loaded:  # the installed package of the same name, which something else imported
            del sys.modules[name]
        sys.path.insert(0, str(source))
        try:
            modules = [self._module(name, source) for name in NEEDED]
        finally:
            sys.path.remove(str(source))
        model, loss, train = modules
        try:
            self.model: Any = model.CLIP
            self.loss: Any = loss.COSMOSLoss
            self.train: Any = train.train_one_epoch
        except AttributeError as error:
            raise UserError(f"--reference: {folder}: {error}: another version of the public code?") from error

    @staticmethod
    def _module(name: str, source: Path) -> types.ModuleType:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # its imports may fail in any way
            raise UserError(f"--reference: {name} of {source} cannot be imported: {_one_line(error)}") from error
        if module.__file__ is None or source not in Path(module.__file__).resolve().parents:
            raise UserError(f"--reference: {name} came from {module.__file__}, not from {source}")
        return module


class OneBatch:
    """A data loader, in the form that the public loop reads, whose epoch is one batch."""

    num_batches = 1

    def __init__(self) -> None:
        self.batch: tuple[list[Tensor], Tensor] | None = None
        self.num_samples = 1

    @property
    def dataloader(self) -> "OneBatch":
        """This loader itself: the public loop asks the data for their loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Nothing is shuffled here."""

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        assert self.batch is not None
        yield self.batch

    def fill(self, batch: Batch) -> None:
        """Take the batch of the next step."""
        crops = [crop for views in (batch.global_crops, batch.local_crops) for crop in views]
        self.batch = (crops, batch.captions.transpose(0, 1).contiguous())
        self.num_samples = batch.captions.shape[1]


class ReferenceStep:
    """The public implementation's training loop, an epoch of one batch a step."""

    def __init__(self, reference: Reference, config: RunConfig, weights: dict[str, Tensor]) -> None:
        self._train, self._loss = reference.train, reference.loss()
        self._losses: dict[str, Tensor] = {}
        self.student, self.teacher = self._model(reference, config, weights), self._model(reference, config, weights)
        self.teacher.requires_grad_(False)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.student, optimizer.weight_decay), betas=optimizer.betas, eps=optimizer.eps
        )
        self.data = OneBatch()
        # What the loop reads of its command line, in the published run on one process without mixed precision.
        self.arguments = Namespace(
            accum_freq=1,
            batch_size=config.train.global_batch,
            cosmos=True,
            device="cpu",
            distill=False,
            fix_momentum=True,
            grad_clip_norm=None,
            horovod=False,
            log_every_n_steps=1,
            num_sampled_captions=config.data.captions.count,
            precision="fp32",
            rank=0,
            skip_scheduler=True,
            use_imagecrop_aug=True,
            wandb=False,
            world_size=1,
        )

    def __call__(self, batch: Batch, lr: float, momentum: float) -> Losses:
        """Train on a batch and return its losses."""
        self.data.fill(batch)
        self.arguments.momentum_teacher = momentum
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Scaler, both schedulers and a distilled model: the loop uses none of them here.
        unused = (None, None, None, None)
        try:
            self._train(
                self.student,
                self.teacher,
                {"train": self.data},
                self._noted_loss,
                0,
                self.optimizer,
                *unused,
                self.arguments,
            )
        except Exception as error:  # another version's loop may want something else
            raise UserError(f"--reference: its training loop fails: {_one_line(error)}") from error
        clip, distill = self._losses["clip_loss"].item(), self._losses["distill_loss"].item()
        return Losses(self._losses["loss"].item(), clip, distill)

    def _noted_loss(self, **features: Any) -> dict[str, Tensor]:
        """Compute the losses and note them; the loop adds their sum to the same dict."""
        self._losses = self._loss(**features)
        return self._losses

    @staticmethod
    def _model(reference: Reference, config: RunConfig, weights: dict[str, Tensor]) -> Any:
        vision, text = sizes(config.model)
        model = reference.model(config.model.embed_dim, vision, text, output_dict=True, cosmos=True)
        model.load_state_dict(weights)
        return model


def sizes(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the public model's configuration of both towers, with the switches that its COSMOS runs set."""
    assert model.pooler_heads == POOLER_HEADS
    heads = {"output_all": True, "attentional_pool": True}
    vision = model.vision.model_dump(include={"image_size", "patch_size", "width", "layers", "head_width"})
    text = model.text.model_dump(include={"context_length", "vocab_size", "width", "layers", "heads"})
    return vision | heads | {"pool_type": "tok"}, text | heads


def compare(reference: Reference, name: str, samples: int | None, steps: int | None) -> list[Figure]:
    """Race the three sides on one of the cases."""
    case = CASES[name]
    if samples is not None:
        title = f"{case.title.partition(',')[0]}, batch {samples}"
        case = case._replace(title=title, overrides=(*case.overrides, f"train.global_batch={samples}"))
    config = case_config(case)
    weights = initial_weights(config)
    trainer = TrainerStep(config, weights, start_ranks("cpu"))
    sides: dict[str, Side] = {
        "public": ReferenceStep(reference, config, weights),
        "restatement": restated_step(config, weights),
        "trainer": trainer,
    }
    result = race(config, sides, steps or case.steps, case.title)
    trainer.close()
    setting = f"{case.title}, float32; {spread(result, 'public')} of the public step"
    return [
        Figure(
            f"restatement_time_{name}",
            1 / result.ratio("restatement", "public"),
            "of public",
            f"{setting}, {spread(result, 'restatement')} of the restatement",
        ),
        Figure(
            f"reference_speedup_{name}",
            result.ratio("trainer", "public"),
            "times",
            f"{setting}, {spread(result, 'trainer')} of the trainer",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/compare_reference.py --reference ~/cosmos --model vitb32 --steps 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="PATH", help="the checkout's folder")
    parser.add_argument("--model", choices=CASES, default="vitb32", help="default: vitb32")
    parser.add_argument("--batch", type=_positive, metavar="N", help="samples a step; default: the model's")
    parser.add_argument("--steps", type=_positive, metavar="N", help="measured steps; default: the model's")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of torch; default: all cores")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args(argv)
    try:
        reference = Reference(arguments.reference)
        start_ranks("cpu")
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        figures = compare(reference, arguments.model, arguments.batch, arguments.steps)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except LossesDifferError as error:
        print(error, file=sys.stderr)
        return 1
    report("The public training step against its restatement and the trainer's", figures, arguments.json)
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    leave_after(main)
