"""The DeepSpeed configuration that a run's own configuration implies."""

from collections.abc import Mapping
from typing import Any

import torch

from cosmos_scale.config import RunConfig

GRADIENT_BUCKET = 50_000_000
LIVE_WEIGHTS = 50_000_000
REUSED_WEIGHTS = 20_000_000
PERSISTENT_WEIGHTS = 100_000
"""Stage 3 keeps parameters of fewer elements than this whole on every rank: norms, biases, scales."""


def gradient_bucket(elements: int) -> int:
    """Return how many gradient elements are reduced at a time in a model of so many; DeepSpeed's 5e8 take 2 GB."""
    return max(1, min(GRADIENT_BUCKET, elements // 8))


def stage_3_keys(elements: int) -> dict[str, Any]:
    """Return DeepSpeed's keys of stage 3 for a model of so many elements.

    With DeepSpeed's defaults a model of up to 10^9 elements would stay whole on every rank.
    """
    return {
        # True would replace torch.nn.functional.linear in the whole process. The model has a linear map of its own
        # (kernels/linear.py), which saves the same memory.
        "memory_efficient_linear": False,
        # In elements: how many are gathered ahead, how many may be gathered at one time, and within how many others a
        # gathered tensor must be used again to be kept meanwhile.
        "stage3_prefetch_bucket_size": min(REUSED_WEIGHTS, elements // 8),
        "stage3_max_live_parameters": min(LIVE_WEIGHTS, elements // 3),
        "stage3_max_reuse_distance": min(REUSED_WEIGHTS, elements // 8),
        "stage3_param_persistence_threshold": PERSISTENT_WEIGHTS,
    }


def deepspeed_config(config: RunConfig, world_size: int, elements: int, zero_keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`, for a model of so many elements.

    zero_keys: what the stage's layout adds to `zero_optimization`. Raises UserError where world_size does not divide
    the batch.
    """
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": gradient_bucket(elements),
        **zero_keys,
    }
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.samples_per_rank(world_size) // config.train.micro_batches,
        "gradient_accumulation_steps": config.train.micro_batches,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # Our optimizer steps on the host too. DeepSpeed's CPU optimizer would be compiled at the first launch.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # Our device-side gate replaces DeepSpeed's overflow check, which the host waits for.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16"},
        # Low-precision gradients are summed over ranks in fp32.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def teacher_deepspeed_config(config: RunConfig, world_size: int, zero_keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary for the engine of a teacher with sharded weights and without an optimizer.

    zero_keys: what the layout of stage 3 adds to `zero_optimization`.
    """
    student = deepspeed_config(config, world_size, 0, {})
    kept = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "bf16",
        "fp16",
        "steps_per_print",
        "timers",
    )
    zero = {
        "stage": 3,
        **zero_keys,
        # Parameters that stayed gathered would not see what is written into the shards.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {"zero_optimization": zero} | {key: student[key] for key in kept}
