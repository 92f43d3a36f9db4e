import base64
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import (
    exif,
    saved,
    smooth,
    srgb_icc,
    stored,
)
from PIL import ExifTags, Image, PngImagePlugin

from antidiffusion.pictures.metadata import NAMESPACES, RDF, Metadata
from antidiffusion.pictures.picture import Picture, linf

OUTPUTS = [".png", ".webp", ".tiff"]

RGB = Image.fromarray(smooth())


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


def xmp(*properties: str, attributes: str = "") -> bytes:
    spaces = "".join(f' xmlns:{prefix}="{space}"' for prefix, space in NAMESPACES.items())
    return (
        f'<?xpacket begin="\ufeff"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">'
        f'<rdf:Description rdf:about="" xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/"{spaces} {attributes}>'
        f"{''.join(properties)}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def iptc(**fields: bytes) -> bytes:
    """Photoshop's resources with one IPTC record in UTF-8, and a thumbnail."""
    record = b"\x1c\x01\x5a\0\3\x1b%G"
    for name, value in fields.items():
        record += struct.pack(">BBBH", 0x1C, 2, int(name[1:]), len(value)) + value
    resources = b"".join(
        b"8BIM" + struct.pack(">HHI", code, 0, len(data)) + data + bytes(len(data) % 2)
        for code, data in ((0x0404, record), (0x040C, PREVIEW))
    )
    return b"Photoshop 3.0\0" + resources


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    at = 4 + int.from_bytes(jpeg[4:6])  # behind JFIF
    return jpeg[:at] + b"".join(bytes([255, m]) + struct.pack(">H", len(d) + 2) + d for m, d in segments) + jpeg[at:]


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PREVIEW = encoded(RGB.resize((32, 24)))
TAGS = Image.Exif()
TAGS[ExifTags.Base.Make], TAGS[ExifTags.Base.Artist] = "Maker", "José".encode()
TAGS[ExifTags.Base.Copyright], TAGS[ExifTags.Base.ImageDescription] = b"Jos\xe9", "a picture"
TAGS[ExifTags.IFD.Exif] = {36867: "2020:01:02 03:04:05", 36881: "+01:00", 37500: b"MAKER\0" + PREVIEW, 33434: 0.02}
TAGS[ExifTags.IFD.GPSInfo] = {1: "N", 2: (47.0, 22.0, 36.8), 3: "W", 4: (8.0, 30.0, 0.0)}
HELD = {
    "author": ("José",),
    "copyright": ("José",),
    "description": ("a picture",),
    "date": ("2020-01-02T03:04:05+01:00",),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_fields_of_exif_are_kept_and_all_else_is_named(suffix: str, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags.load(TAGS.tobytes())
    tags[ExifTags.Base.Artist], tags[ExifTags.Base.Copyright] = "José".encode(), b"Jos\xe9"
    path = saved(tmp_path / f"a{suffix}", RGB, exif=tags)
    picture = Picture.read(path)
    assert picture.metadata.texts == HELD and picture.metadata.location is None
    assert picture.notes == ("left out of the metadata: the maker note, camera settings, the location",)
    located = Picture.read(path, keep_location=True)
    assert np.allclose(located.metadata.location or (), (47.3768889, -8.5), atol=1e-7)
    assert located.notes == ("left out of the metadata: the maker note, camera settings",)


def test_fields_of_xmp_come_first_in_every_form(tmp_path: Path) -> None:
    packet = xmp(
        "<dc:creator><rdf:Seq><rdf:li>One</rdf:li><rdf:li>Two</rdf:li></rdf:Seq></dc:creator>",
        '<dc:rights><rdf:Alt><rdf:li xml:lang="de">nein</rdf:li>',
        '<rdf:li xml:lang="x-default">no</rdf:li></rdf:Alt></dc:rights>',
        "<xmp:CreateDate>2021-05-06T07:08:09.55Z</xmp:CreateDate>",
        "<exif:GPSLatitude>47,22,36.8N</exif:GPSLatitude><exif:GPSLongitude>8,30.0W</exif:GPSLongitude>",
        attributes='photoshop:City="Zürich" photoshop:Headline="Head"',
    )
    path = saved(tmp_path / "a.jpg", RGB, exif=TAGS.tobytes(), xmp=packet)
    picture = Picture.read(path, keep_location=True)
    assert picture.metadata.texts == HELD | {
        "author": ("One", "Two"),
        "copyright": ("no",),
        "date": ("2021-05-06T07:08:09Z",),
        "headline": ("Head",),
        "city": ("Zürich",),
    }
    assert np.allclose(picture.metadata.location or (), (47.3768889, -8.5), atol=1e-7)
    assert "city" not in Picture.read(path).metadata.texts and "the location" in Picture.read(path).notes[0]


def test_iptc_and_png_text_are_read(tmp_path: Path) -> None:
    block = iptc(f80="Jörg".encode(), f25=b"one", f116=b"mine", f55=b"20200102", f60=b"030405+0100")
    picture = Picture.read(stored(tmp_path / "a.jpg", with_segments(encoded(RGB), (0xED, block))))
    assert picture.metadata.texts == {
        "author": ("Jörg",),
        "copyright": ("mine",),
        "keywords": ("one",),
        "date": ("2020-01-02T03:04:05+01:00",),
    }
    assert picture.notes == ("left out of the metadata: Photoshop resources",)
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Ana")
    text.add_text("parameters", "steps: 20")
    picture = Picture.read(saved(tmp_path / "a.png", RGB, pnginfo=text))
    assert picture.metadata.texts == {"author": ("Ana",)}
    assert picture.notes == ("left out of the metadata: other text",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "EXIF"])
def test_the_resolution_is_kept(kind: str) -> None:
    tags = Image.Exif()
    tags[282], tags[283], tags[296] = 118.11, 118.11, 3  # an inch has 2.54 cm
    options: dict[str, Any] = {"exif": tags} if kind == "EXIF" else {"dpi": (300, 300)}
    content = encoded(RGB, "WEBP" if kind == "EXIF" else kind, **options)
    assert Picture.read(BytesIO(content)).metadata.dpi == (300.0, 300.0)
    plain = encoded(RGB, "WEBP" if kind == "EXIF" else kind)
    assert Picture.read(BytesIO(plain)).metadata.dpi == (
        (96.0, 96.0) if kind == "BMP" else None
    )  # BMP always states it


def test_broken_blocks_are_dropped_with_a_note(tmp_path: Path) -> None:
    broken: dict[str, dict[str, Any]] = {
        "EXIF block": {"exif": b"Exif\0\0rubbish" * 9},
        "XMP packet": {"xmp": b"\xff\xfe\xfd"},
        "XMP packet ": {"xmp": b"<x:xmpmeta>"},
        "XMP packet  ": {"xmp": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'},
    }
    for name, options in broken.items():
        picture = Picture.read(saved(tmp_path / "a.jpg", RGB, **options))
        assert picture.metadata == Metadata() and picture.notes == (f"a broken {name.strip()} was dropped",)


def uncompressed_thumbnail() -> bytes:
    """EXIF whose second directory holds raw pixels."""
    pixels = RGB.resize((32, 24)).tobytes()
    fields = [(256, 32), (257, 24), (259, 1), (262, 2), (273, 8 + 6 + 6 + 2 + 12 * 8 + 4), (277, 3), (278, 24)]
    fields.append((279, len(pixels)))
    second = struct.pack("<H", 8) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<IHI", 8, 0, 14) + second + pixels


def hidden() -> dict[str, bytes]:
    """Files with a preview of the photo in every place that is known to hold one, and in some that could."""
    packed = base64.b64encode(PREVIEW).decode()
    lines = "\n".join(packed[at : at + 76] for at in range(0, len(packed), 76))
    thumbnail = (
        f"<xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:image>{packed}</xmpGImg:image></rdf:li></rdf:Alt></xmp:Thumbnails>"
    )
    jpeg, description = encoded(RGB), Image.Exif()
    description[ExifTags.Base.ImageDescription] = packed
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", PREVIEW.hex())
    text.add(b"prVw", PREVIEW)
    profile = srgb_icc()
    profile = struct.pack(">I", len(profile) + len(PREVIEW)) + profile[4:] + PREVIEW
    return {
        "thumbnail": encoded(RGB, exif=exif(6, PREVIEW)),
        "uncompressed thumbnail": encoded(RGB, exif=uncompressed_thumbnail()),
        "maker note": encoded(RGB, exif=TAGS.tobytes()),
        "Photoshop": with_segments(jpeg, (0xED, iptc(f80=packed.encode()))),
        "XMP": encoded(RGB, xmp=xmp(thumbnail)),
        "XMP in lines": encoded(RGB, xmp=xmp(f"<dc:description>{lines}</dc:description>")),
        "XMP in JPEG XL": encoded(RGB, xmp=xmp(f"<photoshop:Credit>{packed[:3990]}</photoshop:Credit>")),
        "description": encoded(RGB, exif=description),
        "other segments": with_segments(jpeg, (0xE5, PREVIEW), (0xEB, PREVIEW), (0xFE, PREVIEW)),
        "behind the end": jpeg + PREVIEW,
        "PNG": encoded(RGB, "PNG", pnginfo=text) + PREVIEW,
        "WebP": encoded(RGB, "WEBP", exif=TAGS.tobytes(), xmp=xmp(thumbnail)) + PREVIEW,
        "TIFF": encoded(RGB, "TIFF", tiffinfo={34377: iptc(f25=b"x")[14:], 37724: PREVIEW, 700: xmp(thumbnail)}),
        "two pictures": encoded(RGB, "MPO", save_all=True, append_images=[RGB.resize((32, 24))]),
        "profile": encoded(RGB, icc_profile=profile),
    }


def pictures_inside(content: bytes) -> int:
    """Count the places where a picture begins, raw or in base64 or hexadecimal digits, that Pillow can decode."""
    packed = re.sub(rb"\s", b"", content)
    blobs = [content]
    for run in re.findall(rb"[A-Za-z0-9+/]{64,}", packed):
        blobs += [base64.b64decode(run[start : start + (len(run) - start) // 4 * 4]) for start in range(4)]
    for run in re.findall(rb"[0-9a-fA-F]{64,}", packed):
        blobs += [bytes.fromhex(run[start : start + (len(run) - start) // 2 * 2].decode()) for start in (0, 1)]
    count = 0
    for blob in blobs:
        for found in re.finditer(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|II\*\0|MM\0\*|GIF8|BM|....ftyp", blob, re.DOTALL):
            try:  # base64's last group may lack the last two bytes
                with Image.open(BytesIO(blob[found.start() :] + b"\xff\xd9")) as image:
                    image.load()
                    count += 1
            except (OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
                continue
    return count


@pytest.mark.parametrize("place", hidden())
def test_no_picture_is_inside_a_written_one(place: str) -> None:
    content = hidden()[place]
    if place not in ("uncompressed thumbnail", "Photoshop", "XMP in JPEG XL"):
        assert pictures_inside(content) > 1, "the test would find it"
    picture = Picture.read(BytesIO(content), keep_location=True)
    assert picture.notes, "what is not carried is said"
    raw = RGB.resize((32, 24)).tobytes()[:96]
    for kind in ("png", "webp", "tiff", "bmp"):
        plain = kind == "bmp" or (kind, picture.icc) == ("webp", None)
        stream = BytesIO()
        (replace(picture, metadata=Metadata(), icc=None) if plain else picture).write(stream, format=kind)
        assert pictures_inside(stream.getvalue()) == 1
        assert raw not in stream.getvalue() and PREVIEW[20:60] not in stream.getvalue()


def test_a_mark_of_our_own_is_read_back() -> None:
    marked = Metadata().with_text("protected_by", "antidiffusion 0.1.0")
    for kind in ("png", "webp", "tiff"):
        stream = BytesIO()
        Picture(smooth(), metadata=marked).write(stream, format=kind)
        assert Picture.read(BytesIO(stream.getvalue())).metadata == marked
