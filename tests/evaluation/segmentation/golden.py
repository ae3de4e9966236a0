"""The golden file of evaluation, for tests of segmentation: its tensors and header, and its tower in float64."""

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosmos_scale.evaluation.evaluator import Encoder
from tests.conftest import REPOSITORY
from tests.evaluation.segmentation.oracle import Array, Sizes
from tools.golden_numbers import EvaluationGolden

FILE: Path = REPOSITORY / "tests" / "golden" / "golden_eval.safetensors"


@cache
def golden_file() -> EvaluationGolden:
    """The file, read once a process."""
    return EvaluationGolden(FILE)


@cache
def golden_encoder() -> Encoder:
    """The file's tiny model."""
    return golden_file().encoder()


def tower_in_float64() -> tuple[dict[str, Array], Sizes]:
    """The image tower's weights and sizes, for the oracle."""
    weights = {name: tensor.double().numpy() for name, tensor in golden_file().state_dict("student.visual.").items()}
    sizes = golden_file().parameters("config")
    return weights, Sizes(patch=sizes["ps"], heads=sizes["vw"] // sizes["head_width"], layers=sizes["vl"])


def golden_image(case: str) -> npt.NDArray[np.uint8]:
    """The picture of a case of segmentation [H, W, 3]."""
    image: npt.NDArray[np.uint8] = golden_file().tensor(f"{case}.image").numpy()
    return image
