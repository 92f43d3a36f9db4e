import errno
import os
import resource
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin

from antidiffusion.pictures.picture import READABLE, Picture, PictureError, linf

OUTPUTS = [".png", ".webp", ".tiff"]
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6">é</d></x:xmpmeta>'.encode()


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


def tags_of(block: bytes | None) -> dict[Any, Any]:
    tags = Image.Exif()
    tags.load(block or b"")
    nested = {ifd: tags.get_ifd(ifd) for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.IFD1)}
    return {key: value for key, value in tags.items() if key not in nested} | nested


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


# ---- reading ---------------------------------------------------------------------------------------------------------

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
    assert picture.notes == () and picture.source == tmp_path / name
    outputs = OUTPUTS if mode.endswith("A") else [*OUTPUTS, ".bmp"]
    for suffix in outputs:
        picture.write(tmp_path / f"out{suffix}")
        again = Picture.read(tmp_path / f"out{suffix}")
        assert linf(again, picture) == 0
        assert picture.alpha is None or np.array_equal(again.alpha, picture.alpha)


def test_readable_names_what_can_be_read(tmp_path: Path) -> None:
    for suffix in READABLE:
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
    assert len(broken.notes) == 2 and naive.icc == profiled.icc == broken.icc
    assert ImageCms.ImageCmsProfile(BytesIO(naive.icc or b"")).profile.xcolor_space == "RGB "
    assert naive.icc is not None and not any(naive.icc[24:36]), "a creation time would change the bytes"
    with Image.open(tmp_path / "0.jpg") as image:
        assert np.array_equal(naive.pixels, np.asarray(image.convert("RGB")))


def test_lab_is_converted(tmp_path: Path) -> None:
    lab = Image.merge("LAB", [Image.new("L", (64, 64), level) for level in (136, 208, 195)])  # near pure red
    picture = Picture.read(saved(tmp_path / "a.tiff", lab))
    assert np.abs(picture.pixels[0, 0].astype(int) - (255, 0, 0)).max() < 20 and picture.notes


