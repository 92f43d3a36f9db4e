"""From the bytes of a file to upright 8-bit pixels that are right, or to a sentence that says why not."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from antidiffusion.pictures.colour import (
    ADOBE_GAMMA,
    ADOBE_PRIMARIES,
    bare_profile,
    bmp_profile,
    coded_profile,
    icc_space,
    matrix_profile,
    media_properties,
    png_chunks,
    png_profile,
    srgb_profile,
)
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.metadata import COLOUR_SPACE, INTEROP_INDEX, Metadata, read_metadata
from antidiffusion.pictures.tiff import check_layout, is_inverted

Bytes = npt.NDArray[np.uint8]

MIN_SIDE = 64
MAX_PIXELS = 100_000_000
BAND = 256  # rows that are converted at a time
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
MEDIA = ("AVIF", "HEIF")
NEEDS_HEIF = (
    "install pillow-heif with pip install 'antidiffusion[heic]' (its own code is BSD-3-Clause, its wheels hold x265 "
    "under the GPL-2.0), or save it as JPEG"
)
RAW = "develop it in the camera maker's or a raw program and save a TIFF or PNG"
OTHERS = {  # how a file of another kind begins, what it is called, and what to do
    rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)": ("HEIC", NEEDS_HEIF),
    rb"....ftypcrx |II\*\0....CR|IIRO|IIU\0|FUJIFILMCCD-RAW|\0MRM|FOVb": ("a raw photo", RAW),
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": ("a film", "save the frame you want as PNG"),
    rb"II[*+]\0|MM\0[*+]": (
        "a TIFF that is damaged or has an uncommon layout",
        "save it anew as PNG or as plain RGB TIFF",
    ),
    rb"8BPS": ("a Photoshop document", "save it as TIFF or PNG"),
    rb"%PDF": ("a PDF", "save its page as PNG"),
    rb"\xff\x0a|\0\0\0\x0cJXL ": ("JPEG XL", "save it as PNG"),
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": ("JPEG 2000", "save it as PNG"),
    rb"\s*(<\?xml[^>]*>\s*)?<svg": ("a vector drawing", "save it as PNG"),
}


class Decoded(NamedTuple):
    """What a file shows: as the fields of `Picture`."""

    pixels: Bytes
    alpha: Bytes | None
    icc: bytes | None
    metadata: Metadata
    format: str
    notes: tuple[str, ...]


def decode(file: BinaryIO, *, keep_location: bool) -> Decoded:
    """Read the one still picture of a file.

    Raises:
        PictureError: If the file is damaged, animated, too small, too large, or holds what cannot be read surely.
    """
    try:
        with _strict() as notes, Image.open(file, formats=_formats()) as image:
            rawmode = _check_header(image, notes)
            said = _said_colours(image, file, notes)
            image.load()
            if _goes_on(file, str(image.format)):
                notes.append("what follows the picture in the file was left out")
            metadata = read_metadata(image, notes, keep_location=keep_location)
            if said is None and "icc_profile" not in image.info:
                said = _camera_profile(image)
            if said is not None:
                image.info["icc_profile"] = said
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
            pixels, alpha, icc = _pixels(image, rawmode, notes)
            pixels, alpha = _upright(pixels, turned), None if alpha is None else _upright(alpha, turned)
            name = "JPEG" if image.format == "MPO" else str(image.format)
    except PictureError:
        raise
    except MemoryError as error:
        raise PictureError("expected enough memory to decode it, got none left; scale it down first") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise PictureError(_sentence(error, file)) from error
    return Decoded(pixels, alpha, icc, metadata, name, tuple(dict.fromkeys(notes)))


@cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's names of what is read: with HEIF where pillow-heif is installed."""
    try:
        import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError:
        return FORMATS
    return (*FORMATS, "HEIF")


@contextmanager
def _strict() -> Iterator[list[str]]:
    """Hold Pillow to whole files whatever its global switch says, and turn its warnings into notes.

    Its warning about 90 megapixels is left out: MAX_PIXELS is checked instead. Its error at twice that size stays.
    """
    notes: list[str] = []
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield notes
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
            kinds = [warning for warning in caught if warning.category is UserWarning]
            notes += [f"Pillow warned: {warning.message}" for warning in kinds]


