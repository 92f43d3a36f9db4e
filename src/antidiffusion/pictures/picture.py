"""A picture file as upright 8-bit pixels, with what travels beside them, and back without losing a bit."""

import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from antidiffusion.pictures.errors import PictureError as PictureError
from antidiffusion.pictures.files import atomic

Bytes = npt.NDArray[np.uint8]

MIN_SIDE = 64
MAX_PIXELS = 100_000_000
READABLE = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif"})

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
WRITERS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
WEBP_MAX_SIDE = 16383  # 14 bits in the VP8L header
PNG_MAX_ICC = PngImagePlugin.MAX_TEXT_CHUNK  # Pillow reads no longer profile back from a PNG

# EXIF is itself a TIFF directory. Into and out of a TIFF file go only tags that do not lay out its pixels: description,
# maker, model, resolution, software, date, artist, host, rating, copyright, Windows' five, EXIF and GPS (CIPA DC-008).
DESCRIPTIVE = {*range(270, 273), 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096)}
DESCRIPTIVE |= {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}
XMP_TAG = 700
PHOTOMETRIC_TAG, WHITE_IS_ZERO = 262, 0


@dataclass(frozen=True, eq=False)
class Picture:
    """Upright 8-bit pixels and the metadata of the file they came from.

    Arguments:
        pixels: (H, W, C) uint8, C = 3 (RGB) or 1 (grey, also when the file stores three equal channels, so that a
            black-and-white photo never gets coloured noise).
        alpha: (H, W) uint8, or None when the picture is opaque.
        icc: ICC profile of the pixels. A grey picture may carry an RGB profile: it is then written as RGB.
        exif: EXIF block with its "Exif" prefix, without orientation or thumbnail.
        xmp: XMP packet in UTF-8.
        source: file the picture was read from; never written to.
        format: name of the format it was read from, as Pillow says it.
        notes: sentences about what reading lost.
    """

    pixels: Bytes
    alpha: Bytes | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    source: Path | None = None
    format: str = "PNG"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if len(shape) != 3 or shape[2] not in (1, 3) or dtype != np.uint8:
            raise ValueError(f"expected uint8 pixels (H, W, 1 or 3), got {dtype} {shape}; convert them first")
        if self.alpha is not None and (self.alpha.shape != shape[:2] or self.alpha.dtype != np.uint8):
            got = f"{self.alpha.dtype} {self.alpha.shape}"
            raise ValueError(f"expected uint8 alpha {shape[:2]}, got {got}; give one value per pixel")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a still PNG, JPEG, WebP, TIFF, BMP or GIF.

        Arguments:
            path: file of MIN_SIDE pixels or more on each side and MAX_PIXELS in all; its content decides the format.

        Raises:
            PictureError: the file is missing, damaged, animated, too small or too large.
        """
        path = Path(path)
        try:
            if not path.is_file():
                got = "a folder" if path.is_dir() else "something else" if path.exists() else "no such file"
                raise PictureError(f"expected a picture file, got {got}; check the path")
            if not path.stat().st_size:
                raise PictureError("expected a picture file, got an empty one; copy it again from its origin")
            with _strict() as notes, Image.open(path, formats=FORMATS) as image:
                rawmode = _check_header(image, notes)
                image.load()
                exif = _exif(image, notes)
                ImageOps.exif_transpose(image, in_place=True)
                pixels, alpha, icc = _decode(image, rawmode, notes)
                xmp = _xmp(image, notes)
                name = "JPEG" if image.format == "MPO" else str(image.format)
        except PictureError as error:
            raise PictureError(f"{path}: {error}") from error.__cause__
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
            raise PictureError(f"{path}: {_sentence(error)}") from error
        return cls(pixels, alpha, icc, exif, xmp, path, name, tuple(dict.fromkeys(notes)))

    def tensor(self) -> torch.Tensor:
        """Return the pixels as (1, C, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self.pixels.transpose(2, 0, 1).copy())[None].float().div_(255)

    def with_pixels(self, pixels: Bytes) -> Self:
        """Return the same picture with other pixels, (H, W, C) uint8 of the same shape."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"expected pixels {self.pixels.shape}, got {pixels.shape}; keep the picture's size")
        return replace(self, pixels=pixels)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the picture without losing a bit of pixels, alpha, ICC, EXIF or XMP; all of the file or none of it.

        Arguments:
            path: output file; its suffix (.png, .webp, .tif, .tiff or .bmp) decides the format.
            overwrite: replace an existing file, though never the one the picture was read from.

        Raises:
            PictureError: the format cannot hold the picture, the file exists, or the disk refuses.
        """
        path = Path(path)
        options = self._options(path)
        if self.source is not None and _same(path, self.source):
            raise PictureError(f"{path}: expected a new file, got the picture's own; choose another name")
        with atomic(path, overwrite=overwrite) as (part,), part.open("xb+") as file:
            try:
                self._image(path).save(file, **options)
            except RuntimeError as error:  # libtiff refuses a tag
                raise PictureError(
                    f"{path}: expected EXIF that TIFF can hold, got {error}; use .png or .webp"
                ) from error

    def _image(self, path: Path) -> Image.Image:
        """Assemble the Pillow image that `path`'s format and the ICC profile ask for."""
        pixels = self.pixels
        if pixels.shape[2] == 1 and (WRITERS[path.suffix.lower()] == "WEBP" or _icc_space(self.icc) == "RGB"):
            pixels = pixels.repeat(3, axis=2)
        if self.alpha is not None:
            pixels = np.dstack([pixels, self.alpha])
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

    def _options(self, path: Path) -> dict[str, Any]:
        """Return Pillow's save options for the format of `path`, or refuse what it cannot hold."""
        kind = WRITERS.get(path.suffix.lower())
        height, width, _ = self.pixels.shape
        beside = {"alpha": self.alpha, "ICC": self.icc, "EXIF": self.exif, "XMP": self.xmp}
        kept = [name for name, value in beside.items() if value is not None]
        lossless = "use .png, .webp or .tiff"
        if path.suffix.lower() in {".jpg", ".jpeg", ".jpe", ".jfif"}:
            got = "JPEG, which even at quality 95 moves pixels by up to 17/255 so that the budget could not be kept"
            raise PictureError(f"{path}: expected a lossless format, got {got}; {lossless}")
        if kind is None:
            raise PictureError(f"{path}: expected a lossless format, got {path.suffix or 'no suffix'}; {lossless}")
        if kind == "BMP" and kept:
            raise PictureError(f"{path}: expected bare pixels for BMP, got {', '.join(kept)} too; {lossless}")
        if kind == "WEBP" and max(height, width) > WEBP_MAX_SIDE:
            got = f"{width} x {height}"
            raise PictureError(f"{path}: expected at most {WEBP_MAX_SIDE} px a side for WebP, got {got}; use .png")
        if kind == "WEBP" and _icc_space(self.icc) == "GRAY":
            raise PictureError(f"{path}: expected an RGB profile for WebP, got a grey one; use .png or .tiff")
        if kind == "PNG" and len(self.icc or b"") > PNG_MAX_ICC:
            got = f"{len(self.icc or b'')} bytes"
            raise PictureError(f"{path}: expected an ICC profile up to {PNG_MAX_ICC} bytes, got {got}; use .tiff")
        options: dict[str, Any] = {"format": kind, "icc_profile": self.icc}
        if kind == "PNG":
            text = PngImagePlugin.PngInfo()
            if self.xmp is not None:
                text.add_itxt("XML:com.adobe.xmp", self.xmp.decode())
            return {**options, "exif": self.exif, "pnginfo": text}
        if kind == "WEBP":  # exact keeps the colours under full transparency
            return {**options, "exif": self.exif or b"", "xmp": self.xmp or b"", "lossless": True, "exact": True}
        if kind == "TIFF":
            tags = Image.Exif()
            tags.load(self.exif or b"")
            _keep_descriptive(tags)
            nested = ExifTags.IFD.Exif in tags or ExifTags.IFD.GPSInfo in tags
            if self.xmp is not None:
                tags[XMP_TAG] = self.xmp
            # Pillow compresses through libtiff, which cannot nest the EXIF and GPS directories.
            return {**options, "exif": tags, "compression": "raw" if nested else "tiff_adobe_deflate"}
        return options


