"""Learning rate and momentum against the published formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest

from cosmos_scale.config import EmaConfig, OptimizerConfig
from cosmos_scale.engine.schedule import ema_momentum, learning_rate

TOTAL = 32 * 2768  # CC3M's published length
# Both sides are float64; the oracle evaluates the cosine by numpy's half-angle form, so only roundings differ.
TOLERANCE = 1e-12


def oracle_lr(step: int, lr: float, warmup: int, total: int) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    # (1 + cos x) / 2 = cos^2(x / 2)
    return float(lr * np.cos(np.pi / 2 * (step - warmup) / (total - warmup)) ** 2)


@pytest.mark.parametrize("step", [0, 1, 1998, 1999, 2000, 2001, TOTAL // 2, TOTAL - 1])
def test_learning_rate_is_the_published_one(step: int) -> None:
    config = OptimizerConfig()
    assert math.isclose(
        learning_rate(step, config, TOTAL), oracle_lr(step, 5e-4, 2000, TOTAL), rel_tol=1e-9, abs_tol=TOLERANCE
    )


def test_warm_up_starts_above_zero_and_peaks_at_its_last_step() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, config, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, OptimizerConfig(lr=1.0, warmup_steps=0), 100) == 1.0


def test_learning_rate_does_not_rise_again_past_its_end() -> None:
    assert learning_rate(250, OptimizerConfig(warmup_steps=0), 100) == 0.0


def test_fixed_momentum_stays() -> None:
    config = EmaConfig(momentum=0.999)
    assert {ema_momentum(step, config, TOTAL) for step in (0, 1, TOTAL // 2, TOTAL)} == {0.999}


@pytest.mark.parametrize("step", [0, 1, TOTAL // 3, TOTAL // 2, TOTAL - 1, TOTAL])
def test_cosine_momentum_follows_the_formula(step: int) -> None:
    config = EmaConfig(momentum=0.99, schedule="cosine")
    expected = 1.0 - 0.01 * float(np.cos(np.pi / 2 * step / TOTAL)) ** 2
    assert math.isclose(ema_momentum(step, config, TOTAL), expected, abs_tol=TOLERANCE)


def test_cosine_momentum_ends_at_one() -> None:
    config = EmaConfig(momentum=0.9, schedule="cosine")
    assert ema_momentum(0, config, 10) == pytest.approx(0.9, abs=TOLERANCE)
    assert ema_momentum(10, config, 10) == ema_momentum(11, config, 10) == 1.0
