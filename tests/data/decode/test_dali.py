"""The DALI decoder against the CPU decoder and Pillow executing the same plans."""

import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_scale.config import BlurConfig, DaliConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.blocks import TensorBlock
from cosmos_scale.data.decode.dali import DaliDecoder, Encoded, define_pipeline, picture_for_dali, stack
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import ViewPlan, plan_views
from cosmos_scale.errors import UserError
from tests.data.decode.test_torch_cpu import PLAIN, encoded, levels, mean_difference, photo, reference_view

# Mean |difference| in grey levels. Pillow and torch round between the two passes of a resize, DALI does not: 0.17 to
# 0.25 measured. In a picture that is enlarged several times the border counts, which DALI continues in another way.
CROP_LEVELS = 0.3
TINY_LEVELS = 1.5
# Colour is Pillow's to the bit, but contrast and hue amplify the crops' difference (0.42 measured).
COLOUR_LEVELS = 0.6
# The CPU decoder has rounding of its own in colour.
JITTER_LEVELS = 1.6
# A GPU's decoder computes the cosine transform in another precision: most values agree, some are one off.
GPU_LEVELS = 0.6

CPU = torch.device("cpu")
OPTIONS = DaliConfig(threads=1)
MAX_PIXELS = 1_000_000
ONE_VIEW = PLAIN.model_copy(update={"global_crops": 1, "local_crops": 0})
JPEG = encoded(photo(96, 130), quality=90)


def planned(pictures: Sequence[bytes], views: ViewsConfig, image_size: int, first: int = 0) -> list[ViewPlan]:
    plans = []
    for sample, picture in enumerate(pictures, first):
        height, width = decode_rgbx(picture, MAX_PIXELS).shape[:2]
        plans.append(plan_views(views, image_size, SampleKey(1, 0, sample), height, width))
    return plans


def batch_of(pictures: Sequence[bytes], plans: Sequence[ViewPlan]) -> Encoded:
    return stack([picture_for_dali(picture, MAX_PIXELS)[0] for picture in pictures], plans)


def decoder(
    views: ViewsConfig, image_size: int, batch: int, options: DaliConfig = OPTIONS, device: torch.device = CPU
) -> DaliDecoder:
    return DaliDecoder(views, image_size, batch, device, options)


def decode_with(
    views: ViewsConfig, image_size: int, batch: int, options: DaliConfig = OPTIONS, device: torch.device = CPU
) -> Callable[[Encoded], Views]:
    """A decoder of one batch at a time."""
    made = decoder(views, image_size, batch, options, device)

    def decode(encoded: Encoded) -> Views:
        (crops, _), *_ = made.stream(iter([(encoded, None)]))
        return crops

    return decode


def views_of(crops: Views, sample: int) -> list[torch.Tensor]:
    return [*crops.global_crops[:, sample], *crops.local_crops[:, sample]]


def by_cpu(picture: bytes, plan: ViewPlan, views: ViewsConfig, image_size: int) -> list[torch.Tensor]:
    crops = Views.empty(views, image_size)
    execute(decode_rgbx(picture, MAX_PIXELS), plan, *crops)
    return [*crops.global_crops, *crops.local_crops]


def assert_same(first: Views, second: Views) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


ONE_OPERATION: dict[str, dict[str, Any]] = {
    "crop": {},
    "flip": {"flip": 1.0},
    "brightness": {"jitter": JitterConfig(probability=1, contrast=0, saturation=0, hue=0)},
    "contrast": {"jitter": JitterConfig(probability=1, brightness=0, saturation=0, hue=0)},
    "saturation": {"jitter": JitterConfig(probability=1, brightness=0, contrast=0, hue=0)},
    "hue": {"jitter": JitterConfig(probability=1, brightness=0, contrast=0, saturation=0)},
    "jitter": {"jitter": JitterConfig(probability=1)},
    "grey": {"grey": 1.0},
    "blur": {"blur": BlurConfig(first_global=1, other_globals=1, local=1)},
    "solarise": {"solarise": 1.0},
}


@pytest.mark.parametrize("operation", ONE_OPERATION)
def test_each_operation_equals_the_other_decoders(operation: str) -> None:
    views = PLAIN.model_copy(update={"flip": 0.0} | ONE_OPERATION[operation])
    pictures = [encoded(photo(240, 331, seed=seed), quality=92) for seed in range(4)]
    plans = planned(pictures, views, 96)
    crops = decode_with(views, 96, 4)(batch_of(pictures, plans))
    for sample, (picture, plan) in enumerate(zip(pictures, plans, strict=True)):
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        cpu = by_cpu(picture, plan, views, 96)
        for view, crop in enumerate(views_of(crops, sample)):
            limit = CROP_LEVELS if operation in ("crop", "flip", "grey", "blur", "solarise") else COLOUR_LEVELS
            assert mean_difference(levels(crop), reference_view(image, plan, view)) <= limit, (sample, view)
            assert mean_difference(levels(crop), levels(cpu[view])) <= JITTER_LEVELS, (sample, view)


