"""The sides that the step benchmark compares do the same work, and what they are measured by is counted right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_scale.batch import Features, caption_lengths
from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.flops import (
    Tokens,
    loss_flops,
    student_flops,
    student_tokens,
    teacher_flops,
    teacher_tokens,
)
from cosmos_scale.profiling.planned_batch import GLOBAL_TOKENS, LOCAL_TOKENS
from cosmos_scale.testing.published_step import Losses, PublishedStep
from cosmos_scale.testing.step_race import (
    CASES,
    MATRIX,
    PRODUCTS,
    TOLERANCE,
    LossesDifferError,
    Race,
    TrainerStep,
    case_config,
    compare_losses,
    initial_weights,
    restated_step,
    step_batch,
)
from cosmos_scale.testing.tiny import worst_difference
from tests.conftest import REPOSITORY
from tools.check_golden import GROUPS, Golden


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return case_config(CASES["tiny"])


def test_the_restatement_trains_as_the_published_implementation_did() -> None:
    """All steps of a golden file, whose numbers the published code computed; check_golden's tolerances."""
    golden = Golden(REPOSITORY / "tests" / "golden" / "cosmos_tiny.safetensors")
    config = golden.run_config(zero_stage=0)
    step = PublishedStep(config.model, golden.state_dict("student."), golden.state_dict("teacher."), config.optimizer)
    trajectory, total = golden.trajectory(), config.total_steps(1)
    for number in range(len(trajectory["total_loss"])):
        lr, momentum = learning_rate(number, config.optimizer, total), ema_momentum(number, config.ema, total)
        losses = step(golden.batch(number), lr, momentum)
        for kind, value in losses._asdict().items():
            assert abs(value - trajectory[f"{kind}_loss"][number].item()) <= GROUPS["trajectory"].tolerance, number
    for prefix, model in (("final.student.", step.student), ("final.teacher.", step.teacher)):
        worst, name = worst_difference(_flat(model.state_dict()), _flat(golden.state_dict(prefix)))
        assert worst <= GROUPS["final_student"].tolerance, name


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_trainer_and_restatement_take_the_same_steps(zero_stage: int) -> None:
    """Losses, and both models' weights after steps large enough to change the losses."""
    config = case_config(CASES["tiny"], zero_stage)
    weights = initial_weights(config)
    trainer, restatement = TrainerStep(config, weights, start_ranks("cpu")), restated_step(config, weights)
    totals = []
    for number in range(3):
        losses = [side(step_batch(config, number % 2), 1e-3, 0.9) for side in (trainer, restatement)]
        compare_losses({"trainer": losses[0], "restatement": losses[1]}, "trainer", number)
        totals.append(losses[0].total)
    assert abs(totals[2] - totals[0]) > 100 * TOLERANCE, "one batch twice: unless weights move, nothing was compared"
    for ours, theirs in (
        (trainer.pair.student.model, restatement.student),
        (trainer.pair.teacher.model, restatement.teacher),
    ):
        # Rounding of gradients near zero, which Adam divides by themselves.
        worst, name = worst_difference(_flat(ours.state_dict()), _flat(theirs.state_dict()))
        assert worst <= 2e-4, name
    trainer.close()


def _flat(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.flatten() for name, weight in weights.items()}


@pytest.mark.parametrize("wrong", [1.0 + 2 * TOLERANCE, float("nan")])
def test_other_losses_are_refused(wrong: float) -> None:
    same = Losses(total=1.5, clip=0.5, distill=1.0 + TOLERANCE / 2)
    compare_losses({"a": same, "b": same._replace(distill=1.0)}, "a", 0)
    with pytest.raises(LossesDifferError, match=r"step 4: the distill loss is .* for b and 1.00005 for a"):
        compare_losses({"a": same, "b": same._replace(distill=wrong)}, "a", 4)


def test_captions_are_as_long_as_real_ones(config: RunConfig) -> None:
    lengths = torch.cat([step_batch(config, seed).caption_lengths for seed in range(200)], dim=1)
    for part, (least, most) in ((lengths[:2], GLOBAL_TOKENS), (lengths[2:], LOCAL_TOKENS)):
        assert part.min() == least
        assert part.max() == most
    batch = step_batch(config, 0)
    assert torch.equal(caption_lengths(batch.captions), batch.caption_lengths)
    behind = torch.arange(config.model.text.context_length) >= batch.caption_lengths[..., None]
    assert torch.equal(batch.captions == 0, behind)