def _sentence(error: Exception, file: BinaryIO) -> str:
    """Say what Pillow or the system raised as expected, got, remedy."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        got = f"{pixels[0]} pixels" if pixels else str(error)
        return f"expected at most {MAX_PIXELS // 10**6} megapixels, got {got}; scale it down"
    if isinstance(error, UnidentifiedImageError):
        file.seek(0)
        start = file.read(512)
        for pattern, (kind, remedy) in OTHERS.items():
            if re.match(pattern, start, re.DOTALL):
                return f"expected {', '.join(FORMATS)}, got {kind}; {remedy}"
        return f"expected {', '.join(FORMATS)}, got no whole picture of these; convert it or copy it again"
    if isinstance(error, OSError) and error.strerror:
        return f"expected a readable file, got {error.strerror!r}; check its permissions and its disk"
    if "MAX_TEXT" in str(error):
        return "expected texts and profiles of at most 1 MB in a PNG, got larger ones; save it anew without them"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"expected a whole picture, got a damaged one ({said}); copy it again or save it anew in an editor"


def _check_header(image: ImageFile.ImageFile, notes: list[str]) -> str:
    """Refuse by the header alone, before a pixel is decoded; return Pillow's word for how the file lays one out."""
    width, height = image.size
    if image.format == "TIFF":
        check_layout(image, RAW, notes)
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"expected at least {MIN_SIDE} px on each side, got {width} x {height}; use a larger one")
    if width * height > MAX_PIXELS:
        got = f"{width} x {height}"
        raise PictureError(f"expected at most {MAX_PIXELS // 10**6} megapixels, got {got}; scale it down")
    frames = getattr(image, "n_frames", 1)
    if image.format in ("MPO", "HEIF") and frames > 1:  # most phones': the photo, then a depth map or a gain map
        notes.append(f"only the first of the file's {frames} pictures was kept")
    elif frames > 1:
        raise PictureError(f"expected a still picture, got {frames} frames; save the frame you want as PNG")
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        raise PictureError("expected Adobe's mark in a CMYK JPEG, got none, so ink may be 0 or 255; save it as TIFF")
    args = image.tile[0].args if image.tile else ""
    return str(args if isinstance(args, str) else args[0] if args else "")


def _said_colours(image: ImageFile.ImageFile, file: BinaryIO, notes: list[str]) -> bytes | None:
    """Return an ICC profile of what the file says of its colours in its format's own way."""
    if image.format == "PNG":
        chunks = png_chunks(file)
        said = png_profile(chunks, image.info.get("icc_profile"))
        if said is None and b"cICP" in chunks:  # sRGB, whatever an iCCP beside it says
            image.info.pop("icc_profile", None)
        return said
    if image.format == "BMP":
        return bmp_profile(file)
    if image.format in MEDIA:
        properties = media_properties(file)
        deep = any(kind == b"av1C" and len(content) > 2 and content[2] & 0x40 for kind, content in properties)
        if deep or image.info.get("bit_depth", 8) > 8:
            notes.append("more than 8 bits per channel were reduced to 8")
        coded = [content for kind, content in properties if kind == b"colr" and content[:4] == b"nclx"]
        if coded and len(coded[0]) >= 8 and not image.info.get("icc_profile"):
            return coded_profile(int.from_bytes(coded[0][4:6]), int.from_bytes(coded[0][6:8]))
    return None


def _camera_profile(image: ImageFile.ImageFile) -> bytes | None:
    """Return the profile of the space that cameras call uncalibrated with the index R03 (CIPA DC-008, annex A)."""
    tags = image.getexif()
    if tags.get_ifd(ExifTags.IFD.Exif).get(COLOUR_SPACE) not in (2, 0xFFFF) or image.mode not in ("RGB", "RGBA"):
        return None
    if "R03" not in str(tags.get_ifd(ExifTags.IFD.Interop).get(INTEROP_INDEX, "")):
        return None
    return matrix_profile(ADOBE_PRIMARIES, (ADOBE_GAMMA,), "compatible with Adobe RGB (1998)")


def _upright(values: Bytes, orientation: int) -> Bytes:
    """Turn and mirror the first two axes as EXIF says; Pillow's own way would encode the metadata anew."""
    if orientation in (3, 4, 6, 7):
        values = values[::-1]
    if orientation in (2, 3, 7, 8):
        values = values[:, ::-1]
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    return np.ascontiguousarray(values)


def _jpeg_end(data: bytes) -> int:
    """Return where a JPEG's last byte is, or the end of the data if it has none: its previews have ends, too."""
    at = 2
    while marker := re.compile(rb"\xff+([^\x00\xff])", re.DOTALL).search(data, at):
        kind, at = marker[1][0], marker.end()
        if kind == 0xD9:
            return at
        if not 0xD0 <= kind <= 0xD7 and kind != 1:  # these have no length
            at += int.from_bytes(data[at : at + 2])
    return len(data)


def _goes_on(file: BinaryIO, kind: str) -> bool:
    """Tell whether something follows the picture: a film, a sound, a second picture."""
    if file.closed:  # AVIF: read whole
        return False
    size = file.seek(0, os.SEEK_END)
    file.seek(0 if kind == "JPEG" else max(0, size - 4096))
    end = file.read().rstrip(b"\0")
    if kind == "JPEG":
        return _jpeg_end(end) < len(end)
    if kind == "PNG":
        return not end.endswith(b"IEND\xaeB`\x82")
    if kind == "WEBP":
        file.seek(4)
        return size > int.from_bytes(file.read(4), "little") + 9
    return False