@pytest.mark.parametrize("size", [(200, 320), (501, 375), (333, 251), (64, 48)])
def test_whole_plans_equal_the_other_decoders(size: tuple[int, int]) -> None:
    views = ViewsConfig()
    pictures = [encoded(photo(*size, seed=seed), quality=92) for seed in range(6)]
    plans = planned(pictures, views, 224)
    crops = decode_with(views, 224, 6)(batch_of(pictures, plans))
    assert crops.global_crops.shape == (2, 6, 3, 224, 224)
    assert crops.local_crops.shape == (6, 6, 3, 96, 96)
    assert crops.global_crops.dtype == crops.local_crops.dtype == torch.uint8
    for sample, (picture, plan) in enumerate(zip(pictures, plans, strict=True)):
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        cpu = by_cpu(picture, plan, views, 224)
        for view, crop in enumerate(views_of(crops, sample)):
            assert mean_difference(levels(crop), reference_view(image, plan, view)) <= COLOUR_LEVELS, (sample, view)
            assert mean_difference(levels(crop), levels(cpu[view])) <= JITTER_LEVELS, (sample, view)


def test_tiny_and_long_pictures() -> None:
    sizes = [(1, 1), (1, 40), (33, 2), (17, 23), (400, 12)]
    pictures = [encoded(photo(400, 400, seed=n).resize((w, h)), "PNG") for n, (h, w) in enumerate(sizes)]
    plans = planned(pictures, PLAIN, 32)
    crops = decode_with(PLAIN, 32, len(sizes))(batch_of(pictures, plans))
    for sample, (picture, plan) in enumerate(zip(pictures, plans, strict=True)):
        image = Image.open(io.BytesIO(picture))
        for view, crop in enumerate(views_of(crops, sample)):
            assert mean_difference(levels(crop), reference_view(image, plan, view)) <= TINY_LEVELS, (sample, view)
    # One pixel becomes a plane of one colour.
    plane = np.broadcast_to(np.asarray(Image.open(io.BytesIO(pictures[0]))), (32, 32, 3))
    np.testing.assert_array_equal(levels(crops.global_crops[0, 0]), plane)


def mixed_batch(first: int, count: int) -> Encoded:
    """Pictures of many sizes and some formats, with whole plans."""
    pictures = []
    for sample in range(first, first + count):
        image = photo(60 + 7 * (sample % 11), 50 + 13 * (sample % 7), seed=sample)
        pictures.append(encoded(image, "PNG" if sample % 3 == 0 else "JPEG"))
    return batch_of(pictures, planned(pictures, SMALL, 48, first))


SMALL = ViewsConfig(local_crops=2, local_size=32)


def test_a_sample_does_not_see_its_batch() -> None:
    """The same bits alone, at another place, in a smaller batch, and by another decoder with more threads."""
    together = mixed_batch(0, 7)
    decode = decode_with(SMALL, 48, 7)
    crops = decode(together)
    assert_same(decode(together), crops)
    assert_same(decode_with(SMALL, 48, 9, DaliConfig(threads=3))(together), crops)
    for sample in range(7):
        alone = decode(mixed_batch(sample, 1))
        assert_same(alone, Views(crops.global_crops[:, sample : sample + 1], crops.local_crops[:, sample : sample + 1]))
    shifted = decode(mixed_batch(3, 4))
    assert_same(shifted, Views(crops.global_crops[:, 3:], crops.local_crops[:, 3:]))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_in_the_middle(prefetch: int) -> None:
    """Five batches in a row, stopped after two and taken up by a new decoder, or by the same one."""
    options = DaliConfig(threads=1, prefetch=prefetch)
    batches = [(mixed_batch(4 * step, 4), step) for step in range(5)]
    whole = list(decoder(SMALL, 48, 4, options).stream(iter(batches)))
    assert [step for _, step in whole] == list(range(5))
    alone = decode_with(SMALL, 48, 4)
    for (crops, _), (batch, _) in zip(whole, batches, strict=True):
        assert_same(crops, alone(batch))

    stopped = decoder(SMALL, 48, 4, options)
    begun = stopped.stream(iter(batches))
    head = [next(begun)[0], next(begun)[0]]
    begun.close()
    for again in (decoder(SMALL, 48, 4, options), stopped):
        tail = [crops for crops, _ in again.stream(iter(batches[2:]))]
        for (crops, _), other in zip(whole, head + tail, strict=True):
            assert_same(crops, other)


def test_a_stream_asks_for_no_more_than_it_may() -> None:
    asked = []

    def batches() -> Iterator[tuple[Encoded, int]]:
        for step in range(6):
            asked.append(step)
            yield mixed_batch(step, 1), step

    stream = decoder(SMALL, 48, 1, DaliConfig(threads=1, prefetch=2)).stream(batches())
    assert next(stream)[1] == 0
    assert asked == [0, 1, 2]
    assert next(stream)[1] == 1
    assert asked == [0, 1, 2, 3]
    stream.close()


