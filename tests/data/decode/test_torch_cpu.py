"""The CPU decoder against Pillow and torchvision executing the same plan, and what it refuses."""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.config import BlurConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.picture import Pixels, decode_rgbx
from cosmos_scale.data.decode.torch_cpu import evaluation_image, execute, execute_view
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey
from cosmos_scale.data.samples.view_plan import NO_JITTER, ViewPlan, plan_views

MAX_PIXELS = 10_000_000
# Mean |difference| in grey levels. torch and Pillow round the bicubic's two passes differently (0.02 to 0.05 measured).
CROP_LEVELS = 0.3
# Colour truncates, rounds and quantises hues otherwise than Pillow, by 0.1 to 0.5 each; contrast amplifies that.
JITTER_LEVELS = 1.6

PLAIN = ViewsConfig(
    jitter=JitterConfig(probability=0), grey=0, solarise=0, blur=BlurConfig(first_global=0, other_globals=0, local=0)
)
KEYS = [SampleKey(1, 0, sample) for sample in range(12)]


def photo(height: int = 200, width: int = 320, seed: int = 0) -> Image.Image:
    """A coloured picture with a photo's 1/f spectrum, a few hard edges and some sensor noise."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / max(height, width)
    spectrum = np.fft.rfft2(generator.normal(size=(3, height, width))) / frequency
    channels = np.fft.irfft2(spectrum, s=(height, width))
    channels = channels[0] + 0.6 * channels  # mostly shared brightness, some colour
    levels = 128 + 60 * channels / channels.std()
    for _ in range(6):
        top, left = generator.integers(0, height), generator.integers(0, width)
        levels[:, top : top + height // 4, left : left + width // 4] = generator.integers(0, 256, (3, 1, 1))
    levels += generator.normal(scale=2, size=levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


JPEG = encoded(photo(), quality=90)


def reference_view(image: Image.Image, plan: ViewPlan, view: int) -> Image.Image:
    """The plan as torchvision and Pillow execute it on PIL images."""
    top, left, height, width = plan.boxes[view].tolist()
    side = int(plan.sides[view])
    image = TF.resized_crop(image, top, left, height, width, [side, side], InterpolationMode.BICUBIC)
    if plan.flip[view]:
        image = TF.hflip(image)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for operation in plan.jitter_order[view]:
        factor = float(plan.jitter_factors[view, operation])
        if factor != NO_JITTER[operation]:
            image = operations[operation](image, factor)
    if plan.grey[view]:
        image = TF.to_grayscale(image, 3)
    if plan.blur_radius[view]:
        image = image.filter(ImageFilter.GaussianBlur(float(plan.blur_radius[view])))
    if plan.solarise[view] < 256:
        image = ImageOps.solarize(image, int(plan.solarise[view]))
    return image


def levels(view: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[3, H, W], levels or normalised, to [H, W, 3] in 0..255, float64."""
    values = view.double().permute(1, 2, 0)
    if view.is_floating_point():
        values = (values * torch.tensor(STD).double() + torch.tensor(MEAN).double()) * 255
    result: np.ndarray[Any, np.dtype[np.float64]] = values.numpy()
    return result


def make_views(image_bytes: bytes, views: ViewsConfig, image_size: int, key: SampleKey) -> Views:
    picture = decode_rgbx(image_bytes, MAX_PIXELS)
    result = Views.empty(views, image_size)
    execute(picture, plan_views(views, image_size, key, *picture.shape[:2]), *result)
    return result


def mean_difference(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)).mean())


@pytest.mark.parametrize("size", [(200, 320), (500, 375), (64, 48)])
@pytest.mark.parametrize(("views", "limit"), [(PLAIN, CROP_LEVELS), (ViewsConfig(), JITTER_LEVELS)])
def test_views_equal_torchvisions(views: ViewsConfig, limit: float, size: tuple[int, int]) -> None:
    jpeg = encoded(photo(*size), quality=92)
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    for key in KEYS:
        plan = plan_views(views, 224, key, *size)
        crops = make_views(jpeg, views, 224, key)
        assert crops.global_crops.shape == (2, 3, 224, 224)
        assert crops.local_crops.shape == (6, 3, 96, 96)
        for view, crop in enumerate([*crops.global_crops, *crops.local_crops]):
            assert mean_difference(levels(crop), reference_view(image, plan, view)) <= limit, (key, view)