def linf(a: Picture, b: Picture) -> int:
    """Return the largest absolute difference over every channel of every pixel, in 8-bit levels (0 to 255)."""
    if a.pixels.shape != b.pixels.shape:
        raise ValueError(f"expected pictures of one shape, got {a.pixels.shape} and {b.pixels.shape}; match them first")
    gap = np.maximum(a.pixels, b.pixels)
    gap -= np.minimum(a.pixels, b.pixels)
    return int(gap.max(initial=0))


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
    notes += [f"Pillow warned: {warning.message}" for warning in caught if warning.category is UserWarning]


def _sentence(error: Exception) -> str:
    """Say what Pillow or the system raised as expected, got, remedy."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        got = f"{pixels[0]} pixels" if pixels else str(error)
        return f"expected at most {MAX_PIXELS // 10**6} megapixels, got {got}; scale it down"
    if isinstance(error, UnidentifiedImageError):
        return f"expected {', '.join(FORMATS)}, got no whole picture of these; convert it or copy it again"
    if isinstance(error, OSError) and error.strerror:
        return f"expected a readable file, got {error.strerror!r}; check its permissions and its disk"
    return f"expected a whole picture, got a damaged one ({error}); copy it again or save it anew in an editor"


def _check_header(image: ImageFile.ImageFile, notes: list[str]) -> str:
    """Refuse by the header alone, before a pixel is decoded; return Pillow's word for how the file lays one out."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise PictureError(f"expected at least {MIN_SIDE} px on each side, got {width} x {height}; use a larger one")
    if width * height > MAX_PIXELS:
        got = f"{width} x {height}"
        raise PictureError(f"expected at most {MAX_PIXELS // 10**6} megapixels, got {got}; scale it down")
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO":  # what most phones write: the photo, then a depth map, a gain map or a preview
        notes.append(f"only the first of the file's {frames} pictures was kept")
    elif frames > 1:
        raise PictureError(f"expected a still picture, got {frames} frames; save the frame you want as PNG")
    args = image.tile[0].args if image.tile else ""
    return str(args if isinstance(args, str) else args[0] if args else "")


