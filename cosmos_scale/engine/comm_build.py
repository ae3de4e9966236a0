"""DeepSpeed's one-time build of its shared-memory communication for ranks on CPUs."""

import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from cosmos_scale.errors import UserError


def build_cpu_communication() -> float:
    """Compile what DeepSpeed's ranks on CPUs need, unless torch's extension cache has it; return the seconds taken.

    The build takes a minute or two, once for each environment and torch version. In the first launch all ranks would
    wait for the build without a message. A launch that is killed meanwhile leaves a lock under some torch versions, and
    the next launch waits for the lock. So the build is done here, by one process. Raises UserError where there is no
    C++ compiler, or the build fails.
    """
    use_own_environment()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{compiler}: not found on PATH; DeepSpeed builds its CPU communication with a C++ compiler")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = time.perf_counter()
    load_cpu_communication()
    return time.perf_counter() - started


def load_cpu_communication() -> None:
    """Load what DeepSpeed's ranks on CPUs need, after a build where torch's extension cache lacks it.

    torch builds anew where CXX or the flags have changed. Raises UserError where the build or the loading fails.
    """
    from deepspeed.accelerator import get_accelerator  # here, since it takes seconds and --help should not

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:  # an accelerator that communicates by other means
        return
    try:
        builder.load(verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR", "the folder of torch's extensions")
        raise UserError(
            f"DeepSpeed's communication for CPUs cannot be built or loaded: {_line_of_cause(str(error))}; rule: a C++ "
            f"compiler ({os.environ.get('CXX', 'g++')}) and ninja work here; delete {folder} where its files are "
            "damaged, or name another by TORCH_EXTENSIONS_DIR; `cosmos-scale setup` builds once for all runs"
        ) from error


def _line_of_cause(text: str) -> str:
    """Return the line of a build's output that says what failed: the first with an error in it, or the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason is given"]
    signs = ("error:", "not found", "No such file", "Permission denied", "No space left")
    # The first line holds the compiler's whole command.
    return next((line for line in lines[1:] if any(sign in line for sign in signs)), lines[0])


def use_own_environment() -> None:
    """Let builds and subprocesses use this interpreter's environment, activated or not.

    The environment's programs (ninja, deepspeed) come first on PATH. Extensions are built into the environment:
    DeepSpeed's build depends on where its sources lie, so two environments that share torch's usual cache would each
    undo the other's build. Where neither the environment nor the user's cache can be written to, as in containers that
    run as a user without a home, they are built into a folder for temporary files. Raises UserError where the folder
    for extensions cannot be made.
    """
    # torch's module warns on machines with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
    if "TORCH_EXTENSIONS_DIR" not in os.environ and (chosen := _extensions_folder()) is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = chosen
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        try:
            os.makedirs(extensions, exist_ok=True)  # as torch does, without a line for the user
        except OSError as error:
            said = error.strerror or error
            raise UserError(f"TORCH_EXTENSIONS_DIR: {extensions}: {said}; rule: a folder that can be made") from error


def _extensions_folder() -> str | None:
    """Return where extensions are built, None where torch's usual place serves, or none does."""
    if os.access(sys.prefix, os.W_OK):
        return str(Path(sys.prefix) / "torch_extensions")
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))  # as torch finds it
    usual = os.path.join(cache, "torch_extensions")
    with suppress(OSError):
        # Without a home ~ stays as it is, and torch would make a folder of that name in the current one.
        if not cache.startswith("~"):
            os.makedirs(usual, exist_ok=True)
            if os.access(usual, os.W_OK | os.X_OK):
                return None
    with suppress(OSError):
        own = Path(tempfile.gettempdir(), f"torch_extensions_{os.geteuid()}")
        with suppress(FileExistsError):
            own.mkdir(mode=0o700)
        found = own.lstat()
        # What lies there is executed, and all users can make this name.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            return str(own)
    return None
