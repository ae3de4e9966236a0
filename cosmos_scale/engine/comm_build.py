"""DeepSpeed's one-time build of its shared-memory communication for ranks on CPUs."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path

from cosmos_scale.errors import UserError


def build_cpu_communication() -> float:
    """Compile what DeepSpeed's ranks on CPUs need, unless torch's extension cache has it; return the seconds taken.

    The build takes a minute or two, once for each environment and torch version. In the first launch all ranks would
    wait for the build without a message. A launch that is killed meanwhile leaves a lock under some torch versions, and
    the next launch waits for the lock. So the build is done here, by one process. Raises UserError where there is no
    C++ compiler.
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

    The environment's programs (ninja, deepspeed) come first on PATH. Extensions are built into the environment:
    DeepSpeed's build depends on where its sources lie, so two environments that share torch's usual cache would each
    undo the other's build. Raises UserError where the folder for extensions cannot be made.
    """
    # torch's module warns on machines with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        try:
            os.makedirs(extensions, exist_ok=True)  # as torch does, without a line for the user
        except OSError as error:
            said = error.strerror or error
            raise UserError(f"TORCH_EXTENSIONS_DIR: {extensions}: {said}; rule: a folder that can be made") from error
