"""Compiled blocks compute what eager ones do, through the engine, and are compiled a fixed number of times."""

import copy
import pickle

import pytest
import torch

from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.tiny import GLOBAL_BATCH, build_tiny, tiny_config
from tests.model.models import SMALL, initialised, small_batch

# Rounding of fused operations, grown over the updates; losses differ by up to 5e-7 and 5e-3 here.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
STEPS, LR = 5, 1e-3
# Both sides of attention, for either tower's width, with a graph (student) and without (teacher).
MOST_GRAPHS = 2 * 2 * 2
# And without a graph of the student's weights, and with inputs that need a gradient or, in the first block, not.
MOST_RECOMPUTED = 2 * MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "recompute", "precision"), [(0, 0, "fp32"), (1, 0, "fp32"), (1, 1, "fp32"), (1, 0, "bf16")]
)
def test_losses_equal_the_eager_ones_at_all_lengths(stage: int, recompute: int, precision: str) -> None:
    from torch._dynamo.utils import counters

    ranks = start_ranks("cpu")
    totals: dict[bool, list[float]] = {}
    names: dict[bool, list[str]] = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100, "recompute": recompute}
        config = tiny_config(zero={"stage": stage}, precision=precision, train=train)
        config = config.model_copy(update={"model": config.model.model_copy(update={"compile": compiled})})
        tiny = build_tiny(config, ranks)
        names[compiled] = list(tiny.student.model.state_dict())
        # Captions of other lengths every step: other numbers of tokens in every block of the text tower.
        totals[compiled] = [tiny.step(step, lr=LR).total.item() for step in range(STEPS)]
        tiny.close()
    assert names[True] == names[False]
    tolerance = TOLERANCES[precision]
    assert totals[True] == pytest.approx(totals[False], abs=tolerance)
    assert abs(totals[False][-1] - totals[False][0]) > 10 * tolerance, "weights that do not move compare nothing"
    assert 0 < counters["stats"]["unique_graphs"] <= (MOST_RECOMPUTED if recompute else MOST_GRAPHS)
    assert not counters["graph_break"]


def test_copies_of_a_compiled_model_compute_with_their_own_weights() -> None:
    model, batch = initialised(SMALL.model_copy(update={"compile": True})), small_batch(2)
    loaded = CosmosModel(SMALL.model_copy(update={"compile": True}))
    loaded.load_state_dict(model.state_dict())
    # What is compiled is called, but runs as it is written: which weights it takes shows without a compiler.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(batch).image
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
        for parameter in model.parameters():
            parameter.zero_()
        for other in copies:
            assert torch.equal(other(batch).image, expected)