def test_every_order_of_operations() -> None:
    """Without any resize, colour and blur in every order come close to Pillow's."""
    image = photo(96, 96)
    picture: Pixels = np.array(image.convert("RGBX"))
    views = ViewsConfig(global_crops=2, local_crops=2, local_size=96, solarise=1.0)
    seen = set()
    differences = []
    for sample in range(60):
        plan = plan_views(views, 96, SampleKey(0, 0, sample), 96, 96)
        plan.boxes[:] = (0, 0, 96, 96)
        for view in range(4):
            seen.add(tuple(plan.jitter_order[view]))
            differences.append(
                mean_difference(execute_view(picture, plan, view), reference_view(image, plan, view)),
            )
    assert len(seen) == 24
    assert max(differences) <= JITTER_LEVELS
    assert np.mean(differences) <= JITTER_LEVELS / 2


def one_operation(**changes: Any) -> tuple[Image.Image, Pixels, ViewPlan]:
    """A picture, its array, and a plan that changes nothing in the first view but `changes`."""
    image = photo(64, 64, seed=3)
    plan = plan_views(PLAIN, 64, SampleKey(0, 0, 0), 64, 64)
    plan.boxes[0] = (0, 0, 64, 64)
    plan.flip[0] = False
    for name, value in changes.items():
        getattr(plan, name)[0] = value
    return image, np.array(image.convert("RGBX")), plan


FACTORS = (0.0, 0.3, 0.6, 0.999, 1.0, 1.001, 1.4, 2.0)
TURNS = (-0.5, -0.1, -0.003, 0.0, 0.003, 0.1, 0.5)
# Brightness is exact, apart from one level at whole numbers. Contrast is exact, apart from the rounding of its mean
# grey, which moves a picture by up to |1 - factor|. Saturation does not round the grey that it mixes in: half a level.
FACTOR_LEVELS = (0.02, 0.02, 0.55)
# Hue and saturation are rounded where Pillow truncates them, and there are 256 hues for its 255.
HUE_LEVELS = 0.8


@pytest.mark.parametrize(
    ("operation", "factor"), [(o, f) for o in range(3) for f in FACTORS] + [(3, turn) for turn in TURNS]
)
def test_each_jitter_operation(operation: int, factor: float) -> None:
    neutral = (1, 1, 1, 0)
    image, picture, plan = one_operation(
        jitter_factors=[factor if place == operation else neutral[place] for place in range(4)]
    )
    apply = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[operation]
    ours = execute_view(picture, plan, 0)
    if factor == neutral[operation]:
        # Skipped, as in torchvision: it leaves out a switched-off operation too, hue's way through 8-bit HSV included.
        np.testing.assert_array_equal(ours, np.asarray(image))
    else:
        assert mean_difference(ours, apply(image, factor)) <= (*FACTOR_LEVELS, HUE_LEVELS)[operation]


@pytest.mark.parametrize("radius", [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.41, 1.42, 1.7, 2.0])
def test_blur_is_pillows(radius: float) -> None:
    image, picture, plan = one_operation(blur_radius=radius)
    difference = np.asarray(execute_view(picture, plan, 0), dtype=np.float64) - np.asarray(
        image.filter(ImageFilter.GaussianBlur(radius))
    )
    # Pillow rounds six times; here pixels are rounded once, and the kernel to 1/256. Without a blur: 2 to 15.
    assert np.abs(difference).mean() <= 0.8
    # Neither brighter nor darker. Pillow's own roundings do not cancel; the kernel's do, to 1/256.
    assert abs(difference.mean()) <= 0.55