def test_needed_operations_are_those_that_torch_counts(config: RunConfig) -> None:
    """Torch counts the products of the trainer's model, less those beyond need, and of one logit matrix a pair."""
    batch = step_batch(config, 0)
    model = CosmosModel(config.model)
    model.load_state_dict(initial_weights(config))

    with FlopCounterMode(display=False) as student, sdpa_kernel(SDPBackend.MATH):
        features = model(batch)
        torch.autograd.backward(list(features), [torch.ones_like(feature) for feature in features])
    with FlopCounterMode(display=False) as teacher, sdpa_kernel(SDPBackend.MATH):
        targets = model.teacher_features(batch, 2)
    features = Features(*(feature.detach().requires_grad_() for feature in features))
    with FlopCounterMode(display=False) as loss:
        pairs = [(view, caption) for view in features.image[:2] for caption in features.text]
        students, taught = [features.image_crossmodal, features.text_crossmodal], [targets.image, targets.text]
        pairs += [(view, target) for view in torch.cat(students) for target in torch.cat(taught)]
        torch.stack([view.mm(other.T).sum() for view, other in pairs]).sum().backward()

    # A position table for local crops, 4 patches from 16: the product, and its gradient by the table.
    interpolation = 2 * 2 * 4 * 16 * config.model.vision.width
    # The EOT of first captions is read for itself and among their tokens: twice through the last block's 9 D^2.
    twice = 9 * 2 * config.model.text.width**2 * batch.captions.shape[1]
    beyond = interpolation + 3 * (_beyond_need(student_tokens(batch, config), config.model) + twice)
    assert student.get_total_flops() == student_flops(batch, config) + beyond
    beyond = _beyond_need(teacher_tokens(batch, config), config.model)
    assert teacher.get_total_flops() == teacher_flops(batch, config) + beyond
    assert loss.get_total_flops() == loss_flops(batch, config)


def _beyond_need(segments: tuple[Tokens, Tokens], model: ModelConfig) -> int:
    """What the towers' forward multiplies without need, where attention is two products without a mask's savings."""
    total = 0
    sizes = ((model.vision.width, model.vision.layers), (model.text.width, model.text.layers))
    for tokens, (width, layers), causal in zip(segments, sizes, (False, True), strict=True):
        # The last block projects queries of all tokens, and lets all of them attend; attention pads, and masks.
        of_segments = list(zip(tokens.lengths.tolist(), tokens.read.tolist(), strict=True))
        total += 2 * width**2 * sum(length - read for length, read in of_segments)
        lengths = sorted((length for length, _ in of_segments), reverse=True)
        computed = sum(group.size * group.queries * group.keys for group in Segments(lengths).groups)
        seen = {length: length * (length + 1) // 2 if causal else length**2 for length in lengths}
        needed = sum(
            (layers - 1) * seen[length] + (seen[length] if read == length else length) for length, read in of_segments
        )
        total += 4 * width * (layers * computed - needed)
    return total


def test_speed_and_share_come_from_medians() -> None:
    product = PRODUCTS * 2 * MATRIX**3
    # One slow step, as a busy machine has them, moves nothing.
    result = Race({"a": [2.0, 2.0, 50.0], "b": [6.0, 6.0, 6.0]}, [1.0, 1.0, 9.0], [product, product, product])
    assert result.ratio("a", "b") == 3.0
    assert result.sgemm_rate() == product
    assert result.sgemm_share("a") == 0.5


def test_the_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "speedup.json"
    options = f"--model tiny --steps 1 --threads 1 --json {file}".split()
    finished = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "step_speedup.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(figures) == ["step_speedup_tiny", "sgemm_share_tiny", "step_memory_ratio_tiny"]
    assert all(row["value"] > 0 for row in figures.values())
    assert "medians of 1 steps" in figures["step_speedup_tiny"]["note"]
    assert "1 thread" in figures["step_speedup_tiny"]["note"]
