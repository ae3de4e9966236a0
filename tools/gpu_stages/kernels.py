"""Each kind of kernel of the step alone: its errors, its time, and the rate at which it moves bytes or multiplies."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.config import ViewsConfig
from cosmos_scale.data.decode.crop_colour import colour_crops_
from cosmos_scale.data.decode.dali import stack
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from cosmos_scale.kernels import adamw_ema, contrastive, contrastive_whole, pointwise
from cosmos_scale.kernels.patches import level_values, normalised_patches
from cosmos_scale.kernels.serving import serves
from tools.gpu_stages.kernel_errors import check
from tools.gpu_stages.recorder import Recorder, failure

TOKENS, WIDTH = 39424, 768  # of the student's crops at 64 samples, ViT-B/16
PARAMETERS = 152_382_466
LOSS_WIDTH = 512
LOSSES = ((64, 64), (256, 256), (64, 1024), (32, 4096), (64, 32768))  # samples of a rank and of the global batch


def measure(recorder: Recorder) -> None:
    """Write the errors of each kernel, then a row of time for each, and for torch's operators that do the same."""
    check(recorder)
    _copy(recorder)
    _pointwise(recorder)
    _patches(recorder)
    _colour(recorder)
    _optimizer(recorder)
    for samples, columns in ((4, 4), (4, 8)) if recorder.tiny else LOSSES:
        # Logits and their slopes' product by rows: the least that must be multiplied; the kernels form logits twice.
        tflop = 2 * 2 * 16 * 4 * samples * columns * LOSS_WIDTH / 1e12
        for triton in _forms(recorder):
            row = {"kernel": "distillation loss", "triton": triton, "samples": samples, "global_batch": columns}
            try:
                spent = recorder.milliseconds(_loss(recorder, samples, columns, triton=triton), repeats=5, warm=2)
                recorder.write(**row, ms=spent, tflop_per_s=1e3 * tflop / spent)
            except torch.OutOfMemoryError as error:
                recorder.write(**row, failed=failure(error))


def _forms(recorder: Recorder) -> tuple[bool, ...]:
    """Return which forms of a kernel the device has: by Triton or not. A CPU would run torch's under both names."""
    return (True, False) if recorder.on_gpu else (False,)


def _copy(recorder: Recorder) -> None:
    """Write the rate of a copy on the device, which no kernel that moves bytes exceeds by much."""
    source = torch.empty(2**20 if recorder.tiny else 2**28, device=recorder.device)
    target = torch.empty_like(source)
    spent = recorder.milliseconds(lambda: target.copy_(source))
    recorder.write(kernel="copy, the ceiling", ms=spent, tb_per_s=2 * source.nbytes / spent / 1e9)


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
    if serves(x):
        calls |= _own_pointwise(x, wide, upstream, wide_upstream, gain)
    nbytes = tokens * width * x.element_size()
    for name, (call, times) in calls.items():
        spent = recorder.milliseconds(call)
        recorder.write(kernel=name, ms=spent, tb_per_s=times * nbytes / spent / 1e9)


def _patches(recorder: Recorder) -> None:
    """Write the time from levels to normalised patches of both kinds of crops, in both forms."""
    samples, size, sides = (2, 8, (16, 8)) if recorder.tiny else (64, 16, (224, 96))
    crops = [
        torch.randint(0, 256, (views * samples, 3, side, side), dtype=torch.uint8, device=recorder.device)
        for views, side in zip((2, 6), sides, strict=True)
    ]
    values = level_values(MEAN, STD, recorder.dtype).to(recorder.device)
    nbytes = sum(images.numel() for images in crops) * (1 + values.element_size())
    for triton in _forms(recorder):
        spent = recorder.milliseconds(partial(normalised_patches, crops, size, values, triton=triton))
        recorder.write(kernel="normalised patches", triton=triton, ms=spent, tb_per_s=nbytes / spent / 1e9)


