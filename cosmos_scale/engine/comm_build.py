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
    check_extensions()
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


def check_extensions() -> None:
    """Raise UserError where the folder to build into cannot be made, or neither it nor a folder in it be written to.

    So it is in a container with another user: its environment belongs to root, its home is / or not known. torch would
    make a folder called ~ in the current one where no home is known. What root has built does not serve other users:
    torch takes a lock beside it.
    """
    named, folder = os.environ.get("TORCH_EXTENSIONS_DIR"), _extensions()  # if named, made by use_own_environment
    wrong = "made: no home folder is known" if not named and str(folder).startswith("~") else None
    try:
        if wrong is None:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(os.access(place, os.W_OK | os.X_OK) for place in (folder, *folder.glob("*/"))):
                wrong = "written to"
            elif (build := _build_of_another(folder)) is not None:
                folder, wrong = build, "written to, which another user has built"
    except OSError as error:
        wrong = f"made: {error.strerror or error}"
    if wrong is not None:
        raise UserError(
            f"TORCH_EXTENSIONS_DIR: {'' if named else 'not set, and '}{folder} cannot be {wrong}; rule: name a folder "
            "that can be made and written to, where DeepSpeed's communication for CPUs is built once"
        )


def _build_of_another(folder: Path) -> Path | None:
    """Return the folder of a build in which this user cannot take torch's lock, None where there is none.

    So it is in an environment that a group shares, where the first user's build has files that others may not write.
    """
    for build in (*folder.glob("deepspeed_shm_comm"), *folder.glob("*/deepspeed_shm_comm")):
        lock = build / "lock"
        if not os.access(build, os.W_OK | os.X_OK) or (lock.exists() and not os.access(lock, os.W_OK)):
            return build
    return None


def is_built() -> bool:
    """Return whether torch's extensions hold what DeepSpeed's ranks on CPUs need, of whichever version."""
    return any(_extensions().glob("**/deepspeed_shm_comm.so"))


def _extensions() -> Path:
    """Return the folder that torch builds extensions into, or makes folders for its versions in."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions"))


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
    undo the other's build. Where the environment, or a build in it, is another user's, torch's usual cache serves,
    below the user's home. Raises UserError where the folder for extensions cannot be made.
    """
    # torch's module warns on machines with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in folders:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
    own = Path(sys.prefix) / "torch_extensions"
    if os.access(own if own.exists() else sys.prefix, os.W_OK) and _build_of_another(own) is None:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own))
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        try:
            os.makedirs(extensions, exist_ok=True)  # as torch does, without a line for the user
        except OSError as error:
            said = error.strerror or error
            raise UserError(f"TORCH_EXTENSIONS_DIR: {extensions}: {said}; rule: a folder that can be made") from error
