"""Learning rate and teacher momentum as pure functions of the step."""

import math

from cosmos_scale.config import EmaConfig, OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero.

    step: counts from 0; the first step already has lr / warmup_steps. total_steps: length of the schedule in steps;
    later steps keep its end value. Source: the published COSMOS recipe.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(total_steps - optimizer.warmup_steps, 1)
    return optimizer.lr * _half_cosine(progress)


def ema_momentum(step: int, ema: EmaConfig, total_steps: int) -> float:
    """Return the share of itself that the teacher keeps at a step: fixed, or on a half cosine from `momentum` to 1.

    step: counts from 0. total_steps: length of the schedule in steps; later steps keep its end value.
    Source: the published COSMOS recipe; the cosine is DINO's.
    """
    if ema.schedule == "fixed":
        return ema.momentum
    return 1.0 - (1.0 - ema.momentum) * _half_cosine(step / total_steps)


def _half_cosine(progress: float) -> float:
    # Clamped: past the schedule's end the cosine would rise again.
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
