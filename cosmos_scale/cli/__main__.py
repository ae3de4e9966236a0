"""`python -m cosmos_scale.cli`: the command `cosmos-scale`, where it is not on PATH."""

import sys

from cosmos_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
