"""The DeepSpeed configuration that a run's own configuration implies."""

from typing import Any

from cosmos_scale.config import RunConfig

GRADIENT_BUCKET = 50_000_000
"""Elements that gradients are reduced in at a time, through a buffer of that size; DeepSpeed's own 5e8 take 2 GB."""


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; raises UserError where world_size does not divide the batch."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch(world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": GRADIENT_BUCKET,
            # Ours is read by the device alone; DeepSpeed's, which clipping needs, is read by the host in fp32.
            "compute_grad_norm": config.zero.stage == 0 or config.optimizer.clip_norm is not None,
        },
        # Our device-side gate replaces DeepSpeed's overflow check, which the host waits for.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16"},
        # Low-precision gradients are summed over ranks in fp32.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
