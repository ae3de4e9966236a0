"""Compare this model, loss and training with numbers that the published COSMOS implementation computed.

A golden file (safetensors; its form is told in tests/golden/README.md) holds weights, inputs, features, losses and
gradients; model and batch sizes come from the file. Prints the worst difference of each group; exits with 1 where one
is past its tolerance, with 2 where a file cannot be used.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_scale.batch import Batch, Features, TeacherFeatures, caption_lengths
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import (
    CaptionsConfig,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    ViewsConfig,
    VisionConfig,
    ZeroConfig,
)
from cosmos_scale.engine.pair import pair_of_models
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.errors import UserError
from cosmos_scale.loss import CosmosLoss, LossOutput
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.step import train_step

STUDENT_FEATURES = {
    "image": "image_features",
    "text": "text_features",
    "image_crossmodal": "img_crossmodal_features",
    "text_crossmodal": "txt_crossmodal_features",
}
# Golden files do not say how many heads poolers have and how wide the image tower's heads are: always this.
POOLER_HEADS, VISION_HEAD_WIDTH = 8, 64


class Difference(NamedTuple):
    """How far one tensor of a group is from the file's."""

    name: str
    value: float


class Golden:
    """A golden file: its sizes and its tensors, read on demand. Raises UserError for what is missing or unreadable.

    device: where its models and batches lie, "cpu" or "cuda".
    """

    def __init__(self, path: Path, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self.path = path
        self.device = device
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                self._metadata: dict[str, str] = file.metadata() or {}
                self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from error

    def metadata(self, key: str) -> str:
        """Return one header value."""
        if key not in self._metadata:
            raise UserError(f"{self.path}: the header lacks {key!r}: not a golden file")
        return self._metadata[key]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        return self._tensors[name]

    def shaped(self, name: str, *sizes: int | None) -> Tensor:
        """Return one tensor, which must have these sizes; None stands for any but 0."""
        tensor = self.tensor(name)
        fits = tensor.ndim == len(sizes) and all(
            there == wanted if wanted else there > 0 for there, wanted in zip(tensor.shape, sizes, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(size or "any") for size in sizes)
            raise UserError(f"{self.path}: {name}: shape {tuple(tensor.shape)} should be ({wanted}), and not empty")
        return tensor

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._tensors)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with the prefix, under the rest of their names."""
        return {name[len(prefix) :]: tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}

    def model_config(self) -> ModelConfig:
        """Return the model's sizes."""
        try:
            sizes = json.loads(self.metadata("config"))
            patch_size = sizes["ps"]
            return ModelConfig(
                embed_dim=sizes["ed"],
                pooler_heads=POOLER_HEADS,
                vision=VisionConfig(
                    # A convolution ignores the pixels past the last whole patch.
                    image_size=int(self.metadata("image_size")) // patch_size * patch_size,
                    patch_size=patch_size,
                    width=sizes["vw"],
                    layers=sizes["vl"],
                    head_width=VISION_HEAD_WIDTH,
                ),
                text=TextConfig(
                    context_length=self.shaped("student.positional_embedding", None, None).shape[0],
                    vocab_size=sizes["vocab"],
                    width=sizes["tw"],
                    layers=sizes["tl"],
                    heads=sizes["th"],
                ),
            )
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{self.path}: the header's sizes do not make a model: {_one_line(error)}") from error

    def run_config(self, zero_stage: int) -> RunConfig:
        """Return a run with the file's model, batch, optimizer and average."""
        model = self.model_config()
        count, global_count = self.batch(0).captions.shape[0], self.global_captions()
        # No crops are made, since the file holds them: any size that fits the patches will do.
        views = ViewsConfig(local_size=model.vision.patch_size)
        before_step = "before" in self.metadata("ema_order").lower()
        try:
            beta1, beta2 = self.metadata("betas").split(",")
            batch, total_steps = int(self.metadata("batch")), int(self.metadata("total_steps"))
            return RunConfig(
                precision="fp32",
                model=model,
                data=DataConfig(captions=CaptionsConfig(count=count, global_count=global_count), views=views),
                train=TrainConfig(global_batch=batch, schedule_steps=total_steps),
                optimizer=OptimizerConfig(
                    lr=float(self.metadata("lr")),
                    betas=(float(beta1), float(beta2)),
                    eps=float(self.metadata("eps")),
                    weight_decay=float(self.metadata("weight_decay")),
                    warmup_steps=int(self.metadata("warmup")),
                ),
                ema=EmaConfig(
                    momentum=float(self.metadata("ema_momentum")), order="before_step" if before_step else "after_step"
                ),
                zero=ZeroConfig(stage=1 if zero_stage else 0),
            )
        except ValueError as error:
            raise UserError(
                f"{self.path}: the header's hyper-parameters do not make a run: {_one_line(error)}"
            ) from error

    def trajectory(self) -> dict[str, Tensor]:
        """Return both losses, their sum and the learning rate, each at every step: [steps] float64."""
        columns = [column.strip() for column in self.metadata("trajectory_columns").split(",")]
        trajectory = dict(zip(columns, self.shaped("trajectory", None, None).unbind(1), strict=False))
        missing = {"distill_loss", "clip_loss", "total_loss", "lr"} - trajectory.keys()
        if missing:
            raise UserError(f"{self.path}: trajectory_columns lacks {min(missing)!r}")
        return trajectory

    def batch(self, step: int) -> Batch:
        """Return the inputs of a step."""
        side = int(self.metadata("image_size"))
        global_crops = self.shaped(f"step{step}.global_crops", None, None, 3, side, side)
        local_crops = global_crops[:0]  # there may be none
        if f"step{step}.local_crops" in self._tensors:
            local_crops = self.shaped(f"step{step}.local_crops", None, None, 3, None, None)
        positions = self.model_config().text.context_length
        captions = self.shaped(f"step{step}.captions", None, None, positions)
        samples = captions.shape[1]
        if not samples == global_crops.shape[1] == local_crops.shape[1]:
            raise UserError(f"{self.path}: step{step}.*: crops and captions must have one batch size")
        vocabulary = self.model_config().text.vocab_size
        if captions.is_floating_point() or not 0 <= captions.min() <= captions.max() < vocabulary:
            raise UserError(f"{self.path}: step{step}.captions: ids must be integers from 0 to {vocabulary - 1}")
        lengths = caption_lengths(captions)
        batch = Batch(global_crops, local_crops, captions, lengths, torch.arange(samples), torch.tensor(0))
        return batch.to(torch.device(self.device))

    def global_captions(self) -> int:
        """Return how many captions the teacher sees."""
        return self.shaped("step0.teacher.text_features", None, None, None).shape[0]

    def model(self, prefix: str) -> CosmosModel:
        """Return a model with the file's weights of that prefix."""
        model = CosmosModel(self.model_config())
        try:
            model.load_state_dict(self.state_dict(prefix), strict=True)
        except RuntimeError as error:
            raise UserError(f"{self.path}: {prefix}*: {_one_line(error)}") from error
        return model.to(self.device)


def check_features(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare the student's four kinds of features and the teacher's two: largest absolute difference."""
    features, teacher = _forward(golden.model("student."), golden.model("teacher."), golden)
    ours = {f"student.{name}": getattr(features, field) for field, name in STUDENT_FEATURES.items()}
    ours |= {"teacher.image_features": teacher.image, "teacher.text_features": teacher.text}
    return [_absolute(golden, f"step0.{name}", ours[name], golden.tensor(f"step0.{name}")) for name in ours]


def check_losses(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare both losses and their sum: absolute difference."""
    losses = _losses(*_forward(golden.model("student."), golden.model("teacher."), golden))
    ours = {"distill_loss": losses.distill, "clip_loss": losses.clip, "total_loss": losses.total}
    theirs = golden.trajectory()
    return [_absolute(golden, name, ours[name].double(), theirs[name][0]) for name in ours]


def check_gradients(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare the gradient of every weight: norm of the difference, relative to the file's norm."""
    student = golden.model("student.")
    features, teacher = _forward(student, golden.model("teacher."), golden)
    torch.autograd.backward(features, _losses(features, teacher).gradients)
    # A state dict gives gradients the shapes that files have. A weight that the loss does not reach has gradient 0.
    for parameter in student.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    ours = student.state_dict()
    return [_relative(golden, name, ours[name], golden.tensor(f"step0.grad.{name}")) for name in ours]


class Trained(NamedTuple):
    """What training the file's steps gave: the columns of the trajectory [steps] float64, and both models' weights."""

    trajectory: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


@lru_cache(maxsize=1)
def train(golden: Golden, zero_stage: int) -> Trained:
    """Train the file's steps with the engine that training uses: DeepSpeed in one process."""
    config = golden.run_config(zero_stage)
    total_steps = config.total_steps(1)
    student_model, teacher_model = golden.model("student."), golden.model("teacher.")
    ranks = start_ranks(golden.device)
    student, teacher = pair_of_models(config, ranks, student_model, teacher_model)
    rows = []
    for step in range(golden.tensor("trajectory").shape[0]):
        lr, momentum = learning_rate(step, config.optimizer, total_steps), ema_momentum(step, config.ema, total_steps)
        output = train_step(student, teacher, CosmosLoss("true"), golden.batch(step), lr=lr, momentum=momentum)
        rows.append([output.distill.item(), output.clip.item(), output.total.item(), lr])
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    trajectory = dict(zip(("distill_loss", "clip_loss", "total_loss", "lr"), columns, strict=True))
    return Trained(trajectory, student_model.state_dict(), teacher_model.state_dict())


def check_trajectory(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare losses and learning rate of every step: largest absolute difference."""
    ours, theirs = train(golden, zero_stage).trajectory, golden.trajectory()
    return [_absolute(golden, f"{name}, worst step", ours[name], theirs[name]) for name in ours]


def check_final_student(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare the student's weights after the last step: norm of the difference, relative to the file's norm."""
    return _final(golden, "final.student.", train(golden, zero_stage).student)


def check_final_teacher(golden: Golden, zero_stage: int) -> list[Difference]:
    """Compare the teacher's weights after the last step: norm of the difference, relative to the file's norm."""
    return _final(golden, "final.teacher.", train(golden, zero_stage).teacher)


class Group(NamedTuple):
    """One group of numbers: how to compare it, and the largest difference allowed."""

    check: Callable[[Golden, int], list[Difference]]
    tolerance: float
    measure: str


# Tolerances are about 16 times (features, losses), 30 times (gradients) and 100 times (weights) the difference from the
# same computation in float64.
GROUPS = {
    "features": Group(check_features, 1e-5, "absolute"),
    "losses": Group(check_losses, 1e-5, "absolute"),
    "gradients": Group(check_gradients, 1e-4, "relative, norm per tensor"),
    "trajectory": Group(check_trajectory, 1e-5, "absolute"),
    "final_student": Group(check_final_student, 1e-4, "relative, norm per tensor"),
    "final_teacher": Group(check_final_teacher, 1e-4, "relative, norm per tensor"),
}


def check_file(path: Path, zero_stage: int, device: Literal["cpu", "cuda"]) -> bool:
    """Compare every group with one file, print a line for each, and tell whether all are within tolerance."""
    golden = Golden(path, device)
    print(path)
    within = True
    for name, group in GROUPS.items():
        differences = group.check(golden, zero_stage)
        worst = max(differences, key=lambda difference: difference.value)
        good = all(difference.value <= group.tolerance for difference in differences)
        within &= good
        verdict = "ok" if good else "PAST TOLERANCE"
        print(f"  {name:13} {worst.value:9.2e} (at most {group.tolerance:.0e}, {group.measure})  {verdict}", end="")
        print(f"  worst of {len(differences)}: {worst.name}")
    return within


def main(arguments: list[str] | None = None) -> int:
    """Check every file named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python tools/check_golden.py tests/golden/cosmos_tiny.safetensors\n"
        "  python tools/check_golden.py --evaluation tests/golden/golden_eval.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a golden file (.safetensors)")
    parser.add_argument(
        "--evaluation", action="store_true", help="the files hold numbers of evaluation (tools/golden_evaluation.py)"
    )
    parser.add_argument("--zero-stage", type=int, choices=(0, 1), default=1, help="of the steps (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which computes (default: cpu)")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    files: list[Path] = parsed.files
    try:
        if parsed.evaluation:
            sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python tools/check_golden.py`
            from tools.golden_evaluation import check_evaluation_file  # which builds on this module

            results = [check_evaluation_file(file, parsed.device) for file in files]
        else:
            results = [check_file(file, parsed.zero_stage, parsed.device) for file in files]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if all(results):
        return 0
    past = [str(file) for file, within in zip(files, results, strict=True) if not within]
    print(f"past tolerance: {', '.join(past)}", file=sys.stderr)
    return 1


def _forward(student: CosmosModel, teacher: CosmosModel, golden: Golden) -> tuple[Features, TeacherFeatures]:
    batch = golden.batch(0)
    return student(batch), teacher.teacher_features(batch, golden.global_captions())


def _losses(features: Features, teacher: TeacherFeatures) -> LossOutput:
    return CosmosLoss("true", None)(features, teacher)


def _absolute(golden: Golden, name: str, ours: Tensor, theirs: Tensor) -> Difference:
    return Difference(name, _same_shape(golden, name, ours, theirs).abs().max().item())


def _relative(golden: Golden, name: str, ours: Tensor, theirs: Tensor) -> Difference:
    norm = theirs.norm().item()
    difference = _same_shape(golden, name, ours, theirs).norm().item()
    if not (math.isfinite(norm) and math.isfinite(difference)):
        return Difference(name, math.inf)
    return Difference(name, difference / norm if norm else difference)


def _final(golden: Golden, prefix: str, ours: dict[str, Tensor]) -> list[Difference]:
    return [_relative(golden, name, *_trained_part(name, ours[name], golden.tensor(prefix + name))) for name in ours]


def _trained_part(name: str, *tensors: Tensor) -> list[Tensor]:
    """Leave out the key third of attention biases: its true gradient is zero, so Adam amplifies rounding there."""
    if not name.endswith("in_proj_bias"):
        return list(tensors)
    return [torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]]) for tensor in tensors]


def _same_shape(golden: Golden, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return ours - theirs; NaN counts as infinitely far, so that no comparison lets it pass."""
    if ours.shape != theirs.shape:
        raise UserError(f"{golden.path}: {name}: shape {tuple(theirs.shape)} should be {tuple(ours.shape)}")
    return (ours.detach().cpu() - theirs).nan_to_num(nan=torch.inf)


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):  # pydantic's own text ends in a link to its pages
        return "; ".join(" ".join([*map(str, details["loc"]), details["msg"]]) for details in error.errors())
    return " ".join(str(error).split())


if __name__ == "__main__":
    leave_after(main)
