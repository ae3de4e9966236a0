"""ZeRO's stage 3 as large models have it: few weights kept whole, several shards a group, uneven shares."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.engine import zero
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.profiling.collectives import CollectiveCounter
from cosmos_scale.profiling.phased_step import step_in_phases
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import Tiny, build_tiny, tiny_batch, tiny_config
from tests.loss.reference import operations

# Most sizes of the tiny model are powers of two: parts of three ranks are padded, some are padding altogether.
WORLD_SIZE = 3
GLOBAL_BATCH = 6
STEPS = 5
# fp32 sums of one batch in another order, over five updates.
TOLERANCE = 1e-5


class Case(NamedTuple):
    """What one run sets; `kept` and `shard` are elements, of parameters kept whole at most and of a shard about."""

    stage: int = 3
    kept: int = 100
    shard: int = 9000
    offload: bool = False
    micro_batches: int = 1
    recompute: int = 0

    def config(self) -> RunConfig:
        """The run's configuration."""
        train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100}
        return tiny_config(
            zero={"stage": self.stage, "offload": self.offload},
            train=train | {"micro_batches": self.micro_batches, "recompute": self.recompute},
            optimizer={"warmup_steps": 0, "clip_norm": 1.0},
        )


REFERENCE = Case(0)
CASES = [
    Case(),
    Case(recompute=1),
    Case(offload=True, micro_batches=2, recompute=2),
    Case(kept=0, shard=500, micro_batches=2, recompute=1),
]


def run_cases(rank: int, world_size: int) -> dict[Case, dict[str, Any]]:
    """Losses and gradients' norms of every case."""
    ranks = start_ranks("cpu")
    results = {}
    full = zero.ShardedWeights.zero_keys
    for case in [REFERENCE, *CASES]:

        def smaller(config: RunConfig, elements: int, case: Case = case) -> dict[str, Any]:
            own = {"sub_group_size": case.shard, "stage3_param_persistence_threshold": case.kept}
            if not case.kept:  # each module's weights by themselves, for each use anew
                own |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
            return full(config, elements) | own

        zero.ShardedWeights.zero_keys = staticmethod(smaller)  # type: ignore[method-assign]
        tiny = build_tiny(case.config(), ranks, teacher_seed=1)
        results[case] = run_case(tiny, rank)
        results[case]["shards"] = len(tiny.student.optimizer.shards[0])
        if case.stage == 3:
            kept = tiny.student.layout.engine.optimizer.persistent_parameters
            results[case]["gathered"] = len(list(tiny.student.model.parameters())) - len(kept)
            names = operations(torch.no_grad()(tiny.student.layout.publish))
            results[case]["kept"] = len(kept)
            results[case]["gathers"] = [name for name in names if name.startswith("c10d::")]
            results[case]["awaited"] = awaited_by_gathers(tiny)
            results[case]["tables"] = gathered_tables(tiny, rank)
        tiny.close()
    return results


def awaited_by_gathers(tiny: Tiny) -> list[object]:
    """Return the streams that DeepSpeed's stream of gathers is told to wait for once weights were written."""
    offload = tiny.student.layout.engine.optimizer.parameter_offload
    awaited: list[object] = []
    name = "_DeepSpeedZeRoOffload__allgather_stream"
    assert getattr(offload, name) is None  # on a CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, name, SimpleNamespace(wait_stream=awaited.append))
        patch.setattr(torch.cuda, "current_stream", lambda device: f"of the writes on {device}")
        tiny.student.publish()
    return awaited


def run_case(tiny: Tiny, rank: int) -> dict[str, Any]:
    """Five steps, with an evaluation and a change of the weights from outside between them, which leave no trace."""
    losses, norms = [], []
    for step in range(STEPS):
        if step == 2:
            for measured in (tiny.student, tiny.teacher):
                with measured.whole_model() as model, torch.no_grad():
                    for _ in range(rank + 1):  # ranks may have galleries of different lengths
                        model.encode_image(tiny_batch(0).global_crops[0])
        if step == 3:
            before = tiny.fragments()
            for weights in ({key: torch.full_like(t["weight"], 3.0) for key, t in before.items()}, None):
                for fragment in tiny.student.fragments:
                    key = (fragment.name, fragment.start)
                    fragment.weight.copy_(before[key]["weight"] if weights is None else weights[key])
                tiny.student.publish()
        output = tiny.step(step, batch=tiny_batch(step, GLOBAL_BATCH))
        losses.append(output.total.item())
        norms.append(output.gradient_norm.item())
    return {"losses": losses, "norms": norms}


def gathered_tables(tiny: Tiny, rank: int) -> int:
    """Take a step, and return how often it gathers the student's token embedding by itself."""
    text = tiny_config().model.text
    padded = WORLD_SIZE * -(-text.vocab_size * text.width // WORLD_SIZE)
    counter = CollectiveCounter()
    with counter:
        share = tiny_batch(STEPS, GLOBAL_BATCH).split(WORLD_SIZE)[rank]
        step_in_phases(tiny.student, tiny.teacher, tiny.loss, share, counter.enter_phase)
    student = [found for found in counter.seen if found.phase != "teacher" and found.kind == "all_gather"]
    return sum(found.elements == padded for found in student)


@pytest.mark.slow  # five engines in three processes
def test_gathered_weights_and_several_shards_train_as_whole_ones() -> None:
    for results in run_ranks(run_cases, WORLD_SIZE, timeout=200):
        reference = results[REFERENCE]
        assert max(reference["losses"]) - min(reference["losses"]) > 0.05
        for case in CASES:
            assert results[case]["shards"] > 3
            assert results[case]["gathered"] > 30  # none of this model with the default threshold
            assert results[case]["kept"] > 10 or not case.kept
            assert len(results[case]["gathers"]) == bool(results[case]["kept"])  # all of them travel together
            assert results[case]["awaited"] == ["of the writes on cpu"]
            if not case.kept:  # two micro-batches, each without a graph and with one; not for the backward
                assert results[case]["tables"] == 2 * case.micro_batches
            assert results[case]["losses"] == pytest.approx(reference["losses"], abs=TOLERANCE), case
            assert results[case]["norms"] == pytest.approx(reference["norms"], rel=TOLERANCE), case
