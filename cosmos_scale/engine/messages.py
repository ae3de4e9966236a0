"""What torch and DeepSpeed may say."""

import logging
import os
import warnings

_LIBRARIES = ("torch", "DeepSpeed")  # their loggers
_MODULES = r"(torch|deepspeed)(\.|$)"  # of their warnings


def limit_messages(level: str) -> None:
    """Show the libraries' messages from a level on (info, warning, error); below error, those of rank 0 alone.

    What C++ code of torch says obeys where this is called before torch is imported.
    """
    if os.environ.get("RANK", "0") != "0":
        level = "error"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(level.upper())
    if level == "error":
        warnings.filterwarnings("ignore", module=_MODULES)
        # DeepSpeed calls torch's collectives by their old names, and torch attributes its warnings to the caller.
        warnings.filterwarnings("ignore", message=".*_tensor` is deprecated", category=FutureWarning)
