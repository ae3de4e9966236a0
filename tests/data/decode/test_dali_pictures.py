"""What may enter a batch of the DALI decoder: sound pictures alone, each as DALI decodes it to the bit."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.data.decode.dali import picture_for_dali, stack
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey
from cosmos_scale.data.samples.view_plan import plan_views
from tests.data.decode.test_dali import JPEG, MAX_PIXELS, ONE_VIEW, decode_with
from tests.data.decode.test_torch_cpu import FORMATS, encoded, levels, photo


def whole_pictures(pictures: Sequence[bytes], side: int) -> list[Any]:
    """Decode through DALI's whole path with plans that leave the upper left side x side pixels as they are."""
    plan = plan_views(ONE_VIEW, side, SampleKey(0, 0, 0), side, side)
    plan.boxes[:] = (0, 0, side, side)
    plan.flip[:] = False
    crops = decode_with(ONE_VIEW, side, len(pictures))(stack(pictures, [plan] * len(pictures)))
    return [levels(crop).astype(np.uint8) for crop in crops.global_crops[0]]


RARE_MARKERS = {
    "segment of no length": b"\xff\xe3\x00\x00",
    "marker for arithmetic coding": b"\xff\x01",
    "restart marker in the header": b"\xff\xd0",
    "Adobe's marker, plain RGB": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00",
    "fill bytes": b"\xff\xff",
    "number of lines": b"\xff\xdc\x00\x04\x00\xc8",
}
COMMON_MARKERS = {
    "Adobe's marker, YCbCr": b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01",
    "a comment": b"\xff\xfe\x00\x07hello",
    "a false start in a segment": b"\xff\xe5" + struct.pack(">H", 2 + 24) + b"\xff\xd8\xff\xda\xff\xc0" * 4,
}


def test_every_format_is_decoded_to_the_bit() -> None:
    sixteen_bits = Image.fromarray(np.arange(200 * 320, dtype=np.uint16).reshape(200, 320))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    jpeg = FORMATS["jpeg"]()
    pictures = {
        **{name: make() for name, make in FORMATS.items()},
        "16-bit png": encoded(sixteen_bits, "PNG"),
        "turned by EXIF": encoded(photo(), exif=exif),
        "jpeg in RGB": encoded(photo(), keep_rgb=True),
        "jpeg 4:1:1": encoded(photo(), subsampling="4:1:1"),
        "restart intervals": encoded(photo(), restart_marker_blocks=7),
        "rubbish behind its end": jpeg + b"rubbish" * 9,
        **{name: jpeg[:2] + marker + jpeg[2:] for name, marker in (RARE_MARKERS | COMMON_MARKERS).items()},
    }
    prepared = [picture_for_dali(picture, MAX_PIXELS) for picture in pictures.values()]
    assert [shape for _, *shape in prepared] == [[200, 320]] * len(pictures)
    decoded = whole_pictures([data for data, *_ in prepared], 200)
    for (name, picture), ours in zip(pictures.items(), decoded, strict=True):
        np.testing.assert_array_equal(ours, decode_rgbx(picture, MAX_PIXELS)[:, :200, :3], err_msg=name)


def test_plain_jpegs_stay_as_they_are() -> None:
    for name in ("jpeg", "progressive", "jpeg 4:4:4", "jpeg 4:2:2", "grey jpeg"):
        picture = FORMATS[name]()
        assert picture_for_dali(picture, MAX_PIXELS) == (picture, 200, 320)
    for marker in COMMON_MARKERS.values():
        picture = JPEG[:2] + marker + JPEG[2:]
        assert picture_for_dali(picture, MAX_PIXELS)[0] == picture
    for marker in RARE_MARKERS.values():
        assert picture_for_dali(JPEG[:2] + marker + JPEG[2:], MAX_PIXELS)[0].startswith(b"P6 130 96 255\n")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.98])
def test_a_truncated_picture_does_not_enter(name: str, share: float) -> None:
    data = FORMATS[name]()
    with pytest.raises(DamagedSample, match="the picture"):
        picture_for_dali(data[: int(len(data) * share)], MAX_PIXELS)


def test_a_header_may_end_anywhere() -> None:
    marker = COMMON_MARKERS["Adobe's marker, YCbCr"]
    data = JPEG[:2] + marker + JPEG[2:]
    for length in range(data.index(b"\xff\xda") + 20):
        with pytest.raises(DamagedSample, match="the picture"):
            picture_for_dali(data[:length], MAX_PIXELS)


def test_too_many_pixels_do_not_enter() -> None:
    for name in ("jpeg", "cmyk jpeg", "png", "webp"):
        with pytest.raises(DamagedSample, match="320 x 200 pixels, more than max_pixels 63999"):
            picture_for_dali(FORMATS[name](), 200 * 320 - 1)


def flipped(picture: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one bit flipped each, half of them in the first 700 bytes, where the headers are."""
    generator = np.random.default_rng(seed)
    for n in range(count):
        broken = bytearray(picture)
        end = len(picture) if n % 2 else min(700, len(picture))
        broken[generator.integers(end)] ^= 1 << int(generator.integers(8))
        yield bytes(broken)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"quality": 15}],
    ids=lambda options: next(iter(options), "baseline"),
)
def test_what_enters_is_sound(options: dict[str, Any]) -> None:
    """Of pictures with one wrong bit, the check refuses those that decode_rgbx refuses; DALI decodes all others alike.

    A picture that DALI does not decode would end the batch.
    """
    sound, expected, refused = [], [], 0
    for picture in flipped(encoded(photo(40, 56), **options), 300, seed=len(options)):
        try:
            pixels = decode_rgbx(picture, MAX_PIXELS)
        except DamagedSample:
            refused += 1
            with pytest.raises(DamagedSample):
                picture_for_dali(picture, MAX_PIXELS)
            continue
        data, height, width = picture_for_dali(picture, MAX_PIXELS)
        assert (height, width) == pixels.shape[:2]
        # A wrong bit may make the picture smaller; the pixels that remain are compared.
        if min(height, width) >= 32:
            sound.append(data)
            expected.append(pixels[:32, :32, :3])
    assert refused > 30
    assert len(sound) > 100
    np.testing.assert_array_equal(np.stack(whole_pictures(sound, 32)), np.stack(expected))
