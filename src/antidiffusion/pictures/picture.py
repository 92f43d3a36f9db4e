"""A picture file as upright 8-bit pixels, with what travels beside them, and back without losing a bit."""

import os
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

import numpy as np
from PIL import Image, PngImagePlugin

from antidiffusion.pictures.colour import icc_space
from antidiffusion.pictures.decode import MAX_PIXELS, MIN_SIDE, Bytes, decode
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.files import atomic, expect_new
from antidiffusion.pictures.metadata import Metadata

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "READABLE",
    "WRITERS",
    "Bytes",
    "Picture",
    "PictureError",
    "check_writable",
    "linf",
]

READABLE = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"})
READABLE |= {".heic", ".heif"}
WRITERS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
WEBP_MAX_SIDE = 16383  # 14 bits in the VP8L header
PNG_MAX_ICC = PngImagePlugin.MAX_TEXT_CHUNK  # Pillow reads no longer profile back from a PNG
PNG_LEVEL = 1  # at 12 megapixels five times as fast as Pillow's 6 for a fifth more bytes
XMP_TAG = 700
MAX_STREAM = 1 << 30  # bytes


@dataclass(frozen=True, eq=False)
class Picture:
    """Upright 8-bit pixels and what travels beside them.

    Arguments:
        pixels: (H, W, C) uint8, C = 3 (RGB) or 1 (grey, also when the file stores three equal channels, so that a
            black-and-white photo never gets coloured noise).
        alpha: (H, W) uint8, or None when the picture is opaque.
        icc: ICC profile of the pixels. A grey picture may carry an RGB profile: it is then written as RGB.
        metadata: Author, rights, date and the like: fields, never blocks.
        source: file the picture was read from; never written to.
        format: name of the format it was read from, as Pillow says it.
        notes: sentences about what reading lost.
    """

    pixels: Bytes
    alpha: Bytes | None = None
    icc: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
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
    def read(cls, file: str | os.PathLike[str] | BinaryIO, *, keep_location: bool = False) -> Self:
        """Read a still PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF, or a HEIC where pillow-heif is installed.

        Arguments:
            file: path or binary stream of MIN_SIDE pixels or more on each side and MAX_PIXELS in all; the content
                decides the format.
            keep_location: keep coordinates and names of places.

        Raises:
            PictureError: the file is missing, damaged, animated, too small, too large, or of a kind that is not read.
        """
        path = Path(file) if isinstance(file, str | os.PathLike) else None
        name: Any = path or getattr(file, "name", "the stream")
        try:
            if path is None:
                content = cast(BinaryIO, file).read(MAX_STREAM + 1)
                if len(content) > MAX_STREAM:
                    raise PictureError("expected at most 1 GiB, got more; name a file instead")
                if not content:
                    raise PictureError("expected a picture, got an empty stream; check what writes to it")
                return cls._of(BytesIO(content), None, keep_location)
            if not path.is_file():
                got = "a folder" if path.is_dir() else "something else" if path.exists() else "no such file"
                raise PictureError(f"expected a picture file, got {got}; check the path")
            with path.open("rb") as opened:
                if not os.fstat(opened.fileno()).st_size:
                    raise PictureError("expected a picture file, got an empty one; copy it again from its origin")
                return cls._of(opened, path, keep_location)
        except PictureError as error:
            raise PictureError(f"{name}: {error}") from error.__cause__
        except OSError as error:
            got = error.strerror or str(error)
            said = f"expected a readable file, got {got!r}; check its name, its permissions and its disk"
            raise PictureError(f"{name}: {said}") from error

    @classmethod
    def _of(cls, file: BinaryIO, source: Path | None, keep_location: bool) -> Self:
        pixels, alpha, icc, metadata, name, notes = decode(file, keep_location=keep_location)
        return cls(pixels, alpha, icc, metadata, source, name, notes)

    def tensor(self) -> "torch.Tensor":
        """Return the pixels as (1, C, H, W) float32 in [0, 1]."""
        import torch  # here, so that files can be looked at without it

        return torch.from_numpy(self.pixels.transpose(2, 0, 1).copy())[None].float().div_(255)

    def with_pixels(self, pixels: Bytes) -> Self:
        """Return the same picture with other pixels, (H, W, C) uint8 of the same shape."""
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"expected pixels {self.pixels.shape}, got {pixels.shape}; keep the picture's size")
        return replace(self, pixels=pixels)

    def resized(self, side: int) -> Self:
        """Return the picture with its longer side shrunk to `side` pixels by Lanczos' filter; a smaller one as it is.

        Raises:
            PictureError: the shorter side would be below MIN_SIDE.
        """
        height, width, channels = self.pixels.shape
        if max(height, width) <= side:
            return self
        size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
        if min(size) < MIN_SIDE:
            got = f"{size[0]} x {size[1]}"
            raise PictureError(
                f"expected at least {MIN_SIDE} px on each side, got {got} after resizing; use a larger size"
            )
        small = np.atleast_3d(np.asarray(_image(self.pixels, self.alpha).resize(size, Image.Resampling.LANCZOS)))
        note = f"resized from {width} x {height} to {size[0]} x {size[1]}"
        alpha = None if self.alpha is None else small[..., channels].copy()
        pixels = np.ascontiguousarray(small[..., :channels])
        return replace(self, pixels=pixels, alpha=alpha, notes=(*self.notes, note))

    def write(
        self,
        file: str | os.PathLike[str] | BinaryIO,
        *,
        format: str | None = None,
        overwrite: bool = False,
        level: int = PNG_LEVEL,
    ) -> None:
        """Write the picture without losing a bit of pixels, alpha or ICC; all of the file or none of it.

        Arguments:
            file: path, whose suffix (.png, .webp, .tif, .tiff or .bmp) decides the format, or a binary stream.
            format: png, webp, tiff or bmp: needed for a stream.
            overwrite: replace an existing file, though never the one the picture was read from.
            level: of PNG's compression, 0 to 9.

        Raises:
            PictureError: the format cannot hold the picture, the file exists, or the disk refuses.
        """
        if not isinstance(file, str | os.PathLike):
            kind = self._kind("the stream", f".{format or ''}")
            buffer = BytesIO()
            self._save(buffer, kind, level)
            file.write(buffer.getbuffer())
            return
        path = Path(file)
        check_writable(self, path, overwrite=overwrite)
        with atomic(path, overwrite=overwrite) as (part,), part.open("xb+") as opened:
            self._save(opened, WRITERS[path.suffix.lower()], level)

    def _kind(self, name: str | Path, suffix: str) -> str:
        """Return Pillow's name of a suffix's format, or refuse what it cannot hold."""
        kind = WRITERS.get(suffix.lower())
        height, width, _ = self.pixels.shape
        lossless = "use .png, .webp or .tiff"
        if suffix.lower() in {".jpg", ".jpeg", ".jpe", ".jfif"}:
            got = "JPEG, which even at quality 95 moves pixels by up to 17/255 so that the budget could not be kept"
            raise PictureError(f"{name}: expected a lossless format, got {got}; {lossless}")
        if kind is None:
            raise PictureError(f"{name}: expected a lossless format, got {suffix.strip('.') or 'none'}; {lossless}")
        texts = self.metadata.texts or self.metadata.location
        beside = {"alpha": self.alpha is not None, "ICC": self.icc, "metadata": texts}
        if kind == "BMP" and any(beside.values()):
            got = ", ".join(name for name, value in beside.items() if value)
            raise PictureError(f"{name}: expected bare pixels for BMP, got {got} too; {lossless}")
        if kind == "WEBP" and max(height, width) > WEBP_MAX_SIDE:
            got = f"{width} x {height}"
            raise PictureError(f"{name}: expected at most {WEBP_MAX_SIDE} px a side for WebP, got {got}; use .png")
        if kind == "WEBP" and icc_space(self.icc) == "GRAY":
            raise PictureError(f"{name}: expected an RGB profile for WebP, got a grey one; use .png or .tiff")
        if kind == "PNG" and len(self.icc or b"") > PNG_MAX_ICC:
            got = f"{len(self.icc or b'')} bytes"
            raise PictureError(f"{name}: expected an ICC profile up to {PNG_MAX_ICC} bytes, got {got}; use .tiff")
        return kind

    def _save(self, file: BinaryIO, kind: str, level: int) -> None:
        """Encode into a file that can seek."""
        pixels, metadata = self.pixels, self.metadata
        if pixels.shape[2] == 1 and (kind == "WEBP" or icc_space(self.icc) == "RGB"):
            pixels = pixels.repeat(3, axis=2)
        exif, xmp = metadata.exif(nested=kind != "TIFF", dpi=kind == "WEBP"), metadata.xmp()
        block = exif.tobytes() if len(exif) else None
        options: dict[str, Any] = {"icc_profile": self.icc} if self.icc else {}
        if metadata.dpi and kind != "WEBP":
            options["dpi"] = metadata.dpi
        if kind == "PNG":
            text = PngImagePlugin.PngInfo()
            if xmp is not None:
                text.add_itxt("XML:com.adobe.xmp", xmp.decode())
            options |= {"exif": block, "pnginfo": text, "compress_level": level}
        elif kind == "WEBP":  # exact keeps the colours under full transparency
            options |= {"exif": block or b"", "xmp": xmp or b"", "lossless": True, "exact": True}
        elif kind == "TIFF":
            if xmp is not None:
                exif[XMP_TAG] = xmp
            options |= {"exif": exif, "compression": "tiff_adobe_deflate"}
        _image(pixels, self.alpha).save(file, format=kind, **options)


