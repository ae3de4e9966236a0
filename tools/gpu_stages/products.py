"""The matrix products of the step alone: operations a second in bf16 and in FP8, forward and both gradients."""

import torch
from torch.nn import functional

from tools.gpu_stages.recorder import Recorder, failure

# Tokens and width: ViT-B/16 at 64 samples (student, teacher), the text tower, padded or not, and 256 samples.
SHAPES = {
    "image, student": (39424, 768),
    "image, teacher": (25216, 768),
    "text": (16897, 512),
    "text, padded to 256": (17152, 512),
    "image, 256 samples": (157696, 768),
}


def measure(recorder: Recorder) -> None:
    """Write a row for each layer's shape."""
    shapes = {"tiny": (64, 32)} if recorder.tiny else SHAPES
    for name, (tokens, width) in shapes.items():
        for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            recorder.write(
                case=name,
                tokens=tokens,
                inputs=inputs,
                outputs=outputs,
                tflop_per_s=(rates := _rates(recorder, tokens, inputs, outputs)),
                of_peak=_shares(rates, recorder.peak()),
            )


def _shares(rates: dict[str, float | str], peak: float | None) -> dict[str, float] | None:
    """Return each rate as a share of the peak in bf16; FP8 may reach twice the peak."""
    if peak is None:
        return None
    return {name: 1e12 * rate / peak for name, rate in rates.items() if not isinstance(rate, str)}


def _rates(recorder: Recorder, tokens: int, inputs: int, outputs: int) -> dict[str, float | str]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=recorder.device, dtype=recorder.dtype)

    x, weight, gradient, bias = (
        random(tokens, inputs),
        random(outputs, inputs),
        random(tokens, outputs),
        random(outputs),
    )
    gflop = 2 * tokens * inputs * outputs / 1e9  # 1e9 operations in a millisecond are 1e12 in a second
    rates: dict[str, float | str] = {
        "forward": gflop / recorder.milliseconds(lambda: functional.linear(x, weight, bias)),
        "input gradient": gflop / recorder.milliseconds(lambda: gradient @ weight),
        "weight gradient": gflop / recorder.milliseconds(lambda: gradient.t() @ x),
    }
    if recorder.on_gpu:
        try:
            small, small_weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
            unit = torch.ones((), device=recorder.device)
            spent = recorder.milliseconds(
                lambda: torch._scaled_mm(small, small_weight, unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)
            )
            rates["forward, FP8"] = gflop / spent
        except Exception as error:
            rates["forward, FP8"] = failure(error)
    return rates
