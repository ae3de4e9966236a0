"""How far results of the kernels may be from exact ones, by kernel and dtype: for the tests and for the GPU report.

Each entry says of what its numbers are a share; "absolute" means of 1. Exact results are those of float64 for the same
inputs, rounded to the dtype before. A dtype has 53 (float64), 24, 11 (float16) or 8 (bfloat16) bits, so one rounding
leaves 1.1e-16, 6e-8, 4.9e-4 or 3.9e-3 of a number at most.
"""

import torch

TOLERANCES: dict[str, dict[str, float]] = {
    # The tiny model of tests/golden in bf16 against published numbers of float32: twice what a CPU gives with torch's
    # operators (features 7.7e-3, all gradients 2.6e-2 relative); the losses' difference (6e-5) is chance.
    "golden features": {"bfloat16": 2e-2},
    "golden losses": {"bfloat16": 1e-3},
    "golden gradients": {"bfloat16": 6e-2},
    # Attention. Of the largest result: sums of up to 201 products of order 1; the weights and their gradients are
    # rounded to the dtype on the way. float32 absolute: sums of up to 77 products, errors of 2e-7 to 2e-6 were seen.
    "attention, absolute": {"float64": 1e-13, "float32": 1e-5},
    "attention, of the largest": {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    # On a GPU against float64, of the largest result or 1: as above, with TF32's 11 bits in float32.
    "attention on a GPU, of the largest": {"float32": 5e-3, "float16": 1e-2, "bfloat16": 6e-2},
    # Relative by norm at a step's sizes, where most errors cancel: some roundings of the dtype.
    "attention, relative": {"float32": 1e-5, "bfloat16": 2e-2},
    # The linear map, absolute: sums of up to 1,000 products of order 1; torch's own product is 1e-4 off in float32.
    "linear, absolute": {"float32": 5e-4},
    # Additions, norms, GELU and bias sums, relative by norm: twice what rounding the results to the dtype may leave.
    "pointwise, relative": {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3},
    # Features of length 1, of the largest value: one rounding; float32 adds up the squares.
    "unit length, of the largest": {"float64": 1e-14, "float32": 4e-7, "float16": 2**-11, "bfloat16": 2**-8},
    # The contrastive loss. Products of two features are exact and added up in float32 in each dtype, so statistics have
    # float32's rounding of logits up to 100 (4e-6, some of them). Gradients, relative by norm: in float32 and where
    # features are widened the softmaxes' rounding, elsewhere slopes are rounded to the dtype before the second product.
    "contrastive statistics, absolute": {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5},
    "contrastive, widened, relative": {"float64": 1e-12, "float32": 6e-6, "float16": 6e-6, "bfloat16": 6e-6},
    "contrastive gradients, relative": {"float32": 6e-6, "float16": 1e-3, "bfloat16": 8e-3},
    # Of one sample, absolute: softmaxes over one logit are 1 up to rounding, then come factors below 20.
    "contrastive of one sample": {"float64": 1e-14},
    # At scale 100 a logit rounds to 4e-6, and so does a softmax; where only features that differ by a tenth decide,
    # gradients are a tenth of the terms that they are sums of (1e-4 was seen). The derivative by the scale is what is
    # left of such gradients where they cancel: less than a thousandth of logits near 100 (5e-3 was seen).
    "contrastive at scale 100, relative": {"float32": 1e-5},
    "contrastive at scale 100, distant samples, relative": {"float32": 2e-5},
    "contrastive at scale 100, near samples, relative": {"float32": 4e-4},
    "contrastive at scale 100, near samples, by the scale, relative": {"float32": 1e-2},
    # A loss of small differences of logits near 90, of the weights' sum: roundings of 4e-6 average over 64 samples.
    "contrastive loss of near samples, of the weights": {"float32": 1e-6},
    # AdamW and the average after some updates, of values above 1: roundings of weights around 1. Moments are small.
    "adamw_ema by torch": {"float32": 1e-6},
    "adamw_ema weights": {"float32": 5e-7},
    "adamw_ema averages": {"float32": 5e-7},
    "adamw_ema first": {"float32": 1e-7},
    "adamw_ema second": {"float32": 1e-7},
    # One form against the other, both in float32: the weights; an update on a GPU, relative (absolute: a tenth of it);
    # a step of the engine, with the clipping factor's roundings.
    "adamw_ema from torch": {"float32": 2.5e-7},
    "adamw_ema on a GPU from torch": {"float32": 1e-6},
    "adamw_ema in a step": {"float32": 1e-6},
    # The norm's square, relative: float32's sum of squares in parts.
    "adamw_ema norm": {"float32": 3e-7},
    # The model with kernels against the model without, in float32, of a tensor's largest element: sums of some hundred
    # rows in another order, 1.2e-6 was seen. Losses and gradient norms of steps, relative.
    "model with kernels, of the largest": {"float32": 5e-6},
    "steps with kernels, relative": {"float32": 2e-6},
    # Colours, share of levels that differ, by 1 at most: a blur adds in float32, Pillow in integers, so over all radii
    # one value in 20,000 falls on the other side of .5; a device may round once where another rounds twice. Without a
    # blur no level differs, and patches have the same bits always: these are compared as equal.
    "colour, blurred, levels that differ": {"uint8": 1e-4},
}


def tolerance(of: str, dtype: torch.dtype | str) -> float:
    """Return the entry `of` of TOLERANCES for a dtype, which may be its name: "torch.float16" or "float16"."""
    return TOLERANCES[of][str(dtype).removeprefix("torch.")]
