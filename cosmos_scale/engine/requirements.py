"""Checks, before anything starts, that this machine can do what the keys of a run's model ask for."""

import os
import shutil
import tempfile

import torch

from cosmos_scale.config import ModelConfig
from cosmos_scale.errors import UserError
from cosmos_scale.kernels.attention import obstacle

COMMON_HEAD = 64


def check_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where model.attention or model.compile cannot run on a device, in the precision `dtype`."""
    if model.attention != "auto":
        # The first try uses a head size that every back end supports. If it fails, the head size is not the cause, so
        # the message names no head.
        for key, size in {"": COMMON_HEAD, **_head_sizes(model)}.items():
            reason = obstacle(model.attention, device, dtype, size)
            if reason:
                raise UserError(
                    f"model.attention: {model.attention!r} cannot run here: {reason}{key and f' ({key})'}; "
                    "rule: a back end must run on this device, in this precision; auto takes one that does"
                )
    if model.compile:
        names = _compilers(device)
        if not any(shutil.which(name) for name in names):
            raise UserError(
                f"model.compile: true, but there is no compiler ({' or '.join(names)}) on PATH; "
                "rule: torch.compile needs one, so install it or use false"
            )
        _check_compiled_code()


def _check_compiled_code() -> None:
    """Raise UserError where torch.compile cannot write what it compiles: its folder may be another user's."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir  # here: it imports the compiler

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    try:
        with tempfile.TemporaryFile(dir=cache_dir()):
            pass
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR: {folder} cannot be written to: {error.strerror or error}; rule: with "
            "model.compile true, name a folder of your own there"
        ) from error


def _head_sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "model.vision.head_width": model.vision.head_width,
        "model.text.width / model.text.heads": model.text.width // model.text.heads,
        "model.embed_dim / model.pooler_heads": model.embed_dim // model.pooler_heads,
    }


def _compilers(device: torch.device) -> list[str]:
    """Return the compilers of which torch.compile needs one: for C++ on CPUs, for Triton's C stubs on GPUs."""
    if device.type == "cpu":
        return [os.environ.get("CXX", "g++")]
    return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
