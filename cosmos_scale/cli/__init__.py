"""The command line `cosmos-scale`, a file a command."""

import os
import sys

from cosmos_scale.interrupt import tell_interrupts

# `-m` while Python looks for the module of `python -m`. Other programs, such as tests, keep their own interrupts.
if os.path.basename(sys.argv[0]) in ("-m", "cosmos-scale"):
    tell_interrupts("cosmos-scale")
