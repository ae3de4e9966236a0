"""The command line `cosmos-scale`, a file a command."""

import sys
from pathlib import Path

from cosmos_scale.interrupt import tell_interrupts

# `-m` while Python looks for the module of `python -m`. Other programs, such as tests, keep their own interrupts.
if Path(sys.argv[0]).name in ("-m", "cosmos-scale"):
    tell_interrupts("cosmos-scale")
