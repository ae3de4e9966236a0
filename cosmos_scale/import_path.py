"""Where a program that starts looks for modules: among the libraries before the user's own files.

Programs import this module before all others, so it imports only what Python has imported when it starts.
"""

import os
import sys


def libraries_first() -> None:
    """Let no file of the current folder, such as a user's yaml.py, hide a module that a library imports.

    `python -m` puts that folder first on Python's path; it goes to the end. A checkout that is started from its own
    folder keeps its place: processes that this one starts must not find another version of it.
    """
    try:
        current = os.path.realpath(os.curdir)
    except OSError:  # it is deleted, which the program says itself
        return
    checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    is_first = os.path.realpath(sys.path[0]) == current and not getattr(sys.flags, "safe_path", False)
    if is_first and current != checkout:
        sys.path.append(sys.path.pop(0))
