"""DeepSpeed's one-time build of its shared-memory communication for ranks on CPUs."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path

from cosmos_scale.errors import UserError


def build_cpu_communication() -> float:
    """Compile what DeepSpeed's ranks on CPUs need, unless it lies in torch's extension cache; return the seconds taken.

    It takes a minute or two, once per environment and torch version. Left to the first launch, all ranks wait for it
    without a word, and under some torch versions a launch killed meanwhile leaves a lock that the next waits for: so it
    is done here, alone. Raises UserError where there is no C++ compiler.
    """
    use_own_environment()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{compiler}: not found on PATH; DeepSpeed builds its CPU communication with a C++ compiler")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = time.perf_counter()
    from deepspeed.accelerator import get_accelerator  # here, since it takes seconds and --help should not

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # None: an accelerator that communicates by other means
        builder.load(verbose=False)
    return time.perf_counter() - started


def use_own_environment() -> None:
    """Let builds and subprocesses use this interpreter's environment, activated or not.

    Its programs (ninja, deepspeed) come first on PATH, and extensions are built into it: DeepSpeed's build depends on
    the place of its sources, so environments that share torch's usual cache rebuild it in turn.
    """
    # It warns on machines with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
