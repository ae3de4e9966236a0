"""Transparent pictures in training and evaluation: what stands behind them, by either decoder, and who counts them."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.cli.main import main
from cosmos_scale.data.decode.dali import picture_for_dali
from cosmos_scale.data.decode.picture import decode_rgbx, is_transparent
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import open_folder, picture, shards_config, write_shard
from tests.data.tools.test_background import HIDDEN, encoded

KINDS = ("PNG", "WEBP", "palette", "one colour")
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "#102030": (16, 32, 48), "keep": HIDDEN}
NO_CHANGES = {"jitter": {"probability": 0.0}, "grey": 0.0, "blur": {"first_global": 0.0, "other_globals": 0.0}}


def left_half(pixels: Any) -> list[int]:
    """The colour of the transparent half, which must be the same in all its pixels."""
    colours = np.unique(np.asarray(pixels)[:, :16].reshape(-1, 3), axis=0)
    assert len(colours) == 1
    found: list[int] = colours[0].tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("background", COLOURS)
def test_both_decoders_show_the_background(kind: str, background: str) -> None:
    data = encoded(kind)
    hidden = [*HIDDEN[:2], HIDDEN[2] + (kind == "one colour")]
    expected = hidden if background == "keep" else list(COLOURS[background])
    pixels = decode_rgbx(data, 10**4, background)
    assert left_half(pixels[..., :3]) == expected
    assert (pixels[:, 16:, :3] == HIDDEN).all()
    for_dali, height, width = picture_for_dali(data, 10**4, background)
    head = b"P6 32 32 255\n"
    assert (for_dali[: len(head)], height, width) == (head, 32, 32)
    np.testing.assert_array_equal(np.frombuffer(for_dali[len(head) :], np.uint8).reshape(32, 32, 3), pixels[..., :3])
    crop = evaluation_image(data, 32, 10**4, background).permute(1, 2, 0).numpy()
    assert left_half(np.round((crop * STD + MEAN) * 255).astype(int)) == expected
    if background == "keep":
        np.testing.assert_array_equal(pixels, decode_rgbx(data, 10**4))


def test_transparency_is_told_from_an_alpha_that_hides_nothing() -> None:
    assert [is_transparent(encoded(kind), 10**4) for kind in (*KINDS, "half")] == [True] * 5
    assert [is_transparent(picture(0, kind), 10**4) for kind in ("JPEG", "PNG", "WEBP")] == [False] * 3
    assert not is_transparent(encoded("PNG")[:60], 10**4)  # cut off


def transparent_shards(folder: Path) -> Path:
    """Eight samples, of which four are transparent."""
    pictures = {f"{number}": encoded("PNG") if number % 2 else picture(number, "PNG") for number in range(8)}
    texts = json.dumps({"raw_caption": ["a"]}).encode()
    write_shard(folder / "0.tar", [{"__key__": key, "png": data, "json": texts} for key, data in pictures.items()])
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def test_training_and_evaluation_read_the_key(tmp_path: Path) -> None:
    index = open_folder(transparent_shards(tmp_path))
    blue = {}
    for background in ("keep", "#0000ff"):
        views = {"local_crops": 1, "local_size": 8, **NO_CHANGES}
        config = shards_config(tmp_path, global_batch=8, background=background, views=views)
        batches = TrainLoader(config, index, Tokenizer(16), 0, 1).batches(0)
        batch = next(batches)
        batches.close()
        gallery = Gallery(index, "raw_caption", image_size=16, max_pixels=10**6, background=background)
        images = next(gallery.batches(0, 1, 8)).images
        order = batch.sample_ids.tolist()
        # The largest blue of each transparent picture, in training's first view and in evaluation.
        crops = batch.global_crops[0, [order.index(sample) for sample in (1, 3, 5, 7)], 2].amax((1, 2))
        levels = (images[1::2, 2].amax((1, 2)) * STD[2] + MEAN[2]) * 255
        blue[background] = crops.tolist() + levels.tolist()
    assert max(blue["keep"]) < 100  # the hidden colour has almost no blue
    assert min(blue["#0000ff"]) > 210


def test_verify_and_inspect_count_transparent_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = transparent_shards(tmp_path)
    quick = ["--quiet", "--workers", "1"]
    assert main(["data", "verify", str(folder), *quick]) == 0
    assert "; 4 transparent pictures (data.background): all are sound" in capsys.readouterr().out
    inspect = ["data", "inspect", str(folder), *quick, "--out", str(tmp_path / "out"), "--rows", "1"]
    assert main(inspect) == 0
    assert "4 transparent (data.background)" in " ".join(capsys.readouterr().out.split())
    assert main([*inspect, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["transparent"] == 4


def test_the_transparent_value_of_16_bit_grey_lets_the_background_through() -> None:
    values = np.array([[0, 1000, 1001], [1000, 30000, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=1000)
    data = buffer.getvalue()
    for background, colour in COLOURS.items():
        pixels = decode_rgbx(data, 10**4, background)[..., :3].astype(int)
        expected = np.repeat((values // 256).astype(int)[..., None], 3, axis=2)
        if background != "keep":
            expected[values == 1000] = colour
        np.testing.assert_array_equal(pixels, expected)
    assert is_transparent(data, 10**4)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", transparency=999)  # no pixel has it
    assert not is_transparent(buffer.getvalue(), 10**4)


def png_of_16_bits(values: Any, clear: tuple[int, int, int]) -> bytes:
    """A PNG of 16-bit colours (its specification, 11.2 and 11.3.2.1), which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"tRNS", struct.pack(">HHH", *clear)) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def test_the_transparent_colour_of_16_bit_colours_lets_the_background_through() -> None:
    clear = (0x1234, 0x5678, 0x9ABC)
    values = np.full((2, 3, 3), clear, dtype=np.uint16)
    values[0, 0, 2] += 1  # its high bytes are those of the transparent colour
    values[1, 2] = 65535
    data = png_of_16_bits(values, clear)
    for background, colour in COLOURS.items():
        expected = (values // 256).astype(int)
        if background != "keep":
            expected[(values == clear).all(axis=2)] = colour
        np.testing.assert_array_equal(decode_rgbx(data, 10**4, background)[..., :3], expected)
    assert is_transparent(data, 10**4)
    assert not is_transparent(png_of_16_bits(values, (0x1233, 0x5678, 0x9ABC)), 10**4)  # no pixel has it
