"""Every layout that a second writer can write is read as a second reader reads it, or refused."""

import itertools
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import tifffile
from picture_files import refusal, smooth
from PIL import Image

from antidiffusion.pictures.picture import Picture, PictureError

HEIGHT, WIDTH = 64, 80
CODECS = [None, "lzw", "deflate", "packbits", "zstd", "jpeg", "webp"]
KINDS: list[tuple[str, int, str | None]] = [
    ("minisblack", 1, None),
    ("miniswhite", 1, None),
    ("minisblack", 2, "unassalpha"),
    ("rgb", 3, None),
    ("rgb", 4, "unassalpha"),
    ("rgb", 4, "assocalpha"),
    ("rgb", 4, "unspecified"),
    ("rgb", 5, "unspecified"),
    ("palette", 1, None),
    ("separated", 4, None),
    ("ycbcr", 3, None),
    ("cielab", 3, None),
]
TYPES = ["u1", "u2", "u4", "i1", "i2", "f2", "f4", "f8", "?"]


def content(channels: int, dtype: np.dtype) -> np.ndarray:
    """Smooth with noisy rows, so that every codec has something to do; colours are not above their alpha."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    values = np.stack([(2 * x + y + 30 * k) % 200 for k in range(channels)], -1).astype(np.uint16)
    values[::7] = np.random.default_rng(0).integers(0, 200, values[::7].shape)
    if channels in (2, 4, 5):
        values[..., -1] = 200 + x % 56
    if dtype.kind == "f":
        return (values / 255).astype(dtype)
    if dtype.kind == "b":
        return values > 100
    wide = values * 257 + 77 if dtype.itemsize > 1 else values
    return (wide // (2 if dtype.kind == "i" else 1)).astype(dtype)


def expected(stored: np.ndarray, kind: str, extra: str | None, palette: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return pixels and alpha that the second reader's values mean."""
    if stored.dtype == bool:
        stored = stored.astype(np.uint8) * 255
    if stored.dtype.itemsize == 2:  # grey is rounded, colour cut
        grey = stored.shape[2] == 1
        stored = (np.rint(stored / 257) if grey else stored >> 8).astype(np.uint8)
    alpha = None if extra in (None, "unspecified") else stored[..., -1]
    pixels = stored[..., :3] if kind == "rgb" else stored[..., :1] if extra else stored
    if extra == "assocalpha":
        pixels = np.minimum(255, 255 * pixels.astype(int) // alpha[..., None]).astype(np.uint8)
    if kind == "miniswhite":
        pixels = 255 - pixels
    if kind == "palette":
        pixels = np.moveaxis((palette >> 8).astype(np.uint8)[:, pixels[..., 0]], 0, -1)
    if kind == "separated":
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB"))
    return pixels, alpha


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.filterwarnings("ignore")
def test_a_layout_is_read_as_another_reader_does_or_refused(codec: str | None) -> None:
    palette = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
    read, written, wrong = set(), 0, []
    orders = itertools.product((False, 2, 3), ("contig", "separate"), ("strips", "tiles"), "<>", KINDS, TYPES)
    for predictor, planes, parts, order, (kind, channels, extra), name in orders:
        dtype = np.dtype(order + name)
        if (predictor == 3 and dtype.kind != "f") or (planes == "separate" and channels == 1):
            continue
        uncommon = predictor or parts == "tiles"
        if parts == "tiles" and (order == ">" or predictor):
            continue
        if uncommon and (planes == "separate" or dtype.kind in "if" or dtype.itemsize > 2):
            continue  # each is refused for one reason already
        values, buffer = content(channels, dtype), BytesIO()
        options: dict[str, Any] = {"tile": (32, 48)} if parts == "tiles" else {"rowsperstrip": 16}
        options |= {"planarconfig": planes} if channels > 1 else {}
        options |= {"colormap": palette} if kind == "palette" else {}
        options |= {"extrasamples": [extra] * (channels - 3 if kind == "rgb" else 1)} if extra else {}
        values = np.moveaxis(values, -1, 0) if planes == "separate" else values if channels > 1 else values[..., 0]
        try:
            coded: dict[str, Any] = {"byteorder": order, "compression": codec, "predictor": predictor or None}
            tifffile.imwrite(buffer, values, photometric=kind, **coded, **options)
            buffer.seek(0)
            stored = tifffile.imread(buffer)
        except Exception:  # as many types as there are layouts that it cannot write
            continue
        written += 1
        buffer.seek(0)
        try:
            picture = Picture.read(buffer)
        except PictureError as error:
            assert all(word in str(error) for word in ("expected ", ", got ", "; "))
            continue
        stored = np.moveaxis(stored, 0, -1) if planes == "separate" else stored.reshape(HEIGHT, WIDTH, -1)
        if kind == "ycbcr":
            continue  # JPEG's: the other reader leaves the matrix to its caller
        pixels, alpha = expected(stored, kind, extra, palette)
        shown = picture.pixels.repeat(pixels.shape[2] // picture.pixels.shape[2], 2)
        layout = (predictor, planes, parts, order, kind, channels, extra, name)
        if not np.array_equal(shown, pixels) or not np.array_equal(picture.alpha, alpha):
            wrong.append(layout)
        read.add(layout)
    assert not wrong
    assert written > 20
    lossless = codec not in ("jpeg", "webp")
    for order in "<>" if lossless else "":
        for kind, channels, name in (("rgb", 3, "u1"), ("rgb", 3, "u2"), ("minisblack", 1, "u2"), ("palette", 1, "u1")):
            assert (False, "contig", "strips", order, kind, channels, None, name) in read, "what is common is read"


def test_several_pages_a_preview_and_a_raw_photo_are_refused() -> None:
    def sentence(*pages: dict[str, Any]) -> str:
        buffer = BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            for page in pages:
                writer.write(smooth(), photometric="rgb", metadata=None, **page)
        return refusal(lambda: Picture.read(BytesIO(buffer.getvalue())))

    assert "2 frames" in sentence({}, {})
    assert "smaller version" in sentence({"subfiletype": 1})
    assert "raw program" in sentence({"subfiletype": 1, "subifds": 1}, {})
    assert "raw program" in sentence({"extratags": [(50706, 1, 4, (1, 4, 0, 0), True)]})


def test_a_pyramid_is_read_with_a_note() -> None:
    buffer = BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(smooth(), photometric="rgb", metadata=None, subifds=1)
        writer.write(smooth()[::2, ::2].copy(), photometric="rgb", metadata=None, subfiletype=1)
    picture = Picture.read(BytesIO(buffer.getvalue()))
    assert np.array_equal(picture.pixels, smooth()) and picture.notes == (
        "only the first of the file's pictures was kept",
    )
