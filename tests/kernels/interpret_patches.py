"""The Triton kernel of patches in Triton's interpreter against torch's form: prints a json line for each case.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET.
"""

import json
import sys

import torch

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.kernels import triton_patches
from cosmos_scale.kernels.patches import level_values, normalised_patches
from tests.kernels.test_patches import some_crops

# Patch size, (crops, height, width), dtype. bfloat16 is not rounded to nearest in the interpreter.
CASES = (
    (4, (3, 8, 8), torch.float32),
    (4, (2, 10, 15), torch.float32),
    (5, (2, 11, 24), torch.float16),
    (16, (1, 32, 48), torch.float16),
    (8, (1, 7, 9), torch.float32),
)


def main() -> int:
    """Run all cases with programs of few pixels, so that several take one line of patches."""
    triton_patches.PIXELS = 64
    for size, shape, dtype in CASES:
        crops, values = some_crops(shape), level_values(MEAN, STD, dtype)
        expected = normalised_patches(crops, size, values)
        rows = torch.full_like(expected, torch.nan)
        triton_patches.write_patches_(rows, crops[0], values, size)
        print(json.dumps({"size": size, "shape": shape, "equal": torch.equal(rows, expected)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