UPRIGHT: dict[
    int, Callable[[np.ndarray], np.ndarray]
] = {  # CIPA DC-008, the row and column each value puts at the top left
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".jpg"])
def test_orientation_is_applied_once(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    lossless = {"lossless": True} if suffix == ".webp" else {}
    RGB.save(path, exif=exif(orientation), **lossless)
    if suffix == ".tiff":
        stored_pixels = smooth()
    else:
        with Image.open(path) as image:
            stored_pixels = np.asarray(image)
    picture = Picture.read(path)
    assert np.array_equal(picture.pixels, UPRIGHT[orientation](stored_pixels))
    picture.write(tmp_path / "b.png")
    again = Picture.read(tmp_path / "b.png")
    assert linf(picture, again) == 0
    for block in (picture.exif, again.exif):
        assert tags_of(block).get(ExifTags.Base.Orientation, 1) == 1
        assert tags_of(block)[ExifTags.Base.Make] == "Maker"


def test_orientation_in_xmp_is_removed_too(tmp_path: Path) -> None:
    picture = Picture.read(saved(tmp_path / "a.jpg", RGB, exif=exif(6), xmp=XMP))
    assert picture.xmp == XMP.replace(b'tiff:Orientation="6"', b"")
    only_xmp = Picture.read(saved(tmp_path / "b.jpg", RGB, xmp=XMP))
    assert only_xmp.pixels.shape == (80, 70, 3) and b"Orientation" not in (only_xmp.xmp or b"")


def test_metadata_of_the_file_is_read_as_it_is(tmp_path: Path) -> None:
    for suffix in (".jpg", ".png", ".webp", ".tiff"):
        path = tmp_path / f"a{suffix}"
        RGB.save(path, exif=exif(), icc_profile=srgb_icc(), **({} if suffix == ".tiff" else {"xmp": XMP}))
        picture = Picture.read(path)
        assert tags_of(picture.exif) == tags_of(exif()) and picture.icc == srgb_icc()
        assert suffix == ".tiff" or picture.exif == exif()


@pytest.mark.parametrize("endian", ["<", ">"])
def test_a_thumbnail_of_the_unprotected_photo_is_blanked(endian: str, tmp_path: Path) -> None:
    block = exif(6, b"\xff\xd8 small picture \xff\xd9", endian)
    assert block[6:8] == {"<": b"II", ">": b"MM"}[endian]
    assert tags_of(block)[ExifTags.IFD.IFD1] and b"small picture" in block
    picture = Picture.read(saved(tmp_path / "a.jpg", RGB, exif=block))
    assert b"small picture" not in (picture.exif or b"") and "thumbnail" in picture.notes[0]
    assert tags_of(picture.exif) == tags_of(exif(1)) and len(picture.exif or b"") == len(block)


def test_accents_and_maker_notes_survive_a_rotation(tmp_path: Path) -> None:
    """Pillow encodes EXIF anew with question marks for accents, and moves what maker notes point to."""
    flat = Image.Exif()
    flat[ExifTags.Base.Artist], flat[ExifTags.Base.Orientation] = "Jos\x01 N\x01", 6
    for number, block in enumerate(
        (exif(6).replace(b"Maker", b"Mak\xc3\xa9"), flat.tobytes().replace(b"\1 N\1", b"\xe9 N\xe9"))
    ):
        picture = Picture.read(saved(tmp_path / f"{number}.jpg", RGB, exif=block))
        assert picture.pixels.shape == (80, 70, 3) and picture.notes == ()
        assert sum(a != b for a, b in zip(picture.exif or b"", block, strict=True)) == 1, "6 became 1"
        for suffix in OUTPUTS:
            picture.write(tmp_path / f"{number}{suffix}")
            again = Picture.read(tmp_path / f"{number}{suffix}")
            kept, expected = tags_of(again.exif), tags_of(picture.exif)
            kept.pop(ExifTags.Base.Orientation, None), expected.pop(ExifTags.Base.Orientation)
            assert kept == expected and any("é" in str(v) or "Ã" in str(v) for v in kept.values())


def test_broken_metadata_is_dropped_with_a_note(tmp_path: Path) -> None:
    names = {
        "ICC": saved(tmp_path / "icc.jpg", RGB, icc_profile=b"rubbish" * 40),
        "ICC ": saved(tmp_path / "space.jpg", RGB, icc_profile=grey_icc()),
        "ICC  ": stored(tmp_path / "iccp.png", png_of(smooth().reshape(70, -1), 8, 2, 80, (b"iCCP", b"n\0\0rubbish"))),
        "EXIF": saved(tmp_path / "exif.jpg", RGB, exif=b"Exif\0\0rubbish" * 9),
        "EXIF ": saved(tmp_path / "exif.webp", RGB, exif=b"MM\0*\0\0\0\x08\xff\xff" + b"\1\xff" * 40),
        "XMP": saved(tmp_path / "xmp.jpg", RGB, xmp=b"\xff\xfe\xfd"),
    }
    for name, path in names.items():
        picture = Picture.read(path)
        assert picture.icc is None and picture.xmp is None and not tags_of(picture.exif).get(ExifTags.Base.Make)
        assert picture.notes and (name.strip() in " ".join(picture.notes) or "Pillow" in picture.notes[0]), name


def test_damaged_exif_entries_are_left_out_and_the_rest_is_written_silently(tmp_path: Path) -> None:
    block = bytearray(exif())
    entry = block.index(struct.pack(">HHI", 2, 5, 3))  # GPS latitude: three rationals
    struct.pack_into(">I", block, entry + 8, 1 << 20)  # stored past the end
    picture = Picture.read(saved(tmp_path / "a.jpg", RGB, exif=bytes(block)))
    assert "damaged EXIF entries were left out" in picture.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in OUTPUTS:
            picture.write(tmp_path / f"b{suffix}")
            tags = tags_of(Picture.read(tmp_path / f"b{suffix}").exif)
            assert tags[ExifTags.Base.Make] == "Maker" and tags[ExifTags.IFD.GPSInfo] == {1: "N"}


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    text = (b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 24)))
    path = stored(tmp_path / "a.png", png_of(smooth().reshape(70, -1), 8, 2, 80, text))
    assert "too large" in refusal(lambda: Picture.read(path))


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