def check_writable(picture: Picture, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise PictureError if the picture could not be written there: known before any work.

    Arguments:
        picture: The untouched picture, whose size, alpha, profile and metadata the written one will have.
        path: Where `Picture.write` shall write.
        overwrite: As there.
    """
    path = Path(path)
    picture._kind(path, path.suffix)
    if picture.source is not None and _same(path, picture.source):
        raise PictureError(f"{path}: expected a new file, got the picture's own; choose another name")
    expect_new(path, overwrite=overwrite)


def linf(a: Picture, b: Picture) -> int:
    """Return the largest absolute difference over every channel of every pixel, in 8-bit levels (0 to 255)."""
    if a.pixels.shape != b.pixels.shape:
        raise ValueError(f"expected pictures of one shape, got {a.pixels.shape} and {b.pixels.shape}; match them first")
    gap = np.maximum(a.pixels, b.pixels)
    gap -= np.minimum(a.pixels, b.pixels)
    return int(gap.max(initial=0))


def _image(pixels: Bytes, alpha: Bytes | None) -> Image.Image:
    """Assemble Pillow's image."""
    if alpha is not None:
        pixels = np.dstack([pixels, alpha])
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _same(path: Path, source: Path) -> bool:
    if path.exists() and source.exists():
        return path.samefile(source)
    return path.resolve() == source.resolve()