def _pixels(image: Image.Image, rawmode: str, notes: list[str]) -> tuple[Bytes, Bytes | None, bytes | None]:
    """Return pixels (H, W, C), alpha (H, W) or None, and the ICC profile that describes the pixels."""
    icc = image.info.get("icc_profile")
    if "icc_profile" in image.info and not icc:
        notes.append("a broken ICC profile was dropped")
    if ";16" in rawmode and not image.mode.startswith("I") and not rawmode.startswith("BGR"):  # BGR;16 has 5 or 6 bits
        notes.append("16 bits per channel were reduced to the upper 8")
        if image.info.pop("transparency", None):
            notes.append("a 16-bit transparent colour was dropped")
    if rawmode in ("L;2", "L;4") and "transparency" in image.info:  # Pillow scales the greys, not this one
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[rawmode]
    if image.mode == "F":
        raise PictureError("expected 8 or 16 bits per channel, got floating point; save it as a 16-bit PNG")
    mode = "L" if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else "RGB"
    colours, mode = len(mode), mode + ("A" if image.has_transparency_data else "")
    width, height = image.size
    pixels = np.empty((height, width, colours), np.uint8)
    alpha = np.empty((height, width), np.uint8) if mode.endswith("A") else None
    grey = True
    for top in range(0, height, BAND):  # so that no copy at another type is as large as the picture
        band = image.crop((0, top, width, min(top + BAND, height)))
        if image.mode.startswith("I"):
            array = _grey16(band, rawmode, notes, inverted=is_inverted(image))
        elif image.mode == "CMYK":
            array = np.asarray(_to_srgb(band, icc, notes))
        else:
            array = np.atleast_3d(np.asarray(band if band.mode == mode else band.convert(mode)))
        pixels[top : top + BAND] = array[..., :colours]
        grey = grey and all(np.array_equal(array[..., 0], array[..., k]) for k in range(1, colours))
        if alpha is not None:
            alpha[top : top + BAND] = array[..., colours]
    if image.mode == "CMYK":
        notes.append("CMYK was converted to sRGB")
        icc = srgb_profile()
    if grey and colours == 3:
        pixels = pixels[..., :1].copy()
    if alpha is not None and alpha.min() == 255:
        alpha = None
        notes.append("an alpha channel that is opaque everywhere was dropped")
    return pixels, alpha, _checked_profile(icc, "GRAY" if pixels.shape[2] == 1 else "RGB", notes) if icc else None


def _checked_profile(icc: bytes, own: str, notes: list[str]) -> bytes | None:
    """Return the parts of a profile that describe colours, or None if it does not describe these pixels."""
    if icc_space(icc) not in ("RGB", own):
        notes.append("an ICC profile that is broken or does not describe these pixels was dropped")
        return None
    bare = bare_profile(icc)
    if bare is None:
        notes.append("an ICC profile that may hold a picture was dropped")
    elif bare != icc:
        notes.append("what does not describe colours was left out of the ICC profile")
    return bare


def _grey16(image: Image.Image, rawmode: str, notes: list[str], *, inverted: bool) -> Bytes:
    """Round 12 or 16 bits of grey to 8, `(H, W, 1)`, or 2 with alpha; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)
    top = 4095 if rawmode == "I;12" else 65535
    if values.min() < 0 or values.max() > top:
        raise PictureError("expected 8 or 16 bits per channel, got 32 or signed ones; save it as a 16-bit PNG")
    notes.append(f"{top.bit_length()} bits of grey were rounded to 8")
    grey = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    if inverted:  # Pillow inverts up to 8 bits only
        grey = 255 - grey
    clear = image.info.get("transparency")
    return grey[..., None] if clear is None else np.dstack([grey, np.where(values == clear, 0, 255).astype(np.uint8)])


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """Convert CMYK to sRGB, through its profile when there is a valid one."""
    if icc and icc_space(icc) == "CMYK":
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(icc)), ImageCms.createProfile("sRGB")
        intent, black = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        try:
            through: Any = ImageCms.profileToProfile(image, source, srgb, intent, outputMode="RGB", flags=black)
            return cast(Image.Image, through)
        except ImageCms.PyCMSError:
            notes.append("a CMYK profile that cannot be applied was ignored")
    elif icc:
        notes.append("an ICC profile that is broken or does not describe CMYK was ignored")
    else:
        notes.append("CMYK without a profile: each ink was taken for the absence of one light")
    return image.convert("RGB")
