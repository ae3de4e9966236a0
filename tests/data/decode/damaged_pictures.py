"""Pictures and texts as in crawled data: odd but sound, or damaged, then with the beginning of the reason."""

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from cosmos_scale.testing.shard_files import picture

MAX_PIXELS = 100_000


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Pictures that can be trained on as they are."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in noise)
    deep = Image.fromarray(noise[0, :, :, 0].astype(np.uint16) * 257)
    several: dict[str, Any] = {"save_all": True, "append_images": others}
    return {
        "CMYK JPEG": encode(first.convert("CMYK"), "JPEG"),
        "grey JPEG": encode(first.convert("L"), "JPEG"),
        "progressive JPEG": encode(first, "JPEG", progressive=True),
        "JPEG with a camera's data behind it": picture(1) + bytes(range(256)) * 40,
        "16-bit PNG": encode(deep, "PNG"),
        "palette PNG": encode(first.convert("P"), "PNG", transparency=3),
        "transparent PNG": encode(first.convert("RGBA"), "PNG"),
        "bilevel PNG": encode(first.convert("1"), "PNG"),
        "animated PNG": encode(first, "PNG", **several),
        "animated WebP": encode(first, "WEBP", **several),
        "lossless WebP": encode(first.convert("RGBA"), "WEBP", lossless=True),
        "one pixel": encode(first.crop((0, 0, 1, 1)), "JPEG"),
        "one line": encode(Image.fromarray(np.tile(noise[0, :1], (1, 200, 1))), "JPEG"),
    }


def damaged_pictures() -> dict[str, tuple[bytes, str]]:
    """Pictures that cost one sample each, with the beginning of the reason."""
    jpeg, png, webp = (picture(1, kind) for kind in ("JPEG", "PNG", "WEBP"))
    size = f"the picture has {'{0}'} x {'{0}'} pixels, more than max_pixels {MAX_PIXELS}"
    none, broken = "the picture is not a JPEG, PNG or WebP", "the picture does not decode"
    middle = len(png) // 2
    return {
        "empty": (b"", "the picture is empty"),
        "text": (b"<html>404 Not Found</html>" * 9, none),
        "GIF": (encode(Image.open(io.BytesIO(jpeg)), "GIF"), f"the picture is a GIF, {none.partition('is ')[2]}"),
        "JPEG without its end": (jpeg[: len(jpeg) // 2], broken),
        "JPEG with an end amid its data": (jpeg[: len(jpeg) // 2] + b"\xff\xd9" + jpeg[len(jpeg) // 2 :], broken),
        "JPEG whose head alone is left": (jpeg[:20] + b"\xff\xd9", broken),
        "PNG with a flipped bit": (png[:middle] + bytes([png[middle] ^ 1]) + png[middle + 1 :], broken),
        "PNG without its end": (png[:middle], broken),
        "WebP without its end": (webp[: len(webp) // 2], broken),
        "WebP with a broken frame": (webp.replace(b"\x9d\x01\x2a", b"\x00\x00\x00"), broken),
        **{f"huge {kind}": (data, size.format(side)) for kind, (data, side) in huge_pictures().items()},
    }


def huge_pictures() -> dict[str, tuple[bytes, int]]:
    """A few hundred bytes that promise a square of this side; decoding any would allocate 200 MB or more."""
    jpeg = bytearray(picture(1))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
    lossy = bytearray(picture(1, "WEBP"))
    start = lossy.index(b"\x9d\x01\x2a") + 3
    lossy[start : start + 4] = struct.pack("<HH", 8_000, 8_000)
    lossless = bytearray(odd_pictures()["lossless WebP"])
    lossless[21:25] = struct.pack("<I", 7_999 | 7_999 << 14)
    animated = bytearray(odd_pictures()["animated WebP"])
    animated[24:30] = struct.pack("<I", 7_999)[:3] * 2
    header = struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return {
        "JPEG": (bytes(jpeg), 65_000),
        "PNG": (png, 90_000),
        "lossy WebP": (bytes(lossy), 8_000),
        "lossless WebP": (bytes(lossless), 8_000),
        "animated WebP": (bytes(animated), 8_000),
    }


def odd_texts() -> dict[str, bytes]:
    many = [f"sentence {number} is one of very many" for number in range(10_000)]
    return {
        "10,000 sentences": json.dumps({"raw_caption": many}).encode(),
        "10,000 sentences in one string": json.dumps({"raw_caption": ". ".join(many) + "."}).encode(),
        "a sentence of a megabyte": json.dumps({"raw_caption": ["word " * 200_000]}).encode(),
        "half of a surrogate pair": rb'{"raw_caption": ["a \ud83d cat", "\udc00"]}',
        "control characters": json.dumps({"raw_caption": ["a\x00b\x1b[31m\u202e", "\ufeff"]}).encode(),
        "every list but one empty": json.dumps({"raw_caption": [], "longIB_captions": ["a cat"]}).encode(),
        "a plain caption": json.dumps({"caption": "A cat. It sleeps.", "raw_caption": None}).encode(),
    }


def damaged_texts() -> dict[str, tuple[bytes, str]]:
    return {
        "empty json": (b"", "unreadable json"),
        "half a json": (b'{"raw_caption": ["a cat', "unreadable json"),
        "json that is not UTF-8": (b'{"raw_caption": ["caf\xe9"]}', "unreadable json"),
        "json nested 100,000 deep": (b"[" * 100_000, "unreadable json"),
        "a list": (b'["a cat"]', "json is a list"),
        "null": (b"null", "json is a NoneType"),
        "a number for captions": (b'{"raw_caption": 7, "url": "x"}', "raw_caption is a number"),
        "a list of numbers": (b'{"raw_caption": ["a", 7]}', "raw_caption[1] is a number"),
        "an object for captions": (b'{"raw_caption": {"en": "a cat"}}', "raw_caption is an object"),
        "zero sentences": (b'{"raw_caption": [], "url": "x"}', "no caption text for sampling textcrop"),
        "blank sentences": (b'{"raw_caption": ["", "  ", "\\n"], "url": "x"}', "no caption text for sampling textcrop"),
        "captions of another kind": (b'{"original_caption": "a cat"}', "sampling textcrop needs one of"),
    }
