"""JPEG, which moves pixels: with a bound of its own, larger than the budget and stated."""

from pathlib import Path
from typing import Any

from PIL import Image

from antidiffusion.pictures.colour import icc_space
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.picture import Picture

SUFFIXES = (".jpg", ".jpeg")
QUALITIES = range(80, 101)


def expect_jpeg(picture: Picture, path: Path) -> None:
    """Raise PictureError if a JPEG cannot hold a picture."""
    height, width, _ = picture.pixels.shape
    if picture.alpha is not None:
        raise PictureError(f"{path}: expected an opaque picture for JPEG, got one with alpha; use --format png")
    if max(height, width) > 65_535:  # 16 bits in the frame's header
        raise PictureError(
            f"{path}: expected at most 65535 px a side for JPEG, got {width} x {height}; use --format png"
        )


def write_jpeg(picture: Picture, path: Path, quality: int) -> int:
    """Write a picture as JPEG with every colour at full size, and return how far that may move a pixel, in 1/255.

    A coefficient is rounded by up to half a quantisation step, and 64 of three components add up in a pixel, mostly
    against each other: twice the largest step of the file, and six levels for the conversion of the colours and the
    rounding at the end. What a file really moves is measured; one that moves more is refused.

    Arguments:
        picture: Pixels and metadata.
        path: File to write.
        quality: Of libjpeg, in QUALITIES.

    Raises:
        PictureError: If a JPEG cannot hold the picture.
        ValueError: If the quality is out of range.
    """
    if quality not in QUALITIES:
        raise ValueError(f"expected a JPEG quality from 80 to 100, got {quality}; try 95")
    expect_jpeg(picture, path)
    exif = picture.metadata.exif(nested=True, dpi=False)
    beside: dict[str, Any] = {"icc_profile": picture.icc, "xmp": picture.metadata.xmp(), "dpi": picture.metadata.dpi}
    beside["exif"] = exif.tobytes() if len(exif) else None
    kept = {name: value for name, value in beside.items() if value is not None}
    grey = picture.pixels.shape[2] == 1
    image = Image.fromarray(picture.pixels[..., 0] if grey else picture.pixels)
    if grey and icc_space(picture.icc) == "RGB":
        image = image.convert("RGB")
    try:
        image.save(path, "JPEG", quality=quality, subsampling=0, **kept)
    except ValueError as error:  # a block longer than its segment can say
        raise PictureError(f"{path}: expected metadata that JPEG can hold, got {error}; use --format png") from error
    with Image.open(path) as written:
        tables = written.quantization  # type: ignore[attr-defined]
    return 6 + 2 * max(max(table) for table in tables.values())