def _colour(recorder: Recorder) -> None:
    """Write the time of the colours of a batch's global crops as DALI hands them over, in both forms."""
    views, samples, side = ViewsConfig(), *((2, 16) if recorder.tiny else (64, 224))
    plans = [plan_views(views, side, SampleKey(0, 0, sample), 400, 600) for sample in range(samples)]
    encoded = stack([b"unread"] * samples, plans).colour(slice(views.global_crops))
    shape = (views.global_crops, samples, side, side, 3)
    pixels = list(torch.randint(0, 256, shape, dtype=torch.uint8, device=recorder.device))
    result = torch.empty(*shape[:2], 3, side, side, dtype=torch.uint8, device=recorder.device)
    for triton in _forms(recorder):
        spent = recorder.milliseconds(partial(colour_crops_, result, pixels, *encoded, triton=triton))
        recorder.write(kernel="colour of DALI's global crops", triton=triton, ms=spent)


def _own_pointwise(
    x: Tensor, wide: Tensor, upstream: Tensor, wide_upstream: Tensor, gain: Tensor
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what the project's kernels do in one pass, beside torch's operators above, as `_pointwise` lists them."""
    width, heads = gain.shape[0], gain.shape[0] // 64
    update, shift, bias = upstream.clone().requires_grad_(), torch.zeros_like(gain), torch.zeros_like(gain)
    wide_bias, stacked_bias = gain.detach().repeat(4), gain.detach().repeat(3)
    for tensor in (shift, bias, wide_bias, stacked_bias):
        tensor.requires_grad_()
    total, normed = pointwise.add_norm(x, update, bias, gain, shift, 1e-5)
    active = pointwise.gelu(wide, wide_bias)
    stacked = wide_upstream[:, : 3 * width].contiguous().requires_grad_()
    parts = pointwise.split_stacked(stacked, stacked_bias, heads)
    gradients = [torch.randn_like(part, memory_format=torch.contiguous_format) for part in parts]

    def grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor]) -> object:
        return torch.autograd.grad(outputs, inputs, given, retain_graph=True)

    norm_inputs = (x, update, bias, gain, shift)
    return {
        "residual addition and layer norm": (
            lambda: pointwise.add_norm(x.detach(), upstream, None, gain.detach(), shift.detach(), 1e-5),
            4,
        ),
        "residual addition and layer norm, backward, with the bias gradient": (
            lambda: grad((total, normed), norm_inputs, (upstream, update.detach())),
            4,
        ),
        "gelu, backward, with the bias gradient": (lambda: grad((active,), (wide, wide_bias), (wide_upstream,)), 12),
        "stack of q, k, v gradients, with the bias gradient": (
            lambda: grad(parts, (stacked, stacked_bias), gradients),
            6,
        ),
    }


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
    for triton in _forms(recorder):
        name = "AdamW, average and copies" + ("" if triton else " by torch")
        spent = recorder.milliseconds(partial(update, triton=triton), repeats=5)
        recorder.write(kernel=name, ms=spent, tb_per_s=nbytes / spent / 1e9)
    for triton in _forms(recorder):
        name = "gradient norm" + ("" if triton else " by torch")
        spent = recorder.milliseconds(partial(adamw_ema.squared_norm, [gradients], triton=triton), repeats=5)
        recorder.write(kernel=name, ms=spent, tb_per_s=gradients.nbytes / spent / 1e9)


def _loss(recorder: Recorder, samples: int, columns: int, *, triton: bool) -> Callable[[], object]:
    """Return the distillation loss with its gradients, of 16 student and 4 teacher views of width 512."""
    generator = torch.Generator().manual_seed(0)

    def features(views: int, count: int) -> Tensor:
        drawn = torch.randn(views, count, LOSS_WIDTH, generator=generator).to(recorder.device)
        return functional.normalize(drawn, dim=-1).to(recorder.dtype)

    rows, gathered = features(16, samples), features(4, columns)
    scale = torch.tensor(14.3, device=recorder.device)
    weights = torch.full((16, 4), 1 / 64, device=recorder.device, dtype=torch.float64)

    def loss() -> None:
        if samples == columns:
            contrastive_whole.whole_batch(rows, gathered, scale, weights, column_gradients=False, triton=triton)
            return
        partials = contrastive.forward_partials(rows, gathered, scale, first_row=0, triton=triton)
        contrastive.backward(
            *(rows, gathered, scale, weights, partials.row_lse, partials.column_lse),
            first_row=0,
            column_gradients=False,
            triton=triton,
        )

    return loss