def test_views_stay_when_the_next_come() -> None:
    decode = decode_with(SMALL, 48, 2)
    first = decode(mixed_batch(0, 2))
    kept = [crops.clone() for crops in first]
    decode(mixed_batch(2, 2))
    assert_same(first, Views(*kept))


def test_a_batch_travels_in_one_block() -> None:
    batch = mixed_batch(0, 3)
    decode = decode_with(SMALL, 48, 3)
    assert_same(decode(Encoded(*TensorBlock.of(batch, shared=True).tensors())), decode(batch))


def test_an_error_of_dali_is_one_line() -> None:
    """As when a GPU has no memory left. Batches that wait behind the error are given up; nothing hangs."""
    broken = stack([JPEG, b"\xff\xd8\xff\xe0 no JPEG"], planned([JPEG] * 2, SMALL, 48))
    stream = decoder(SMALL, 48, 2).stream((batch, 0) for batch in (mixed_batch(0, 2), broken, mixed_batch(2, 2)))
    next(stream)
    with pytest.raises(UserError, match=r"^data.decoder: dali failed on a batch: .*#3.*$") as failure:
        next(stream)
    assert "\n" not in str(failure.value)


def test_a_stack_holds_bytes_and_plans() -> None:
    pictures = [b"abc", b"", b"defgh"]
    plans = planned([JPEG] * 3, SMALL, 48)
    batch = stack(pictures, plans)
    starts = batch.offsets.tolist()
    assert [bytes(batch.image_bytes.numpy()[a:b]) for a, b in pairwise(starts)] == pictures
    for sample, plan in enumerate(plans):
        for name in Encoded._fields[2:]:
            np.testing.assert_array_equal(getattr(batch, name)[:, sample], getattr(plan, name))


def test_no_local_crops() -> None:
    views = ViewsConfig(global_crops=3, local_crops=0)
    plans = planned([JPEG], views, 40)
    crops = decode_with(views, 40, 1)(batch_of([JPEG], plans))
    assert crops.global_crops.shape == (3, 1, 3, 40, 40)
    assert crops.local_crops.shape == (0, 1, 3, 96, 96)


def operators(device: str, options: DaliConfig) -> list[tuple[str, str]]:
    """The operators of a pipeline and their devices, as DALI writes them down, without a GPU to run them on."""
    serialised = define_pipeline(SMALL, 48, 8, device, None, options).serialize()
    field = rb"\x12\x06string\*.(\w+)@"
    found = re.findall(rb"\x06device" + field + rb".*?_display_name" + field, serialised, flags=re.DOTALL)
    return [(name.decode(), placed.decode()) for placed, name in found]


def test_the_gpu_runs_the_same_pipeline() -> None:
    """One definition: only the devices of decoding, cutting and resizing differ. DALI checks every argument here."""
    options = DaliConfig(hw_decoder_load=0.4, preallocate_width=640, preallocate_height=480)
    on_cpu, on_gpu = operators("cpu", options), operators("cuda", options)
    moved = {"image": "mixed", "slice": "gpu", "resize": "gpu"}
    assert {name: [other for other, _ in on_cpu].count(name) for name in moved} == {"image": 1, "slice": 4, "resize": 4}
    assert {device for _, device in on_cpu} == {"cpu"}
    assert on_gpu == [(name, moved.get(name, "cpu")) for name, _ in on_cpu]
    serialised = define_pipeline(SMALL, 48, 8, "cuda", None, options).serialize()
    for argument, value in (
        ("hw_decoder_load", struct.pack("<f", 0.4)),
        ("preallocate_width_hint", b"\x80\x05"),  # 640 and 480 as protobuf writes integers
        ("preallocate_height_hint", b"\xe0\x03"),
    ):
        assert value in serialised[serialised.index(argument.encode()) :][:60]


@pytest.mark.gpu
def test_the_gpu_makes_the_same_views() -> None:
    device = torch.device("cuda")
    views = ViewsConfig()
    pictures = [encoded(photo(200 + 31 * n, 320 - 17 * n, seed=n), "PNG" if n % 3 == 0 else "JPEG") for n in range(8)]
    batch = batch_of(pictures, planned(pictures, views, 224))
    ours = decode_with(views, 224, 8, device=device)(batch)
    assert ours.global_crops.device.type == ours.local_crops.device.type == "cuda"
    for on_gpu, on_cpu in zip(ours, decode_with(views, 224, 8)(batch), strict=True):
        for one, other in zip(on_gpu.cpu().flatten(0, 1), on_cpu.flatten(0, 1), strict=True):
            assert mean_difference(levels(one), levels(other)) <= GPU_LEVELS
    assert_same(decode_with(views, 224, 8, device=device)(batch), ours)