# ---- writing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(64, 90),
    width=st.integers(64, 90),
    channels=st.sampled_from([1, 3]),
    transparent=st.booleans(),
    profile=st.sampled_from([None, "rgb", "grey"]),
    tagged=st.booleans(),
    suffix=st.sampled_from([*OUTPUTS, ".TIF", ".bmp"]),
    seed=st.integers(0, 9),
)
def test_what_is_written_reads_back_to_the_bit(
    height: int, width: int, channels: int, transparent: bool, profile: str | None, tagged: bool, suffix: str, seed: int
) -> None:
    alpha = noise(height, width, 1, seed + 1)[..., 0] // 86 * 127 if transparent else None  # 0, 127 or 254
    picture = Picture(
        noise(height, width, channels, seed),
        alpha,
        {None: None, "rgb": srgb_icc(), "grey": grey_icc() if channels == 1 else srgb_icc()}[profile],
        exif() if tagged else None,
        XMP.replace(b"Orientation", b"Make") if tagged else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        try:
            picture.write(path)
        except PictureError:
            assert list(Path(folder).iterdir()) == []
            bare = alpha is None and picture.icc is None and not tagged
            assert (suffix == ".bmp" and not bare) or (suffix == ".webp" and picture.icc == grey_icc())
            return
        again = Picture.read(path)
        assert [path] == list(Path(folder).iterdir())
    assert linf(again, picture) == 0 and again.notes == ()
    assert np.array_equal(again.alpha, alpha) if transparent else again.alpha is None
    assert (again.icc, again.xmp) == (picture.icc, picture.xmp)
    assert tags_of(again.exif) == tags_of(picture.exif)
    assert suffix == ".TIF" or suffix == ".tiff" or again.exif == picture.exif


def test_tiff_is_compressed_unless_exif_nests(tmp_path: Path) -> None:
    flat = Picture(np.zeros((64, 64, 1), np.uint8))
    flat.write(tmp_path / "a.tiff")
    assert (tmp_path / "a.tiff").stat().st_size < 64 * 64


def test_a_tag_that_tiff_cannot_hold_is_said(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.XResolution] = TiffImagePlugin.IFDRational(0, 0)
    assert "use .png" in refusal(lambda: Picture(noise(), exif=tags.tobytes()).write(tmp_path / "a.tiff"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".gif", ".avif", ""])
def test_lossy_or_unknown_outputs_are_refused(suffix: str, tmp_path: Path) -> None:
    sentence = refusal(lambda: Picture(noise()).write(tmp_path / f"a{suffix}"))
    assert ("17/255" in sentence) == (suffix.lower() in (".jpg", ".jpeg")) and "use .png, .webp or .tiff" in sentence


def test_limits_of_the_formats_are_said(tmp_path: Path) -> None:
    long = Picture(np.zeros((64, 16384, 1), np.uint8))
    assert "16383" in refusal(lambda: long.write(tmp_path / "a.webp"))
    long.with_pixels(long.pixels).write(tmp_path / "a.png")
    heavy = Picture(noise(), icc=srgb_icc() + bytes(1 << 20))
    assert "ICC" in refusal(lambda: heavy.write(tmp_path / "b.png"))
    assert "alpha" in refusal(lambda: Picture(noise(), noise()[..., 0]).write(tmp_path / "c.bmp"))
    grey = Picture(noise(channels=1), icc=grey_icc())
    assert "grey" in refusal(lambda: grey.write(tmp_path / "d.webp"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Picture(noise()).write(path)
    before = path.read_bytes()
    other = Picture(noise(seed=1))
    assert "existing" in refusal(lambda: other.write(path)) and path.read_bytes() == before
    other.write(path, overwrite=True)
    assert linf(Picture.read(path), other) == 0


def test_the_source_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", RGB)
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    os.link(path, tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    picture = Picture.read("a.png")
    for name in ("a.png", "./a.png", str(path), "link.png", "hard.png"):
        assert "own" in refusal(lambda name=name: picture.write(name, overwrite=True))
    assert path.read_bytes() == before and (tmp_path / "link.png").is_symlink()


@pytest.mark.parametrize("suffix", [*OUTPUTS, ".bmp"])
def test_a_full_disk_is_said_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """The kernel's own short writes: no file of this process may grow past 4 kB for the moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        sentence = refusal(lambda: Picture(noise(200, 200)).write(tmp_path / f"a{suffix}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "room" in sentence and list(tmp_path.iterdir()) == []


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Picture(noise()).write(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refusal(lambda: Picture(noise(seed=1)).write(path, overwrite=True))
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half a picture")
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Picture(noise()).write(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    assert "No such file" in refusal(lambda: Picture(noise()).write(tmp_path / "missing" / "a.png"))
    (tmp_path / "folder.png").mkdir()
    assert "directory" in refusal(lambda: Picture(noise()).write(tmp_path / "folder.png"))
    assert "directory" in refusal(lambda: Picture(noise()).write(tmp_path / "folder.png", overwrite=True))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_picture_gives_the_same_bytes_and_usual_rights(tmp_path: Path) -> None:
    picture = Picture(noise(), icc=srgb_icc(), exif=exif(), xmp=XMP)
    (tmp_path / "probe").touch()
    for suffix in OUTPUTS:
        picture.write(tmp_path / f"a{suffix}")
        picture.write(tmp_path / f"b{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "probe").stat().st_mode


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_tensor_holds_every_level_exactly(channels: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    picture = Picture(levels)
    x = picture.tensor()
    assert x.shape == (1, channels, 16, 16) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x.mul(255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(levels))
    x.zero_()
    assert picture.pixels.max() == 255, "a tensor shares no memory with its picture"


def test_pixels_of_another_shape_or_type_are_refused() -> None:
    picture = Picture(noise(), noise()[..., 0], xmp=XMP)
    kept = picture.with_pixels(noise(seed=1))
    assert kept.alpha is picture.alpha and kept.xmp == XMP and linf(kept, Picture(noise(seed=1))) == 0
    for wrong in (noise(71), noise(channels=1), noise().astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            picture.with_pixels(wrong)
    for shape in ((70, 80), (70, 80, 4)):
        with pytest.raises(ValueError, match="expected"):
            Picture(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="alpha"):
        Picture(noise(), noise(60)[..., 0])


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2))
def test_linf_is_the_largest_gap_in_either_direction(low: int, high: int, channel: int) -> None:
    a, b = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8, 3), 7, np.uint8)
    a[3, 4, channel], b[3, 4, channel] = low, high
    assert linf(Picture(a), Picture(b)) == linf(Picture(b), Picture(a)) == abs(low - high)


def test_linf_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="expected pictures of one shape"):
        linf(Picture(noise()), Picture(noise(channels=1)))
