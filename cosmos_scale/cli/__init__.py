"""The command line `cosmos-scale`, a file a command."""

import os
import sys

# `-m` while Python looks for the module of `python -m`. Other programs, such as tests, keep their path and interrupts.
if os.path.basename(sys.argv[0]) in ("-m", "cosmos-scale"):
    from cosmos_scale.import_path import libraries_first

    libraries_first()

    from cosmos_scale.interrupt import tell_interrupts

    tell_interrupts("cosmos-scale")
