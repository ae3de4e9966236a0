"""The Triton kernels of colour in Triton's interpreter against batched torch: prints a json line for each case.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET.
"""

import json
import sys

import torch
from torch import Tensor

from cosmos_scale.config import BlurConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.decode.crop_colour import colour_by_kernels_, colour_crops_
from cosmos_scale.kernels import triton_colour
from tests.data.decode.crop_plans import plan_fields, some_pixels

SAMPLES = 13
NO_BLUR = BlurConfig(first_global=0, other_globals=0, local=0)
CASES = {
    "jitter": ViewsConfig(jitter=JitterConfig(probability=1), grey=0, solarise=0, blur=NO_BLUR),
    "wide jitter": ViewsConfig(
        jitter=JitterConfig(probability=1, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5),
        grey=0,
        solarise=0,
        blur=NO_BLUR,
    ),
    "grey and solarised": ViewsConfig(grey=0.5, solarise=1, blur=NO_BLUR),
    "whole plans": ViewsConfig(solarise=0.5),
    "large blurs": ViewsConfig(
        jitter=JitterConfig(probability=0),
        grey=0,
        blur=BlurConfig(first_global=0.7, other_globals=1, local=1, radius=(0.1, 4.0)),
    ),
}


def main() -> int:
    """Run all cases with programs of few pixels, so that a crop takes several."""
    triton_colour.PIXELS = 64
    for name, views in CASES.items():
        fields = plan_fields(views, SAMPLES)
        pixels = some_pixels(views.global_crops, SAMPLES, 11, 13)
        expected, result = (torch.full((views.global_crops, SAMPLES, 3, 11, 13), 7, dtype=torch.uint8) for _ in "ab")
        colour_crops_(expected, pixels, *fields.values())
        colour_by_kernels_(result, pixels, *fields.values())
        difference: Tensor = (expected.int() - result.int()).abs()
        changed = (result.permute(0, 1, 3, 4, 2) != torch.stack(pixels)).float().mean().item()
        misses = (difference > 0).float().mean().item()
        print(json.dumps({"case": name, "most": int(difference.max()), "misses": misses, "changed": changed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