def _decode(image: Image.Image, rawmode: str, notes: list[str]) -> tuple[Bytes, Bytes | None, bytes | None]:
    """Return pixels (H, W, C), alpha (H, W) or None, and the ICC profile that describes the pixels."""
    icc = image.info.get("icc_profile")
    if "icc_profile" in image.info and not icc:
        notes.append("a broken ICC profile was dropped")
    if image.mode.startswith("I"):
        pixels, alpha = _grey16(image, rawmode, notes)
    else:
        if ";16" in rawmode and not rawmode.startswith("BGR"):  # BGR;16 is five or six bits a channel
            notes.append("16 bits per channel were reduced to the upper 8")
            if image.info.pop("transparency", None):
                notes.append("a 16-bit transparent colour was dropped")
        if rawmode in ("L;2", "L;4") and "transparency" in image.info:  # Pillow scales the greys, not this one
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}[rawmode]
        if image.mode in ("CMYK", "LAB"):
            notes.append(f"{image.mode} was converted to sRGB")
            flat, icc = _to_srgb(image, icc, notes), _srgb_profile()
        elif image.mode == "F":
            raise PictureError("expected 8 or 16 bits per channel, got floating point; save it as a 16-bit PNG")
        else:
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            mode += "A" if image.has_transparency_data else ""
            flat = image if image.mode == mode else image.convert(mode)
        array = np.atleast_3d(np.asarray(flat))
        colours = array.shape[2] - 1 + array.shape[2] % 2
        pixels = np.ascontiguousarray(array[..., :colours])
        alpha = array[..., colours].copy() if colours < array.shape[2] else None
    if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1].copy()
    if alpha is not None and alpha.min() == 255:
        alpha = None
    if icc and _icc_space(icc) not in ("RGB", "GRAY" if pixels.shape[2] == 1 else "RGB"):
        icc = None
        notes.append("an ICC profile that is broken or does not describe these pixels was dropped")
    return pixels, alpha, icc or None


