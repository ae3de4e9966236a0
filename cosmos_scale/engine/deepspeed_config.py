"""The DeepSpeed configuration that a run's own configuration implies."""

from typing import Any

import torch

from cosmos_scale.config import RunConfig

GRADIENT_BUCKET = 50_000_000
"""Elements that gradients are reduced in at a time, through a buffer of that size; DeepSpeed's own 5e8 take 2 GB."""

STAGE_3 = {
    # It would replace torch.nn.functional.linear in the whole process.
    "memory_efficient_linear": False,
    # Elements gathered ahead, and kept although they are needed again: the defaults keep a model of 10^9 whole.
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 50_000_000,
    "stage3_max_reuse_distance": 20_000_000,
}


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; raises UserError where world_size does not divide the batch."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": GRADIENT_BUCKET,
    }
    if config.zero.stage < 3:
        # Ours is read by the device alone; DeepSpeed's, which clipping and offloading need, is read by the host.
        zero["compute_grad_norm"] = (
            config.zero.stage == 0 or config.zero.offload or config.optimizer.clip_norm is not None
        )
    else:
        zero |= STAGE_3
    if config.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch(world_size) // config.train.micro_batches,
        "gradient_accumulation_steps": config.train.micro_batches,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # Ours steps on the host as well as DeepSpeed's own, which would be compiled at the first launch.
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


def teacher_deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for the teacher's engine at stage 3, which has no optimizer."""
    student = deepspeed_config(config, world_size)
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
        **STAGE_3,
        # Parameters that stayed gathered would not see what is written into the shards.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {"zero_optimization": zero} | {key: student[key] for key in kept}
