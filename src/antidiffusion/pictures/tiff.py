"""Which of TIFF's layouts are read: those of which a second reader says the same (tests/pictures/test_tiff.py).

Pillow reads some others wrongly and in silence: planes of grey, big-endian floats, PackBits with a predictor. The tags
are those of TIFF 6.0 (1992) and of DNG 1.7 (2023).
"""

from typing import Any

from PIL import Image

from antidiffusion.pictures.errors import PictureError

SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 254, 258, 259, 262, 277, 284
PREDICTOR, SUB_DIRECTORIES, EXTRA, SAMPLE_FORMAT, DNG_VERSION = 317, 330, 338, 339, 50706
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6
MOSAIC, LINEAR_RAW = 32803, 34892
JPEG, PREDICTED = 7, (5, 8, 32946)  # LZW and both numbers of Deflate
COMPRESSIONS = (1, 2, 3, 4, JPEG, *PREDICTED, 32773, 50000)  # and none, fax, PackBits, Zstandard
DEEPEST = 16
REDUCED = 1  # bit of SUBFILE
UNSPECIFIED, PREMULTIPLIED = 0, 1  # of EXTRA
KINDS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3}  # colour samples


def check_layout(image: Image.Image, raw_remedy: str, notes: list[str]) -> None:
    """Raise PictureError unless the first directory is a whole photo in a layout that is read surely."""
    tags: Any = getattr(image, "tag_v2", {})

    def numbers(tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        value = tags.get(tag, default)
        return tuple(value) if isinstance(value, tuple) else (value,)

    (photometric,), (samples,) = numbers(PHOTOMETRIC, (-1,)), numbers(SAMPLES, (1,))
    (compression,), (planar,), (predictor,) = (
        numbers(COMPRESSION, (1,)),
        numbers(PLANAR, (1,)),
        numbers(PREDICTOR, (1,)),
    )
    bits, formats, extra = numbers(BITS, (1,)), numbers(SAMPLE_FORMAT, (1,)), numbers(EXTRA, ())
    reduced = numbers(SUBFILE, (0,))[0] & REDUCED
    if DNG_VERSION in tags or photometric in (MOSAIC, LINEAR_RAW) or (reduced and SUB_DIRECTORIES in tags):
        raise PictureError(f"expected a finished photo, got a raw one whose first picture is a preview; {raw_remedy}")
    if reduced:
        raise PictureError("expected a photo, got a TIFF that says it is a smaller version; save the photo alone")
    if set(formats) != {1} or max(bits) > DEEPEST:
        raise PictureError(
            "expected 8 or 16 bits per channel, got more, or signed or float ones; save it as a 16-bit PNG"
        )
    wrong = None
    if photometric not in KINDS or samples not in (KINDS[photometric], KINDS[photometric] + 1):
        wrong = f"{samples} samples of photometric interpretation {photometric}"
    elif compression not in COMPRESSIONS:
        wrong = f"compression {compression}"
    elif planar != 1 and samples > 1:
        wrong = "one plane a channel"
    elif len(set(bits)) > 1:
        wrong = f"channels of {', '.join(map(str, bits))} bits"
    elif predictor != 1 and compression not in PREDICTED:
        wrong = f"a predictor with compression {compression}"
    elif photometric == YCBCR and compression != JPEG:
        wrong = "YCbCr that is not JPEG"
    if wrong:
        raise PictureError(f"expected a common TIFF, got {wrong}; save it anew as PNG or as plain RGB TIFF")
    if SUB_DIRECTORIES in tags:
        notes.append("only the first of the file's pictures was kept")
    if samples > KINDS[photometric] and UNSPECIFIED in (extra or (UNSPECIFIED,)):
        notes.append("a channel whose meaning the file does not say was taken as Pillow takes it")
    if PREMULTIPLIED in extra:
        notes.append("colours were divided by their alpha")


def is_inverted(image: Image.Image) -> bool:
    """Tell whether 0 is white."""
    return getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
