"""The same step on 1, 2 and 4 ranks, at every stage of ZeRO."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import build_tiny, tiny_batch, tiny_config, whole, worst_difference

# fp32 sums of one batch in another order; the losses of one process repeated in float64 differ by less than 1e-6.
TOLERANCE = 1e-5
BETA1 = 0.9

Case = tuple[int, str]  # stage, gradient_scale
CASES: list[Case] = [(stage, scale) for scale in ("true", "published") for stage in (0, 1, 2, 3)]


def run_cases(rank: int, world_size: int) -> dict[Case, dict[str, Any]]:
    """One step of every case, then one with a value that is not finite on the last rank."""
    ranks = start_ranks("cpu")
    results: dict[Case, dict[str, Any]] = {}
    for stage, scale in CASES:
        config = tiny_config(
            zero={"stage": stage}, optimizer={"warmup_steps": 0, "gradient_scale": scale}, ema={"momentum": 0.9}
        )
        tiny = build_tiny(config, ranks, teacher_seed=1)
        output = tiny.step(0)
        after = tiny.fragments()
        bad = tiny_batch(1)
        bad.local_crops[0, -1] = torch.inf
        bad_output = tiny.step(1, batch=bad)
        results[stage, scale] = {
            "losses": [output.total.item(), output.clip.item(), output.distill.item()],
            "norm": output.gradient_norm.item(),
            "fragments": after,
            "after_bad": tiny.fragments(),
            "bad_finite": (bool(bad_output.finite), bool(bad_output.features_finite)),
            "updates": tiny.student.updates,
        }
        with tiny.teacher.whole_model() as model:
            results[stage, scale]["teacher"] = {
                name: tensor.flatten().clone() for name, tensor in model.named_parameters()
            }
        tiny.close()
    return results


@functools.cache
def results_of(world_size: int) -> list[dict[Case, dict[str, Any]]]:
    return run_ranks(run_cases, world_size, timeout=240)


def state_of(world_size: int, case: Case, kind: str) -> dict[str, Tensor]:
    return whole([result[case]["fragments"] for result in results_of(world_size)], kind)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 4])
class TestAgainstOneProcess:
    def test_losses(self, world_size: int, case: Case) -> None:
        alone = results_of(1)[0][case]["losses"]
        for result in results_of(world_size):
            assert result[case]["losses"] == pytest.approx(alone, rel=TOLERANCE)

    def test_gradients(self, world_size: int, case: Case) -> None:
        # After one update the first moment is (1 - beta1) times the gradient that the optimizer was given.
        ours, alone = state_of(world_size, case, "exp_avg"), state_of(1, case, "exp_avg")
        if case[1] == "published":
            ours = {name: t if name.endswith("logit_scale") else t * world_size for name, t in ours.items()}
        assert worst_difference(ours, alone)[0] <= TOLERANCE

    def test_weights_after_the_update(self, world_size: int, case: Case) -> None:
        if case[1] == "published":
            return  # Adam's eps weighs more on smaller gradients; the gradients themselves are compared above
        worst = worst_difference(state_of(world_size, case, "weight"), state_of(1, case, "weight"))
        assert worst[0] <= TOLERANCE, worst

    def test_gradient_norm(self, world_size: int, case: Case) -> None:
        gradient = torch.cat(list(state_of(world_size, case, "exp_avg").values())).double() / (1 - BETA1)
        for result in results_of(world_size):
            # The norm is summed in fp32.
            assert result[case]["norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)

    def test_every_rank_has_the_whole_teacher(self, world_size: int, case: Case) -> None:
        average = state_of(world_size, case, "ema")
        for result in results_of(world_size):
            for name, tensor in result[case]["teacher"].items():
                assert torch.equal(tensor, average[name]), name

    def test_a_bad_value_on_one_rank_changes_nothing_on_any(self, world_size: int, case: Case) -> None:
        for rank, result in enumerate(results_of(world_size)):
            assert result[case]["bad_finite"] == (False, rank < world_size - 1)
            assert result[case]["updates"] == 1
            for key, before in result[case]["fragments"].items():
                for kind, tensor in before.items():
                    assert torch.equal(result[case]["after_bad"][key][kind], tensor), (key, kind)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_published_gradients_are_exactly_one_over_the_world_size(world_size: int, stage: int) -> None:
    true, published = (state_of(world_size, (stage, scale), "exp_avg") for scale in ("true", "published"))
    for name, gradient in true.items():
        factor = 1 if name.endswith("logit_scale") else world_size
        assert torch.equal(published[name] * factor, gradient), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_are_disjoint_and_complete(stage: int) -> None:
    for world_size in (2, 4):
        parts = [result[stage, "true"]["fragments"] for result in results_of(world_size)]
        sizes = {name: tensor.numel() for name, tensor in state_of(1, (0, "true"), "weight").items()}
        assert {name: tensor.numel() for name, tensor in whole(parts, "weight").items()} == sizes
        shares = [sum(tensors["ema"].numel() for tensors in part.values()) for part in parts]
        assert sum(shares) == sum(sizes.values())
        # DeepSpeed pads each of the three groups to equal shares; at stage 3 each parameter.
        padding = world_size * (3 * 64 if stage < 3 else len(sizes))
        assert max(shares) <= (sum(sizes.values()) + padding) / world_size


def run_precisions(rank: int, world_size: int) -> tuple[dict[Case, list[float]], dict[Case, list[float]]]:
    """Losses of three steps and the scales they used: at every stage in the low precisions, at stage 0 in fp32."""
    from deepspeed.accelerator import get_accelerator

    ranks = start_ranks("cpu")
    # torch computes in fp16 on any CPU, slowly; DeepSpeed only wants those that are fast at it.
    get_accelerator().is_fp16_supported = lambda: True
    losses, scales = {}, {}
    for stage, precision in [(0, "fp32"), *((stage, low) for stage in (0, 1, 2, 3) for low in ("bf16", "fp16"))]:
        tiny = build_tiny(tiny_config(zero={"stage": stage}, precision=precision), ranks)
        tiny.student.layout.set_loss_scaler({"cur_scale": 1024.0})  # does not overflow
        outputs = [tiny.step(step) for step in range(3)]
        losses[stage, precision] = [output.total.item() for output in outputs]
        scales[stage, precision] = [output.distill_logit_scale.item() for output in outputs]
        assert tiny.student.updates == 3
        tiny.close()
    return losses, scales


def test_low_precisions_follow_fp32_on_two_ranks() -> None:
    results = run_ranks(run_precisions, 2, timeout=240)
    assert results[0] == results[1]
    exact = results[0][0][0, "fp32"]
    assert exact[2] < exact[0] - 0.5
    for losses in results[0][0].values():
        # bf16 has 8 bits: features differ by up to 2^-8, logits by the scale 14 times that.
        assert losses == pytest.approx(exact, abs=0.03)
    for scales in results[0][1].values():
        # fp32 masters in every precision: bf16 would round them by up to 2^-7. Adam moves them by lr or so a step.
        assert scales == pytest.approx(results[0][1][0, "fp32"], abs=5e-4)