def test_the_blur_of_a_step_is_pillows_kernel() -> None:
    """An edge from 0 to 255 shows the whole kernel; borders continue the outermost pixels."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    _, _, plan = one_operation(blur_radius=1.9)
    picture = np.concatenate([pixels, pixels[..., :1]], axis=2)
    expected = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.9)), dtype=np.int64)
    difference = execute_view(picture, plan, 0).astype(np.int64) - expected
    assert np.abs(difference).max() <= 3, "six roundings, and up to 7 taps rounded to 1/256"


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarise_and_grey(threshold: int) -> None:
    image, picture, plan = one_operation(solarise=threshold)
    np.testing.assert_array_equal(execute_view(picture, plan, 0), ImageOps.solarize(image, threshold))
    image, picture, plan = one_operation(grey=True)
    # The same weights in 15 bits and in 16.
    assert mean_difference(execute_view(picture, plan, 0), TF.to_grayscale(image, 3)) <= 0.01


def test_same_key_same_bits() -> None:
    first = make_views(JPEG, ViewsConfig(), 224, KEYS[0])
    again = make_views(JPEG, ViewsConfig(), 224, KEYS[0])
    other = make_views(JPEG, ViewsConfig(), 224, KEYS[1])
    for one, same, different in zip(first, again, other, strict=True):
        assert one.dtype == torch.uint8
        assert one.is_contiguous()
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


def test_views_are_written_into_slices_of_a_batch() -> None:
    """A picture gets the same bits in any batch, and nothing is written beside its own place."""
    views = ViewsConfig(local_crops=3)
    expected = make_views(JPEG, views, 64, KEYS[1])
    picture = decode_rgbx(JPEG, MAX_PIXELS)
    batch = [torch.full((*sizes, 3, side, side), 7, dtype=torch.uint8) for sizes, side in (((2, 4), 64), ((3, 4), 96))]
    execute(picture, plan_views(views, 64, KEYS[1], *picture.shape[:2]), *(crops[:, 2] for crops in batch))
    for crops, alone in zip(batch, expected, strict=True):
        assert torch.equal(crops[:, 2], alone)
        assert (crops[:, [0, 1, 3]] == 7).all()


def test_threads_change_nothing() -> None:
    expected = make_views(JPEG, ViewsConfig(), 224, KEYS[0])
    threads, opencv_threads = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(3)
        cv2.setNumThreads(3)
        made = make_views(JPEG, ViewsConfig(), 224, KEYS[0])
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(opencv_threads)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


def test_tensors_that_cannot_be_written_in_place_are_refused() -> None:
    picture = decode_rgbx(JPEG, MAX_PIXELS)
    views = ViewsConfig(local_crops=0)
    plan = plan_views(views, 32, KEYS[0], *picture.shape[:2])
    fitting = torch.empty(2, 3, 32, 32, dtype=torch.uint8)
    for wrong in (fitting.float(), fitting.to(memory_format=torch.channels_last), fitting.new_empty(2, 3, 32, 33)):
        with pytest.raises(ValueError, match="cannot take a view"):
            execute(picture, plan, wrong, fitting.new_empty(0, 3, 96, 96))


def test_other_sizes_and_counts() -> None:
    views = ViewsConfig(global_crops=3, local_crops=0, local_size=32)
    crops = make_views(JPEG, views, 64, KEYS[0])
    assert crops.global_crops.shape == (3, 3, 64, 64)
    assert crops.local_crops.shape == (0, 3, 32, 32)
    one_pixel = make_views(encoded(Image.new("RGB", (1, 1), "#ff8000"), "PNG"), PLAIN, 8, KEYS[0])
    np.testing.assert_array_equal(levels(one_pixel.local_crops[0]), np.broadcast_to([255, 128, 0], (96, 96, 3)))


@pytest.mark.parametrize("size", [(200, 320), (333, 224), (224, 224), (100, 57), (1000, 30)])
def test_evaluation_image_equals_torchvisions(size: tuple[int, int]) -> None:
    jpeg = encoded(photo(*size), quality=92)
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    expected = CenterCrop(224)(Resize(224, InterpolationMode.BICUBIC)(image))
    ours = evaluation_image(jpeg, 224, MAX_PIXELS)
    assert ours.shape == (3, 224, 224)
    assert np.array_equal(levels(ours).round(), np.asarray(expected))


ODD_PICTURES: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: encoded(photo(1, 1), "PNG"),
    "tiny": lambda: encoded(photo(5, 7), "PNG"),
    "one row": lambda: encoded(photo(1, 400), "PNG"),
    "very wide": lambda: encoded(photo(24, 1500)),
    "very tall": lambda: encoded(photo(1500, 24)),
    "large": lambda: encoded(photo(1200, 1600)),
    "grey": lambda: encoded(photo().convert("L")),
    "cmyk": lambda: encoded(photo().convert("CMYK")),
    "palette": lambda: encoded(photo().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "transparent": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "black": lambda: encoded(Image.new("RGB", (90, 60)), "PNG"),
    # One step of hue in every pixel at once is up to 1.7 levels in a fully saturated colour.
    "one colour": lambda: encoded(Image.new("RGB", (90, 60), "#c06040"), "PNG"),
    "moving webp": lambda: encoded(photo(), "WEBP", save_all=True, append_images=[photo(seed=1)], lossless=True),
    "moving png": lambda: encoded(photo(), "PNG", save_all=True, append_images=[photo(seed=1)]),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
@pytest.mark.parametrize(("views", "limit"), [(PLAIN, CROP_LEVELS), (ViewsConfig(), JITTER_LEVELS)])
def test_views_of_odd_pictures_equal_torchvisions(views: ViewsConfig, limit: float, name: str) -> None:
    data = ODD_PICTURES[name]()
    image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")  # the first frame of moving pictures
    picture = decode_rgbx(data, MAX_PIXELS)
    for key in KEYS[:4]:
        plan = plan_views(views, 224, key, image.height, image.width)
        for view in range(8):
            expected = reference_view(image, plan, view)
            assert mean_difference(execute_view(picture, plan, view), expected) <= limit, (key, view)


FORMATS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: JPEG,
    "progressive": lambda: encoded(photo(), progressive=True),
    "jpeg 4:4:4": lambda: encoded(photo(), subsampling=0),
    "jpeg 4:2:2": lambda: encoded(photo(), subsampling=1),
    "grey jpeg": lambda: encoded(photo().convert("L")),
    "cmyk jpeg": lambda: encoded(photo().convert("CMYK")),
    "png": lambda: encoded(photo(), "PNG"),
    "palette png": lambda: encoded(photo().convert("P"), "PNG", transparency=0),
    "grey png": lambda: encoded(photo().convert("L"), "PNG"),
    "one-bit png": lambda: encoded(photo().convert("1"), "PNG"),
    "transparent png": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "grey transparent png": lambda: encoded(photo().convert("LA"), "PNG"),
    "webp": lambda: encoded(photo(), "WEBP"),
    "lossless webp": lambda: encoded(photo(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_as_pillow_does(name: str) -> None:
    data = FORMATS[name]()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB"))
    np.testing.assert_array_equal(decode_rgbx(data, MAX_PIXELS)[..., :3], expected)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode_rgbx(encoded(Image.fromarray(values), "PNG"), MAX_PIXELS)
    np.testing.assert_array_equal(pixels[..., :3], np.stack([values >> 8] * 3, axis=-1))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    np.testing.assert_array_equal(
        decode_rgbx(encoded(photo(), quality=90, exif=exif), MAX_PIXELS), decode_rgbx(JPEG, MAX_PIXELS)
    )


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_picture_is_damaged(name: str, share: float) -> None:
    data = FORMATS[name]()
    with pytest.raises(DamagedSample, match="the picture"):
        make_views(data[: int(len(data) * share)], PLAIN, 32, KEYS[0])


@pytest.mark.parametrize("name", ["jpeg", "progressive", "grey jpeg", "cmyk jpeg"])
def test_a_jpeg_cut_short_and_closed_is_damaged(name: str) -> None:
    """Pillow decodes such pictures without an error, grey from the cut on."""
    data = FORMATS[name]()
    closed = data[: len(data) * 2 // 3] + b"\xff\xd9"
    Image.open(io.BytesIO(closed)).load()
    with pytest.raises(DamagedSample, match="does not decode"):
        decode_rgbx(closed, MAX_PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_every_flipped_bit_of_a_png_is_found(mode: str) -> None:
    """Pillow by itself accepts some such pictures with alpha, and leaves most of the picture black."""
    data = encoded(photo(40, 64).convert(mode), "PNG")
    end_marker = 12  # bytes without pixels, behind everything that is read
    for position in range(8, len(data) - end_marker, 23):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        with pytest.raises(DamagedSample):
            decode_rgbx(bytes(broken), MAX_PIXELS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is no picture", "not a JPEG, PNG or WebP"),
        (encoded(photo(), "GIF"), "is a GIF, not a JPEG, PNG or WebP"),
        (encoded(photo(), "BMP"), "is a BMP, not a JPEG, PNG or WebP"),
        (encoded(photo(), "TIFF"), "is a TIFF, not a JPEG, PNG or WebP"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC, not a JPEG, PNG or WebP"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "is an AVIF, not a JPEG, PNG or WebP"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "does not decode"),
        (JPEG[:300] + bytes(200) + JPEG[500:], "does not decode"),
    ],
)
def test_what_is_no_picture_is_damaged(data: bytes, reason: str) -> None:
    for decode in (
        lambda: make_views(data, ViewsConfig(), 224, KEYS[0]),
        lambda: evaluation_image(data, 224, MAX_PIXELS),
    ):
        with pytest.raises(DamagedSample, match=reason):
            decode()


@pytest.mark.parametrize("name", ["jpeg", "cmyk jpeg", "png", "webp"])
def test_pictures_with_too_many_pixels_are_damaged(name: str) -> None:
    data = FORMATS[name]()
    assert decode_rgbx(data, 200 * 320).shape == (200, 320, 4)
    # All formats but WebP (whose size Pillow reads last) are cut off behind the header, and refused before decoding.
    start = data if name == "webp" else data[:-1000]
    with pytest.raises(DamagedSample, match="320 x 200 pixels, more than max_pixels 63999"):
        decode_rgbx(start, 200 * 320 - 1)
