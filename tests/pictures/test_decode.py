import os
import struct
import tempfile
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    colourless_cmyk_icc,
    exif,
    noise,
    png,
    png_of,
    refusal,
    saved,
    smooth,
    srgb_icc,
    stored,
)
from PIL import Image, ImageCms, ImageFile, WebPImagePlugin

from antidiffusion.pictures.picture import READABLE, Picture, PictureError, linf

OUTPUTS = [".png", ".webp", ".tiff"]

RGB = Image.fromarray(smooth())
RGBA = Image.fromarray(np.dstack([smooth(), noise(channels=1)]))
SOURCES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "1.png": (RGB.convert("1"), "L", {}),
    "1.tiff": (RGB.convert("1"), "L", {"compression": "group4"}),
    "L.png": (RGB.convert("L"), "L", {}),
    "L.gif": (RGB.convert("L"), "L", {}),
    "L.bmp": (RGB.convert("L"), "L", {}),
    "L.jpg": (RGB.convert("L"), "L", {}),
    "LA.png": (RGBA.convert("LA"), "LA", {}),
    "LA.tiff": (RGBA.convert("LA"), "LA", {}),
    "L-transparent.png": (RGB.convert("L"), "LA", {"transparency": 30}),
    "P.png": (RGB.quantize(64), "RGB", {}),
    "P.gif": (RGB.quantize(64), "RGB", {}),
    "P.tiff": (RGB.quantize(64), "RGB", {}),
    "P.bmp": (RGB.quantize(64), "RGB", {}),
    "P-transparent.gif": (RGB.quantize(64), "RGBA", {"transparency": 3}),
    "P-transparent.png": (RGB.quantize(64), "RGBA", {"transparency": bytes(range(0, 256, 4))}),
    "RGB.png": (RGB, "RGB", {}),
    "RGB.jpg": (RGB, "RGB", {}),
    "RGB-progressive.jpeg": (RGB, "RGB", {"progressive": True}),
    "RGB.webp": (RGB, "RGB", {}),
    "RGB.bmp": (RGB, "RGB", {}),
    "RGB-lzw.tif": (RGB, "RGB", {"compression": "tiff_lzw"}),
    "RGB-jpeg.tif": (RGB, "RGB", {"compression": "jpeg"}),
    "RGB-transparent.png": (RGB, "RGBA", {"transparency": (0, 0, 0)}),
    "RGBA.png": (RGBA, "RGBA", {}),
    "RGBA.webp": (RGBA, "RGBA", {"lossless": True, "exact": True}),
    "RGBA.tiff": (RGBA, "RGBA", {"compression": "tiff_deflate"}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_mode_reads_as_pillow_shows_it_and_survives_every_output(name: str, tmp_path: Path) -> None:
    image, mode, options = SOURCES[name]
    picture = Picture.read(saved(tmp_path / name, image, **options))
    with Image.open(tmp_path / name) as opened:
        shown = np.asarray(opened.convert(mode))
    shown = shown[..., None] if shown.ndim == 2 else shown
    assert np.array_equal(picture.pixels, shown[..., : 3 if mode.startswith("RGB") else 1])
    assert (picture.alpha is not None) == mode.endswith("A")
    assert picture.alpha is None or np.array_equal(picture.alpha, shown[..., -1])
    assert picture.notes == () and picture.source == tmp_path / name and not picture.metadata.texts
    outputs = OUTPUTS if mode.endswith("A") else [*OUTPUTS, ".bmp"]
    for suffix in outputs:
        picture.write(tmp_path / f"out{suffix}")
        again = Picture.read(tmp_path / f"out{suffix}")
        assert linf(again, picture) == 0
        assert picture.alpha is None or np.array_equal(again.alpha, picture.alpha)


def test_readable_names_what_can_be_read(tmp_path: Path) -> None:
    for suffix in READABLE - {".heic", ".heif"}:
        assert Picture.read(saved(tmp_path / f"a{suffix}", RGB)).pixels.shape == (70, 80, 3)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_grey_is_rounded_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    picture = Picture.read(saved(tmp_path / f"a{suffix}", Image.fromarray(values)))
    assert np.array_equal(picture.pixels[..., 0], np.rint(values / 257).astype(np.uint8))
    assert picture.notes == ("16 bits of grey were rounded to 8",)


def test_sixteen_bit_white_is_zero_is_inverted(tmp_path: Path) -> None:
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    path = saved(tmp_path / "a.tiff", Image.fromarray(values), tiffinfo={262: 0})
    assert np.array_equal(Picture.read(path).pixels[..., 0], 255 - np.rint(values / 257).astype(np.uint8))


def test_transparent_grey_of_any_depth_becomes_alpha(tmp_path: Path) -> None:
    levels = np.tile(np.arange(64) % 16, (64, 1)).astype(np.uint8)
    four = png_of(levels[:, ::2] << 4 | levels[:, 1::2], 4, 0, 64, (b"tRNS", struct.pack(">H", 5)))
    picture = Picture.read(stored(tmp_path / "four.png", four))
    assert np.array_equal(picture.pixels[..., 0], levels * 17) and np.array_equal(picture.alpha == 0, levels == 5)
    wide = np.tile(np.arange(64) * 1000, (64, 1)).astype(">u2")
    rows = wide.view(np.uint8).reshape(64, 128)
    sixteen = stored(tmp_path / "sixteen.png", png_of(rows, 16, 0, 64, (b"tRNS", struct.pack(">H", 3000))))
    assert np.array_equal(Picture.read(sixteen).alpha == 0, wide == 3000)


def test_sixteen_bit_colour_is_reduced_with_a_note(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (64, 64 * 3)).astype(">u2")
    rows = values.view(np.uint8).reshape(64, -1)
    path = stored(tmp_path / "a.png", png_of(rows, 16, 2, 64, (b"tRNS", bytes(6))))
    picture = Picture.read(path)
    assert np.abs(picture.pixels.reshape(64, -1) - values / 257).max() <= 1
    assert len(picture.notes) == 2 and picture.alpha is None


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_refused(mode: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tiff", Image.new(mode, (64, 64), 70000))
    assert "16-bit PNG" in refusal(lambda: Picture.read(path))


def test_grey_stored_as_colour_stays_grey(tmp_path: Path) -> None:
    grey = noise(channels=1)
    path = saved(tmp_path / "a.webp", Image.fromarray(grey.repeat(3, 2)), lossless=True, icc_profile=srgb_icc())
    picture = Picture.read(path)
    assert np.array_equal(picture.pixels, grey)
    picture.write(tmp_path / "a.png")  # an RGB profile describes RGB pixels only
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB" and image.info["icc_profile"] == srgb_icc()


def test_cmyk_goes_through_its_profile(tmp_path: Path) -> None:
    inks = Image.fromarray(np.dstack([smooth(), smooth()[..., :1] // 2]), "CMYK")
    naive, profiled, broken = (
        Picture.read(saved(tmp_path / f"{number}.jpg", inks, quality=95, icc_profile=profile))
        for number, profile in enumerate([None, colourless_cmyk_icc(), b"rubbish" * 40])
    )

    def colour(picture: Picture) -> int:
        return int((picture.pixels.max(2) - picture.pixels.min(2)).max())

    assert colour(naive) > 100 and colour(profiled) <= 2 and linf(naive, broken) == 0
    assert np.ptp(profiled.pixels) > 80
    for picture in (naive, profiled, broken):
        assert "CMYK was converted to sRGB" in picture.notes
    assert len(broken.notes) == len(naive.notes) == 2 and naive.icc == profiled.icc == broken.icc
    assert ImageCms.ImageCmsProfile(BytesIO(naive.icc or b"")).profile.xcolor_space == "RGB "
    assert naive.icc is not None and not any(naive.icc[24:36]), "a creation time would change the bytes"
    with Image.open(tmp_path / "0.jpg") as image:
        assert np.array_equal(naive.pixels, np.asarray(image.convert("RGB")))


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    text = (b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 24)))
    path = stored(tmp_path / "a.png", png_of(smooth().reshape(70, -1), 8, 2, 80, text))
    assert "got larger ones" in refusal(lambda: Picture.read(path))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff"])
def test_more_than_one_frame_is_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    path = saved(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
    assert "got 3 frames" in refusal(lambda: Picture.read(path))


def test_a_photo_with_a_second_picture_behind_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    RGB.save(path, "MPO", save_all=True, append_images=[RGB.convert("L")])
    picture = Picture.read(path)
    assert picture.format == "JPEG" and picture.pixels.shape == (70, 80, 3) and "first of" in picture.notes[0]


@pytest.mark.parametrize(
    "name", ["RGB.png", "RGB.jpg", "RGB-progressive.jpeg", "RGB.webp", "P.gif", "P.bmp", "RGB-lzw.tif", "P.tiff"]
)
def test_a_cut_file_is_refused_or_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bytes of some formats carry no pixel: without them the picture is still whole, never approximate."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other users of Pillow set it
    image, _, options = SOURCES[name]
    path = saved(tmp_path / name, image, **options)
    whole, content = Picture.read(path), path.read_bytes()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    for size in {*range(0, len(content), max(1, len(content) // 50)), *range(len(content) - 30, len(content))}:
        path.write_bytes(content[:size])
        try:
            assert linf(Picture.read(path), whole) == 0 and size > len(content) - 30
        except PictureError as error:
            assert "expected" in str(error)


CORRUPTIBLE = ["RGB.png", "RGB.jpg", "RGB.webp", "P.gif", "P.bmp", "P.tiff", "RGB-jpeg.tif"]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(CORRUPTIBLE), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_a_corrupt_file_raises_nothing_else(name: str, changes: list[tuple[float, int]]) -> None:
    image, _, options = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        image.save(path, **options, **({"exif": exif()} if Path(name).suffix in (".png", ".jpg", ".webp") else {}))
        content = bytearray(path.read_bytes())
        for place, value in changes:
            content[int(place * len(content))] = value
        path.write_bytes(content)
        try:
            picture = Picture.read(path)
            for suffix in OUTPUTS:
                picture.write(Path(folder) / f"out{suffix}")
                assert linf(Picture.read(Path(folder) / f"out{suffix}"), picture) == 0
        except PictureError as error:
            assert "expected" in str(error)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert "empty" in refusal(lambda: Picture.read(stored(tmp_path / "a.png", b"")))
    assert "no whole picture" in refusal(lambda: Picture.read(stored(tmp_path / "b.png", b"GIF? no, text")))
    assert "a folder" in refusal(lambda: Picture.read(tmp_path))
    assert "no such file" in refusal(lambda: Picture.read(tmp_path / "missing.png"))
    assert "too long" in refusal(lambda: Picture.read(tmp_path / ("x" * 300)))
    os.mkfifo(tmp_path / "pipe.png")
    assert "something else" in refusal(lambda: Picture.read(tmp_path / "pipe.png"))


@pytest.mark.parametrize("size", [(20000, 20000), (12000, 10000), (2_000_000_000, 2_000_000_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    head = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    path = stored(tmp_path / "a.png", png(head, (b"IDAT", b"never decoded"), (b"IEND", b"")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "expected at most 100 megapixels" in refusal(lambda: Picture.read(path))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_hundred_megapixels_are_read_without_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("1", (10000, 10000)), compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = Picture.read(path)
    assert picture.pixels.shape == (10000, 10000, 1) and picture.notes == ()


def test_the_smallest_side_is_64(tmp_path: Path) -> None:
    assert Picture.read(saved(tmp_path / "a.png", Image.new("RGB", (64, 64)))).pixels.shape[:2] == (64, 64)
    assert "got 63 x 64" in refusal(lambda: Picture.read(saved(tmp_path / "b.png", Image.new("RGB", (63, 64)))))


def test_a_chunk_longer_than_its_file_takes_no_memory() -> None:
    content = bytearray(png_of(smooth().reshape(70, -1), 8, 2, 80))
    at = content.index(b"IDAT") - 4
    content[at : at + 4] = b"\x7f\xff\xff\xff"
    assert "ends within a chunk" in refusal(lambda: Picture.read(BytesIO(bytes(content))))


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "L"])
def test_bands_join_without_a_seam(mode: str) -> None:
    """More rows than are converted at a time."""
    image = Image.fromarray(noise(600, 64, 4), "RGBA").convert("RGB" if mode == "CMYK" else mode)
    image = image.convert(mode)
    buffer = BytesIO()
    image.save(buffer, "TIFF")
    picture = Picture.read(BytesIO(buffer.getvalue()))
    shown = np.asarray(image.convert({"P": "RGB", "CMYK": "RGB"}.get(mode, mode))).reshape(600, 64, -1)
    assert np.array_equal(picture.pixels, shown[..., :3])
    assert picture.alpha is None or np.array_equal(picture.alpha, shown[..., 3])


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: Any) -> None:
        raise MemoryError

    buffer = BytesIO()
    RGB.save(buffer, "WEBP")
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", empty)
    assert "enough memory" in refusal(lambda: Picture.read(BytesIO(buffer.getvalue())))
