"""The model with the Triton kernels equals the model without, and takes them where they serve."""

import pytest
import torch

from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.operators import META, DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton
from tests.model.models import SMALL, small_batch

pytestmark = needs_triton

OPERATORS = {"add_norm", "add_norm_backward", "gelu_bias_backward", "stack_gradients"}


@pytest.mark.slow
def test_features_and_all_gradients_equal_those_without_kernels() -> None:
    rows = json_lines("-m", "tests.model.interpret_model", interpret=True)
    cases = [(row["activation"], row["recompute"]) for row in rows]
    assert cases == [("gelu", 0), ("gelu", 1), ("gelu", 2), ("quick_gelu", 2)]
    for row in rows:
        assert row["tensors"] > 90
        assert row["error"] < tolerance("model with kernels, of the largest", torch.float32), row


@pytest.mark.slow
def test_steps_through_the_engine_equal_those_without_kernels() -> None:
    """Losses after updates, and gradient norms, of two ranks at stages 1 and 3."""
    rows = json_lines("-m", "tests.model.interpret_model", "engine", interpret=True)
    assert [row["stage"] for row in rows] == [1, 3]
    limit = tolerance("steps with kernels, relative", torch.float32)
    for row in rows:
        for with_kernels, without in zip(row["auto"], row["torch"], strict=True):
            assert with_kernels == pytest.approx(without, rel=limit), row


def operators(*, kernels: bool, dtype: torch.dtype, compiled: bool = False) -> set[str]:
    """Return which of OPERATORS run in a forward and a backward."""
    with META:
        model = CosmosModel(SMALL.model_copy(update={"compile": compiled})).to(dtype)
    model.choose_kernels("auto" if kernels else "torch")
    batch = small_batch(2)
    on_meta = batch._replace(
        **{name: getattr(batch, name).to(META) for name in ("global_crops", "local_crops", "captions")}
    )
    with torch.compiler.set_stance("force_eager"), DeviceCounter() as counter:
        features = model(on_meta)
        torch.stack([features.image.sum(), features.text_crossmodal.sum()]).sum().backward()
    return {name for _, name in counter.counts} & OPERATORS


def test_the_kernels_serve_low_precision_unless_torch_is_asked_for() -> None:
    assert operators(kernels=True, dtype=torch.bfloat16) == OPERATORS
    assert operators(kernels=False, dtype=torch.bfloat16) == set()
    assert operators(kernels=True, dtype=torch.float32) == set()


def test_blocks_that_are_compiled_are_left_to_the_compiler() -> None:
    assert operators(kernels=True, dtype=torch.bfloat16, compiled=True) == {"add_norm", "add_norm_backward"}