def _grey16(image: Image.Image, rawmode: str, notes: list[str]) -> tuple[Bytes, Bytes | None]:
    """Round 12 or 16 bits of grey to 8; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)
    top = 4095 if rawmode == "I;12" else 65535
    if values.min() < 0 or values.max() > top:
        raise PictureError("expected 8 or 16 bits per channel, got 32 or signed ones; save it as a 16-bit PNG")
    notes.append(f"{top.bit_length()} bits of grey were rounded to 8")
    grey = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO:  # Pillow inverts up to 8 bits only
        grey = 255 - grey
    clear = image.info.get("transparency")
    return grey[..., None], None if clear is None else np.where(values == clear, 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """Convert CMYK (through its profile when there is a valid one) or LAB to sRGB."""
    if image.mode == "CMYK" and icc and _icc_space(icc) == "CMYK":
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(icc)), ImageCms.createProfile("sRGB")
        intent, black = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        try:
            through = ImageCms.profileToProfile(image, source, srgb, intent, outputMode="RGB", flags=black)
            return cast(Image.Image, through)
        except ImageCms.PyCMSError:
            notes.append("a CMYK profile that cannot be applied was ignored")
    elif image.mode == "CMYK" and icc:
        notes.append("an ICC profile that is broken or does not describe CMYK was ignored")
    return image.convert("RGB")


def _icc_space(icc: bytes | None) -> str:
    """Return the colour space an ICC profile describes ("RGB", "GRAY", "CMYK" ...), "" for a broken one or none."""
    try:
        return str(ImageCms.ImageCmsProfile(BytesIO(icc)).profile.xcolor_space).strip() if icc else ""
    except (OSError, ImageCms.PyCMSError):
        return ""


def _srgb_profile() -> bytes:
    """Return an sRGB profile without its creation time (bytes 24 to 35 of the header): same input, same bytes."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """Return the EXIF block of a loaded image, upright and bare; drop from `image.info` one that cannot be parsed."""
    hexed = image.info.pop("Raw profile type exif", None)  # ImageMagick's text chunk, before PNG had eXIf
    try:
        if image.format == "TIFF":
            tags = image.getexif()
            _keep_descriptive(tags)
            return tags.tobytes() if len(tags) else None
        if hexed and "exif" not in image.info:
            image.info["exif"] = bytes.fromhex("".join(hexed.split("\n")[3:]))
        if not image.info.get("exif"):
            return None
        image.getexif()  # has the orientation, which leaves the block here
        block, had_thumbnail = _bare(image.info["exif"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exif = Image.Exif()
            exif.load(block)
            readable = exif.tobytes()
    except Exception:  # as many types as there are ways to be broken
        image.info.pop("exif", None)
        notes.append("a broken EXIF block was dropped")
        return None
    if had_thumbnail:
        notes.append("the EXIF thumbnail was left out, for it shows the unprotected photo")
    if caught:
        notes.append("damaged EXIF entries were left out")
    return readable if caught else block


def _bare(block: bytes) -> tuple[bytes, bool]:
    """Set the orientation to 1 and blank the thumbnail, in place: encoding anew would spoil accents and maker notes."""
    data = bytearray(block.removeprefix(b"Exif\0\0"))
    exif = Image.Exif()
    exif.load(bytes(data))
    thumbnail = exif.get_ifd(ExifTags.IFD.IFD1)
    order = "<" if data[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, first)
    end = first + 2 + 12 * count
    for entry in range(first + 2, end, 12):
        if struct.unpack_from(order + "H", data, entry)[0] == ExifTags.Base.Orientation:
            struct.pack_into(order + "HIHH", data, entry + 2, 3, 1, 1, 0)  # one SHORT, 1, and its padding
    if thumbnail:
        struct.pack_into(order + "I", data, end, 0)  # no second directory
        start = thumbnail.get(ExifTags.Base.JpegIFOffset, 0)
        stop = min(start + thumbnail.get(ExifTags.Base.JpegIFByteCount, 0), len(data))
        data[start:stop] = bytes(max(0, stop - start))
    return b"Exif\0\0" + bytes(data), bool(thumbnail)


def _keep_descriptive(tags: Image.Exif) -> None:
    """Leave in `tags` what a TIFF file may carry beside its pixels."""
    for tag, value in list(tags.items()):
        if tag not in DESCRIPTIVE:
            del tags[tag]
        elif isinstance(value, str):  # read as Latin-1, and written as ASCII with question marks if left so
            tags[tag] = value.encode("latin-1")
    # A pointer that Pillow's TIFF writer would copy as a number.
    tags.get_ifd(ExifTags.IFD.Exif).pop(ExifTags.IFD.Interop, None)


def _xmp(image: Image.Image, notes: list[str]) -> bytes | None:
    packet = image.info.get("xmp")
    if not packet:
        return None
    try:
        packet.decode("utf-8")
    except (AttributeError, UnicodeDecodeError):
        notes.append("an XMP packet that is not UTF-8 was dropped")
        return None
    return bytes(packet)


def _same(path: Path, source: Path) -> bool:
    if path.exists() and source.exists():
        return path.samefile(source)
    return path.resolve() == source.resolve()
