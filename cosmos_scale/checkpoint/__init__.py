"""Checkpoints of runs."""

from cosmos_scale.checkpoint.state import find_checkpoint, load_model, load_weights, newest, read_run_config, read_state

__all__ = ["find_checkpoint", "load_model", "load_weights", "newest", "read_run_config", "read_state"]
