"""Each kind of kernel of the step alone: its time, and the rate at which it moves bytes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.kernels import adamw_ema, contrastive
from tools.gpu_stages.recorder import Recorder, failure

TOKENS, WIDTH = 39424, 768  # of the student's crops at 64 samples, ViT-B/16
PARAMETERS = 152_382_466
LOSSES = ((64, 64), (256, 256), (64, 1024), (32, 4096), (64, 32768))  # samples of a rank and of the global batch


def measure(recorder: Recorder) -> None:
    """Write a row for each kernel."""
    _pointwise(recorder)
    _optimizer(recorder)
    for samples, columns in ((4, 4), (4, 8)) if recorder.tiny else LOSSES:
        try:
            spent = recorder.milliseconds(_loss(recorder, samples, columns))
            recorder.write(kernel="distillation loss", samples=samples, global_batch=columns, ms=spent)
        except torch.OutOfMemoryError as error:
            recorder.write(kernel="distillation loss", samples=samples, global_batch=columns, failed=failure(error))


def _pointwise(recorder: Recorder) -> None:
    tokens, width = (128, 64) if recorder.tiny else (TOKENS, WIDTH)

    def random(columns: int) -> Tensor:
        return torch.randn(tokens, columns, device=recorder.device, dtype=recorder.dtype)

    x, wide = random(width).requires_grad_(), random(4 * width).requires_grad_()
    upstream, wide_upstream = random(width), random(4 * width)
    gain = torch.ones(width, device=recorder.device, dtype=recorder.dtype, requires_grad=True)
    shift = torch.zeros_like(gain, requires_grad=True)
    normed, active = functional.layer_norm(x, (width,), gain, shift), functional.gelu(wide)
    # How many times a [tokens, width] tensor is read or written.
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "layer norm": (lambda: functional.layer_norm(x.detach(), (width,), gain, shift), 2),
        "layer norm, backward": (
            lambda: torch.autograd.grad(normed, (x, gain, shift), upstream, retain_graph=True),
            3,
        ),
        "gelu": (lambda: functional.gelu(wide.detach()), 8),
        "gelu, backward": (lambda: torch.autograd.grad(active, wide, wide_upstream, retain_graph=True), 12),
        "bias gradient of the wide layer": (lambda: wide_upstream.sum(0), 4),
        "residual addition": (lambda: x.detach() + upstream, 3),
    }
    nbytes = tokens * width * x.element_size()
    for name, (call, times) in calls.items():
        spent = recorder.milliseconds(call)
        recorder.write(kernel=name, ms=spent, tb_per_s=times * nbytes / spent / 1e9)


def _optimizer(recorder: Recorder) -> None:
    """Time the update of one flat shard in both forms, and the gradient's norm."""
    elements = 10_000 if recorder.tiny else PARAMETERS
    weights, first, second, average = (torch.rand(elements, device=recorder.device) for _ in range(4))
    gradients, *copies = (torch.rand(elements, device=recorder.device, dtype=recorder.dtype) for _ in range(3))
    steps, skip = (torch.zeros((), device=recorder.device) for _ in range(2))

    def update(*, triton: bool) -> None:
        adamw_ema.adamw_ema_(
            *([weights], [gradients], [first], [second], [average], [steps]),
            weight_copies=[copies[0]],
            average_copies=[copies[1]],
            lr=1e-4,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.5,
            momentum=0.99,
            average_first=True,
            skip=skip,
            triton=triton,
        )

    # Weights, moments and average are read and written, the gradient is read, both copies are written.
    nbytes = (32 + 3 * gradients.element_size()) * elements
    for name, triton in (("AdamW, average and copies", True), ("AdamW, average and copies by torch", False)):
        spent = recorder.milliseconds(partial(update, triton=triton), repeats=5)
        recorder.write(kernel=name, ms=spent, tb_per_s=nbytes / spent / 1e9)
    for name, triton in (("gradient norm", True), ("gradient norm by torch", False)):
        spent = recorder.milliseconds(partial(adamw_ema.squared_norm, [gradients], triton=triton), repeats=5)
        recorder.write(kernel=name, ms=spent, tb_per_s=gradients.nbytes / spent / 1e9)


def _loss(recorder: Recorder, samples: int, columns: int) -> Callable[[], object]:
    """Return the distillation loss with its gradients, of 16 student and 4 teacher views of width 512."""
    generator = torch.Generator().manual_seed(0)

    def features(views: int, count: int) -> Tensor:
        drawn = torch.randn(views, count, 512, generator=generator).to(recorder.device)
        return functional.normalize(drawn, dim=-1).to(recorder.dtype)

    rows, gathered = features(16, samples), features(4, columns)
    scale = torch.tensor(14.3, device=recorder.device)
    weights = torch.full((16, 4), 1 / 64, device=recorder.device, dtype=torch.float64)

    def loss() -> None:
        if samples == columns:
            contrastive.whole_batch(rows, gathered, scale, weights, column_gradients=False)
            return
        partials = contrastive.forward_partials(rows, gathered, scale, first_row=0)
        by_column = contrastive.column_lse(partials.column_max, partials.column_sum)
        contrastive.backward(
            *(rows, gathered, scale, weights, partials.row_lse, by_column), first_row=0, column_gradients=False
        )

    return loss
