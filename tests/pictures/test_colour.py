import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from picture_files import exif, icc, png_of, refusal, smooth, srgb_icc
from PIL import Image, ImageCms, PngImagePlugin

from antidiffusion.pictures.colour import CURVES, PRIMARIES, bare_profile, matrix_profile
from antidiffusion.pictures.picture import Picture

P3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def coloured(*chunks: tuple[bytes, bytes]) -> Picture:
    return Picture.read(BytesIO(png_of(smooth().reshape(70, -1), 8, 2, 80, *chunks)))


def in_srgb(profile: bytes, colour: tuple[int, int, int]) -> tuple[int, ...]:
    """What a colour-managed viewer shows."""
    source, target = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
    shown: Any = ImageCms.profileToProfile(Image.new("RGB", (1, 1), colour), source, target, outputMode="RGB")
    return shown.getpixel((0, 0))


def computed(primaries: int, curve: tuple[float, ...], colour: tuple[int, int, int]) -> np.ndarray:
    """The same from the definitions, for spaces with sRGB's white."""

    def to_xyz(number: int) -> np.ndarray:
        white, *corners = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in PRIMARIES[number])
        columns = np.stack(corners, 1)
        return columns * np.linalg.solve(columns, white)

    value = np.array(colour) / 255
    g, a, b, c, d = curve if len(curve) == 5 else (curve[0], 1, 0, 0, 0)
    light = np.where(value >= d, (a * value + b) ** g, c * value)
    linear = np.clip(np.linalg.solve(to_xyz(1), to_xyz(primaries) @ light), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("primaries", [1, 5, 6, 9, 12])
@pytest.mark.parametrize("transfer", CURVES)
def test_a_profile_means_its_numbers(primaries: int, transfer: int) -> None:
    profile = matrix_profile(PRIMARIES[primaries], CURVES[transfer], "test")
    for colour in ((128, 128, 128), (200, 90, 60), (40, 60, 90)):
        assert np.abs(in_srgb(profile, colour) - computed(primaries, CURVES[transfer], colour)).max() < 2.5


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ([(b"gAMA", struct.pack(">I", 100000))], computed(1, (1.0,), (120, 60, 30))),
        ([(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", P3)], computed(12, CURVES[13], (120, 60, 30))),
        ([(b"cICP", bytes([12, 13, 0, 1]))], computed(12, CURVES[13], (120, 60, 30))),
        ([(b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0")], computed(12, CURVES[13], (120, 60, 30))),
    ],
)
def test_what_a_png_says_of_its_colours_becomes_a_profile(chunks: list[tuple[bytes, bytes]], shown: np.ndarray) -> None:
    picture = coloured(*chunks)
    assert np.array_equal(picture.pixels, smooth()) and picture.icc
    assert np.abs(in_srgb(picture.icc, (120, 60, 30)) - shown).max() < 2.5
    for kind in ("png", "webp", "tiff"):
        stream = BytesIO()
        picture.write(stream, format=kind)
        assert Picture.read(BytesIO(stream.getvalue())).icc == picture.icc


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", SRGB)],
        [(b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")],
        [(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100000))],
        [(b"gAMA", bytes(4)), (b"cHRM", bytes(32))],
        [(b"cHRM", struct.pack(">8I", *[30000] * 8))],
    ],
)
def test_srgb_and_nonsense_need_no_profile(chunks: list[tuple[bytes, bytes]]) -> None:
    assert coloured(*chunks).icc is None


def test_high_dynamic_range_and_video_levels_are_refused() -> None:
    for numbers, word in (
        ((9, 16, 0, 1), "PQ"),
        ((9, 18, 0, 1), "HLG"),
        ((1, 1, 1, 0), "video"),
        ((77, 1, 0, 1), "77"),
    ):
        assert word in refusal(lambda numbers=numbers: coloured((b"cICP", bytes(numbers))))


def test_a_cameras_mark_becomes_a_profile() -> None:
    tags = Image.Exif()
    tags.load(exif())
    tags[34665] = {40961: 65535, 40965: {1: "R03"}}
    buffer = BytesIO()
    Image.fromarray(smooth()).save(buffer, "JPEG", exif=tags)
    profile = Picture.read(BytesIO(buffer.getvalue())).icc
    assert profile and in_srgb(profile, (100, 100, 100)) == pytest.approx((100, 100, 100), abs=2)
    assert in_srgb(profile, (60, 200, 60))[0] == 0, "a green that sRGB lacks"


def test_a_profile_keeps_colours_only() -> None:
    plain = srgb_icc()
    assert bare_profile(plain) == plain
    longer = struct.pack(">I", 1 << 20) + plain[4:] + bytes((1 << 20) - len(plain))
    bare = bare_profile(longer)
    assert bare and len(bare) <= len(plain) and in_srgb(bare, (10, 200, 90)) == in_srgb(plain, (10, 200, 90))
    count = struct.unpack_from(">I", plain, 128)[0]
    tags = {plain[at : at + 4]: at for at in range(132, 132 + 12 * count, 12)}
    places = {name: struct.unpack_from(">II", plain, at + 4) for name, at in tags.items()}
    parts = {name: plain[start : start + size] for name, (start, size) in places.items()}
    private = icc(b"RGB ", parts | {b"prvt": b"data\0\0\0\0a look at a screen"})
    bare = bare_profile(private)
    assert bare and b"a look" not in bare and in_srgb(bare, (10, 200, 90)) == in_srgb(plain, (10, 200, 90))
    assert bare_profile(icc(b"RGB ", parts | {b"desc": b"desc\0\0\0\0\xff\xd8\xff\xe0"})) is None


def test_a_profile_inside_a_bmp_is_found() -> None:
    head = struct.pack("<IiiHHIIiiII", 124, 80, 70, 1, 24, 0, 240 * 70, 2835, 2835, 0, 0)
    head += bytes(16) + b"DEBM" + bytes(48) + struct.pack("<IIII", 4, 124 + 240 * 70, len(srgb_icc()), 0)
    rows = smooth()[::-1, :, ::-1].tobytes()
    content = b"BM" + struct.pack("<IHHI", 138 + len(rows) + len(srgb_icc()), 0, 0, 138) + head + rows + srgb_icc()
    picture = Picture.read(BytesIO(content))
    assert np.array_equal(picture.pixels, smooth()) and picture.icc == srgb_icc()


def test_avif_is_read_with_its_colours() -> None:
    buffer = BytesIO()
    Image.fromarray(smooth()).save(buffer, "AVIF", quality=100, subsampling="4:4:4", speed=9)
    content = buffer.getvalue()
    picture = Picture.read(BytesIO(content))
    assert np.abs(picture.pixels.astype(int) - smooth()).max() <= 4 and picture.icc is None
    at = content.index(b"colrnclx") + 8
    p3 = content[:at] + struct.pack(">HH", 12, 13) + content[at + 4 :]
    assert in_srgb(Picture.read(BytesIO(p3)).icc or b"", (200, 90, 60)) != (200, 90, 60)
    assert "PQ" in refusal(lambda: Picture.read(BytesIO(content[:at] + struct.pack(">HH", 9, 16) + content[at + 4 :])))


def test_heic_is_read_where_its_library_is_and_else_named(monkeypatch: pytest.MonkeyPatch) -> None:
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    with monkeypatch.context() as patch:
        patch.setattr("antidiffusion.pictures.decode._formats", lambda: ("PNG", "JPEG"))
        assert "antidiffusion[heic]" in refusal(lambda: Picture.read(BytesIO(start)))
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    buffer = BytesIO()
    Image.fromarray(smooth()).save(buffer, "HEIF", quality=100)
    picture = Picture.read(BytesIO(buffer.getvalue()))
    assert picture.format == "HEIF" and np.abs(picture.pixels.astype(int) - smooth()).max() < 40


def test_a_large_profile_in_a_png_is_said() -> None:
    info = PngImagePlugin.PngInfo()
    buffer = BytesIO()
    noise = np.random.default_rng(0).bytes(1_300_000)
    Image.fromarray(smooth()).save(buffer, "PNG", icc_profile=srgb_icc() + noise, pnginfo=info)
    assert "1 MB" in refusal(lambda: Picture.read(BytesIO(buffer.getvalue())))
