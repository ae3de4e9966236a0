"""The DeepSpeed configuration that a run's own configuration implies."""

from collections.abc import Mapping
from typing import Any

from cosmos_scale.config import RunConfig
from cosmos_scale.host import uses_gpu

GRADIENT_BUCKET = 50_000_000


def gradient_bucket(elements: int) -> int:
    """Return how many gradient elements are reduced at a time in a model of so many; DeepSpeed's 5e8 take 2 GB."""
    return max(1, min(GRADIENT_BUCKET, elements // 8))


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
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": uses_gpu(config.device)}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.samples_per_rank(world_size) // config.train.micro_batches,
        "gradient_accumulation_steps": config.train.micro_batches,
        # DeepSpeed clips where it knows the norm; elsewhere the layout clips.
        "gradient_clipping": (config.optimizer.clip_norm or 0.0) if zero.get("compute_grad_norm", True) else 0.0,
        "zero_allow_untested_optimizer": True,
        # Our optimizer steps on the host too. DeepSpeed's CPU optimizer would be compiled at the first launch.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # Our device-side gate replaces DeepSpeed's overflow check, which the host waits for.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16"},
        "communication_data_type": config.zero.gradient_dtype,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }


def teacher_deepspeed_config(config: RunConfig, world_size: int, zero: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary for the engine of a teacher with sharded weights and without an optimizer.

    zero: `zero_optimization` for such an engine.
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
    return {"zero_optimization": dict(zero)} | {key: student[key] for key in kept}
