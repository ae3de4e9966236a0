"""A golden file of evaluation: its model, its cases, and how far numbers may be apart. See `golden_evaluation.py`."""

import copy
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.config import ModelConfig, RemoteConfig, TextConfig, VisionConfig
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from tools.check_golden import Golden

EQUAL = 0.0  # the tolerance of whole numbers
# Weights and probabilities of a softmax are compared in parts of themselves too, since most of them are small. Rounding
# changes them by up to 2.4e-5 of themselves. Smaller numbers than LEAST may differ by 1e-9.
OF_ITSELF, LEAST = 5e-4, 2e-6
# A number of the file may be so many times as far from float64 as this project's float32 numbers are in the mean. It is
# up to 6 on the file of tests/golden, and up to 8 with OpenCLIP's float32 numbers of 32 drawn models of 1 to 24 layers.
TIMES_ROUNDING = 20


class Compared(NamedTuple):
    """One tensor or number of a case: how far ours is from the file's, and how far it may be.

    ours: what was compared, of a tensor of floating point; None for all else.
    """

    name: str
    difference: float
    tolerance: float
    ours: Tensor | None = None

    @property
    def part_of_tolerance(self) -> float:
        """The difference in units of the tolerance; where only equal numbers are good, as it is."""
        return self.difference / self.tolerance if self.tolerance else self.difference

    @property
    def good(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


class EvaluationGolden(Golden):
    """A file of evaluation numbers. dtype: of what models compute, and of tensors of floating point that are given."""

    dtype = torch.float32

    def exact(self) -> "EvaluationGolden":
        """The same file, whose models compute in float64, on the CPU."""
        double = copy.copy(self)
        double.dtype, double.device = torch.float64, "cpu"
        return double

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the file; raises UserError where it is missing."""
        found = super().tensor(name)
        return found.to(self.dtype) if found.is_floating_point() else found

    def model_config(self) -> ModelConfig:
        """Return the model's sizes."""
        sizes = self.parameters("config")
        try:
            return ModelConfig(
                embed_dim=sizes["ed"],
                pooler_heads=sizes["pooler_heads"],
                vision=VisionConfig(
                    image_size=sizes["image_size"],
                    patch_size=sizes["ps"],
                    width=sizes["vw"],
                    layers=sizes["vl"],
                    head_width=sizes["head_width"],
                ),
                text=TextConfig(
                    context_length=self.shaped("student.positional_embedding", None, None).shape[0],
                    vocab_size=sizes["vocab"],
                    width=sizes["tw"],
                    layers=sizes["tl"],
                    heads=sizes["th"],
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{self.path}: the header's config does not make a model: {text}") from error

    def encoder(self) -> Encoder:
        """Return an encoder with the file's weights; rows of the token table that the file leaves out are zero."""
        config = self.model_config()
        rows = self.tensor("token_rows.ids").long()
        table = torch.zeros(config.text.vocab_size, config.text.width, dtype=self.dtype)
        table[rows] = self.shaped("token_rows.values", len(rows), config.text.width)
        model = CosmosModel(config)
        try:
            model.load_state_dict({**self.state_dict("student."), "token_embedding.weight": table}, strict=True)
        except RuntimeError as error:
            raise UserError(f"{self.path}: student.*: {' '.join(str(error).split())}") from error
        device = torch.device(self.device)
        setting = Setting(
            rank=0,
            world_size=1,
            device=device,
            image_size=config.vision.image_size,
            tokenizer=Tokenizer(config.text.context_length),
            max_pixels=10**9,
            background=KEEP,
            remote=RemoteConfig(),
        )
        return Encoder(model.to(device, self.dtype).eval(), setting)

    def parameters(self, case: str) -> dict[str, Any]:
        """Return what the header says of a case."""
        try:
            found = json.loads(self.metadata(case))
        except ValueError as error:
            raise UserError(f"{self.path}: the header's {case} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: the header's {case} must be an object")
        return found

    def cases(self, part: str) -> list[str]:
        """Return the cases of a part, sorted: `cls` has one, of its own name; others have one for each second name."""
        names = [name.split(".") for name in self.names() if name.split(".")[0] == part]
        single = part in ("cls", "attention")
        return sorted({part if single else ".".join(name[:2]) for name in names})


def compare_rounding(golden: Golden, single: Compared, exact: Compared) -> Compared | None:
    """Compare a tensor of the file with float64's numbers, as closely as float32 rounds; None where it has no ours.

    single, exact: the same comparison, with this project's numbers in float32 and in float64. Their difference says how
    much rounding changes such numbers: its root mean square in a row (the last dimension) or in the whole tensor,
    whichever is greater, but no less than half a unit of the tensor's greatest number. TIMES_ROUNDING as much is
    allowed, and never more than the tolerance.
    """
    if single.ours is None or exact.ours is None or not single.tolerance:
        return None
    theirs = golden.tensor(single.name).double()
    if not theirs.numel():
        return None
    numbers = theirs.isfinite()
    ours = exact.ours.double()
    rounding = (single.ours.double() - ours).masked_fill(~numbers, 0.0).square()
    rounding = torch.maximum(rounding.mean(-1, keepdim=True), rounding.mean()).sqrt()
    least = theirs.masked_fill(~numbers, 0.0).abs().max() * torch.finfo(torch.float32).eps / 2
    allowed = (TIMES_ROUNDING * rounding.clamp(min=least)).expand_as(theirs).clamp(max=single.tolerance)
    difference = (ours - theirs).abs().masked_fill(~numbers, 0.0)
    worst = int((difference / allowed.clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    return Compared(single.name, difference.flatten()[worst].item(), allowed.flatten()[worst].item())


def compare_softmax(golden: Golden, name: str, ours: Tensor, tolerance: float) -> Compared:
    """Compare weights or probabilities: each within the tolerance, and within OF_ITSELF of the file's number."""
    whole = compare(golden, name, ours, tolerance)
    theirs = golden.tensor(name).double()
    allowed = (OF_ITSELF * theirs.abs().clamp(min=LEAST)).clamp(max=tolerance)
    difference = (ours.detach().cpu().double() - theirs).abs()
    if not whole.good or not theirs.numel():
        return whole._replace(ours=None)
    worst = int((difference / allowed).argmax())
    return Compared(name, difference.flatten()[worst].item(), allowed.flatten()[worst].item())


def compare(golden: Golden, name: str, ours: Tensor, tolerance: float) -> Compared:
    """Compare a tensor of ours with the file's; NaN must stand in the same places."""
    theirs = golden.tensor(name)
    ours = ours.detach().cpu()
    if ours.shape != theirs.shape:
        raise UserError(f"{golden.path}: {name}: shape {tuple(theirs.shape)} should be {tuple(ours.shape)}")
    both_nan = ours.isnan() & theirs.isnan() if theirs.is_floating_point() else torch.zeros_like(theirs).bool()
    difference = (ours.double() - theirs.double()).abs().masked_fill(both_nan, 0.0)
    most = difference.nan_to_num(nan=math.inf).max().item() if theirs.numel() else 0.0
    return Compared(name, most, tolerance, ours if theirs.is_floating_point() else None)


def compare_number(name: str, ours: float, theirs: object, tolerance: float) -> Compared:
    """Compare a number of ours with the header's."""
    good = isinstance(theirs, (int, float))
    return Compared(name, abs(ours - float(theirs)) if good else math.inf, tolerance)  # type: ignore[arg-type]
