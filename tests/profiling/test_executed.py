"""What a step executes is what torch counts of it, product by product, under the math back end of attention."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.kernels.contrastive_whole import PAIR_ELEMENTS
from cosmos_scale.kernels.linear import LEAST_WORK, linear
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.profiling.executed import (
    StepDevice,
    executed_flops,
    executed_loss_flops,
    student_forward,
    teacher_forward,
)
from cosmos_scale.profiling.flops import loss_flops, step_flops
from cosmos_scale.profiling.operators import META
from cosmos_scale.profiling.planned_batch import planned_batch
from cosmos_scale.testing.device_counts import count_step
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import build_tiny, tiny_batch, tiny_config

CPU = torch.device("cpu")
# What torch's counter takes for no operation at all: these calls must not occur where it is the oracle.
UNCOUNTED = ("aten._scaled_dot_product_flash_attention_for_cpu", "mkldnn._linear_pointwise")


class Calls(TorchDispatchMode):
    """Notes the names of all operators that run in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def counter() -> FlopCounterMode:
    """Torch's counter, which knows addmm only without the underscore: told of addmm_ too."""

    def added(total: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * int(a[0]) * int(a[1]) * int(b[1])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


def counted(config: RunConfig, batch: Batch) -> int:
    """What torch counts of a whole step: forward, loss, backward, update, refresh."""
    tiny = build_tiny(config, start_ranks("cpu"))
    with counter() as flops, Calls() as calls, sdpa_kernel(SDPBackend.MATH):
        tiny.step(0, batch=batch)
    tiny.close()
    assert calls.names.isdisjoint(UNCOUNTED)
    return int(flops.get_total_flops())


@pytest.mark.parametrize(
    ("train", "model"),
    [
        ({}, {}),
        ({"recompute": 1}, {}),
        ({"recompute": 2}, {"text_padding": "mask"}),
        ({"micro_batches": 2, "recompute": 1}, {}),
        ({}, {"token_multiple": 64, "attention": "dense"}),
    ],
    ids=["plain", "recompute all", "recompute some, padding masked", "two micro-batches", "filled up, dense"],
)
def test_executed_operations_are_those_that_torch_counts(train: dict[str, int], model: dict[str, object]) -> None:
    config = tiny_config(zero={"stage": 0})
    changed = {
        "train": config.train.model_copy(update=train),
        "model": config.model.model_copy(update=model),
    }
    config = config.model_copy(update=changed)
    batch = tiny_batch(3)
    assert executed_flops(batch, config, CPU, math=True) == counted(config, batch)
    assert (
        step_flops(batch, config) < executed_flops(batch, config, CPU) < executed_flops(batch, config, CPU, math=True)
    )


def test_torch_counts_nothing_of_what_is_held_off() -> None:
    """Else the operators in UNCOUNTED need no longer be held off."""
    q = torch.randn(2, 4, 50, 64)
    side = round(LEAST_WORK ** (1 / 3)) + 1
    square = torch.randn(side, side)
    with counter() as flops, Calls() as calls:
        scaled_dot_product_attention(q, q, q)
        linear(square, square, steady=True)
    assert calls.names.issuperset(UNCOUNTED)
    assert flops.get_total_flops() == 0


def test_a_loss_pair_by_pair_forms_its_logits_once() -> None:
    """With so many samples a pair's gradient takes the place of its logits; torch counts a vector product as well."""
    samples, config = round(PAIR_ELEMENTS**0.5), tiny_config(zero={"stage": 0})
    batch = tiny_batch(0, samples)
    tiny = build_tiny(config, start_ranks("cpu"))
    with torch.no_grad():
        features, targets = tiny.student(batch), tiny.teacher(batch)
    with counter() as flops:
        CosmosLoss("true")(features, targets)
    tiny.close()
    pairs = 16 + 16 * 4
    ours = executed_loss_flops(batch, config, StepDevice(CPU, torch.float32, math=True), 1)
    assert ours == loss_flops(batch, config) == flops.get_total_flops() - pairs * 2 * samples**2


def test_products_on_a_gpu_are_those_that_its_step_asks_for() -> None:
    """In bfloat16, with fused attention, fused losses and packed captions that are filled up; attention left out."""
    changes = ["precision=bf16", "zero.stage=1", "train.schedule_steps=9999", "model.attention=torch_varlen"]
    config = load_config(shipped_file("cc3m_vitb16"), [*changes, "train.global_batch=8"])
    lengths = torch.randint(3, 70, (config.data.captions.count, 8), generator=torch.Generator().manual_seed(0))
    batch, place = planned_batch(config, lengths, META), StepDevice(META, torch.bfloat16, math=False)
    student = student_forward(batch, config, place)._replace(attention=0)
    teacher = teacher_forward(batch, config, place)._replace(attention=0)
    ours = student.forward() + student.backward(0.0) + teacher.forward()
    counts = count_step(config, lengths).by_group()
    assert ours + executed_loss_flops(batch, config, place, 1) == counts["products"].flops


def count_two_ranks(rank: int, world_size: int) -> None:
    """Each rank computes its rows' logits with all ranks' columns."""
    ranks, config = start_ranks("cpu"), tiny_config(zero={"stage": 1})
    tiny, batch = build_tiny(config, ranks), tiny_batch(1)
    with counter() as flops, sdpa_kernel(SDPBackend.MATH):
        tiny.step(1)
    share = batch.split(world_size)[rank]
    assert executed_flops(share, config, CPU, world_size, math=True) == flops.get_total_flops()


def test_ranks_multiply_their_rows_by_all_columns() -> None:
    run_ranks(count_two_ranks, 2)
