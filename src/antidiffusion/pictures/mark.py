"""The mark by which this package knows its own pictures: the EXIF field Software (CIPA DC-008)."""

from dataclasses import replace

from PIL import ExifTags, Image

from antidiffusion import __version__
from antidiffusion.pictures.picture import Picture

NAME = "antidiffusion"
TEXTS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


def marked(picture: Picture) -> Picture:
    """Return the picture with this package and its version as the software that made it."""
    exif = Image.Exif()
    if picture.exif:
        exif.load(picture.exif)
    for tags in (exif, *(exif.get_ifd(tag) for tag in TEXTS if tag in exif)):
        for tag, value in list(tags.items()):
            if isinstance(value, str):  # read as Latin-1, and written as ASCII with question marks if left so
                tags[tag] = value.encode("latin-1")
    exif[ExifTags.Base.Software] = f"{NAME} {__version__}"
    return replace(picture, exif=exif.tobytes())


def is_marked(picture: Picture) -> bool:
    """Tell whether this package made the file that a picture was read from."""
    exif = Image.Exif()
    if picture.exif:
        exif.load(picture.exif)
    return str(exif.get(ExifTags.Base.Software, "")).startswith(f"{NAME} ")
