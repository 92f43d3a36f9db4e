"""Picture files that Pillow itself does not write, for the tests of `antidiffusion.pictures`."""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from antidiffusion.pictures.errors import PictureError


def noise(height: int = 70, width: int = 80, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 70, width: int = 80) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 3, x + y], -1).astype(np.uint8)


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """A minimal version 2 profile."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02400000, b"prtr", space, pcs) + bytes(12) + b"acsp"
    return (head.ljust(68, b"\0") + white).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@cache  # a profile carries the second it was made in
def srgb_icc() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def grey_icc() -> bytes:
    white = b"XYZ " + bytes(4) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return icc(b"GRAY", {b"wtpt": white, b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, 563)})


def colourless_cmyk_icc() -> bytes:
    """A CMYK profile whose every ink is grey: an image that went through it has no colour left."""
    ramp = bytes(range(256))
    nodes = b"".join(bytes([255 - 63 * bin(ink).count("1"), 128, 128]) for ink in range(16))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + nodes + ramp * 3
    return icc(b"CMYK", {b"A2B0": lut}, b"Lab ")


def exif(orientation: int | None = None, thumbnail: bytes = b"", endian: str = ">") -> bytes:
    tags = Image.Exif()
    tags.endian = endian
    tags[ExifTags.Base.Make] = "Maker"
    if orientation is not None:
        tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2020:01:01 00:00:00",
        ExifTags.Base.ExposureTime: TiffImagePlugin.IFDRational(1, 50),
        ExifTags.Base.MakerNote: b"\1\2maker\0note",
    }
    tags[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.5)}
    block = tags.tobytes()
    if not thumbnail:
        return block
    # Chain a second directory (the thumbnail) after the first: its offset follows the first one's entries.
    body = bytearray(block[6:])
    order = "<" if body[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", body, 4)
    (count,) = struct.unpack_from(order + "H", body, first)
    body += bytes(len(body) % 2)
    second = len(body)
    struct.pack_into(order + "I", body, first + 2 + 12 * count, second)
    body += struct.pack(order + "HHHIIHHIII", 2, 513, 4, 1, second + 30, 514, 4, 1, len(thumbnail), 0) + thumbnail
    return b"Exif\0\0" + bytes(body)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png_of(rows: np.ndarray, depth: int, colour: int, width: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of packed rows (H, bytes) with any chunks: what Pillow itself does not write."""
    raw = np.hstack([np.zeros((len(rows), 1), np.uint8), rows]).tobytes()
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    return png((b"IHDR", head), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b""))


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(PictureError) as caught:
        read()
    sentence = str(caught.value)
    assert all(word in sentence for word in ("expected ", ", got ", "; ")) and "\n" not in sentence
    return sentence
