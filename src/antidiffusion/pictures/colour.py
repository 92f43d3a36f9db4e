"""What the numbers of a pixel mean: ICC profiles, checked and bare, and made where a file says it in another way.

References:
    ICC.1:2022 (profile version 4.4). PNG: W3C Portable Network Graphics (Third Edition), 2025. ITU-T H.273 (2024).
"""

import os
import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import ImageCms

from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.metadata import holds_picture

# Tags that a transform reads, and the names that people see. Calibration of screens, embedded settings and whatever
# else a maker puts in is not among them.
ICC_TAGS = {b"desc", b"cprt", b"dmnd", b"dmdd", b"wtpt", b"bkpt", b"chad", b"chrm", b"cicp", b"gamt", b"lumi", b"meas"}
ICC_TAGS |= {b"tech", b"view", b"vued", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC"}
ICC_TAGS |= {name + str(intent).encode() for name in (b"A2B", b"B2A", b"D2B", b"B2D", b"pre") for intent in range(4)}
ICC_HEADER, ICC_ENTRY = 128, 12

D65, DCI = (0.3127, 0.329), (0.314, 0.351)
# (white, red, green, blue) as x, y; numbers of H.273.
PRIMARIES = {
    1: (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (D65, (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    11: (DCI, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    12: (D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
ADOBE_PRIMARIES = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC's parametric curve 3: g, a, b, c, d
VIDEO_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CURVES = {
    1: VIDEO_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: VIDEO_CURVE,
    8: (1.0,),
    13: SRGB_CURVE,
    14: VIDEO_CURVE,
    15: VIDEO_CURVE,
}
UNSPECIFIED, PQ, HLG = 2, 16, 18
PNG_SRGB_GAMMA = 0.45455  # what sRGB is said as in gAMA
ALIKE = 0.02  # differences in gamma and chromaticities that nobody sees
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def icc_space(icc: bytes | None) -> str:
    """Return the colour space an ICC profile describes ("RGB", "GRAY", "CMYK" ...), "" for a broken one or none."""
    try:
        return str(ImageCms.ImageCmsProfile(BytesIO(icc)).profile.xcolor_space).strip() if icc else ""
    except (OSError, ImageCms.PyCMSError):
        return ""


def srgb_profile() -> bytes:
    """Return an sRGB profile without its creation time (bytes 24 to 35 of the header): same input, same bytes."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def bare_profile(icc: bytes) -> bytes | None:
    """Return a valid profile with nothing but the tags of `ICC_TAGS`, or None if even these may hold a picture."""
    count = int.from_bytes(icc[128:132])
    entries = [struct.unpack_from(">4sII", icc, ICC_HEADER + 4 + ICC_ENTRY * number) for number in range(count)]
    kept = [entry for entry in entries if entry[0] in ICC_TAGS]
    covered = ICC_HEADER + 4 + ICC_ENTRY * count
    for start, size in sorted({entry[1:] for entry in kept}):
        if start > covered + 3 or start + size > len(icc):
            break  # a gap where something may lie
        covered = max(covered, start + size)
    else:
        if len(kept) == count and len(icc) <= covered + 3:
            return None if holds_picture(icc) else icc
    table, body, places = b"", b"", {}
    first = ICC_HEADER + 4 + ICC_ENTRY * len(kept)
    for name, start, size in kept:
        if (start, size) not in places:  # tags share their data
            places[start, size] = first + len(body)
            data = icc[start : start + size]
            body += data + bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, places[start, size], size)
    head = struct.pack(">I", first + len(body)) + icc[4:84] + bytes(16) + icc[100:128]  # without the old checksum
    bare = head + struct.pack(">I", len(kept)) + table + body
    return None if holds_picture(bare) else bare


def matrix_profile(primaries: Sequence[tuple[float, float]], curve: Sequence[float], name: str) -> bytes:
    """Return an ICC profile of an RGB space.

    Arguments:
        primaries: x and y of white, red, green and blue.
        curve: A gamma, or g, a, b, c, d of ICC's parametric curve 3.
        name: Shown by viewers.
    """
    white, *corners = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in primaries)
    columns = np.stack(corners, 1)
    columns = columns * np.linalg.solve(columns, white)
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD

    def numbers(values: Sequence[float] | np.ndarray) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))

    def text(content: str) -> bytes:
        encoded = content.encode("utf-16-be")
        return b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded

    function = b"para" + bytes(4) + struct.pack(">HH", 0 if len(curve) == 1 else 3, 0) + numbers(curve)
    tags = {b"desc": text(name), b"cprt": text("No copyright, use freely"), b"wtpt": b"XYZ " + bytes(4) + numbers(D50)}
    tags[b"chad"] = b"sf32" + bytes(4) + numbers(adapted.ravel())
    tags |= {f"{c}XYZ".encode(): b"XYZ " + bytes(4) + numbers((adapted @ columns)[:, k]) for k, c in enumerate("rgb")}
    table, body, first = b"", b"", ICC_HEADER + 4 + ICC_ENTRY * (len(tags) + 3)
    shared = {b"rTRC": first}
    for key, data in ({b"rTRC": function} | tags).items():
        table += struct.pack(">4sII", key, first + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    table += b"".join(struct.pack(">4sII", key, shared[b"rTRC"], len(function)) for key in (b"gTRC", b"bTRC"))
    head = struct.pack(
        ">I4sI4s4s4s12s4s", first + len(body), bytes(4), 0x04400000, b"mntr", b"RGB ", b"XYZ ", bytes(12), b"acsp"
    )
    return head.ljust(68, b"\0") + numbers(D50) + bytes(48) + struct.pack(">I", len(tags) + 3) + table + body


def coded_profile(primaries: int, transfer: int) -> bytes | None:
    """Return the profile of H.273's numbers, or None for sRGB and where they say nothing.

    Raises:
        PictureError: If the light is not that of a display of standard range, or the numbers are unknown.
    """
    if transfer in (PQ, HLG):
        name = {PQ: "PQ", HLG: "HLG"}[transfer]
        raise PictureError(f"expected a picture of standard range, got high dynamic range ({name}); tone-map it first")
    primaries, transfer = (1 if primaries == UNSPECIFIED else primaries), (13 if transfer == UNSPECIFIED else transfer)
    if primaries not in PRIMARIES or transfer not in CURVES:
        raise PictureError(f"expected known colours, got code points {primaries}/{transfer}; convert it to sRGB")
    if primaries == 1 and CURVES[transfer] in (SRGB_CURVE, VIDEO_CURVE):  # video's is shown as sRGB everywhere
        return None
    return matrix_profile(PRIMARIES[primaries], CURVES[transfer], f"H.273 {primaries}/{transfer}")


def png_profile(chunks: dict[bytes, bytes], icc: bytes | None) -> bytes | None:
    """Return the profile that a PNG's chunks describe: cICP before iCCP before sRGB before gAMA and cHRM.

    Raises:
        PictureError: As `coded_profile`.
    """
    if len(coded := chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full = coded
        if matrix or full != 1:
            raise PictureError("expected full-range RGB, got video levels in a PNG's cICP; convert it to sRGB")
        return coded_profile(primaries, transfer)
    if icc is not None or b"sRGB" in chunks:
        return icc
    gamma = int.from_bytes(chunks.get(b"gAMA", b"")) / 100_000 or PNG_SRGB_GAMMA
    stated = chunks.get(b"cHRM", b"")
    numbers = [value / 100_000 for value in struct.unpack(">8I", stated)] if len(stated) == 32 else []
    pairs = [(numbers[at], numbers[at + 1]) for at in range(0, len(numbers), 2)]
    if not all(y > 0 for _, y in pairs) or not 0.1 <= gamma <= 10:
        return None
    srgb = [value for pair in PRIMARIES[1] for value in pair]
    usual = abs(gamma / PNG_SRGB_GAMMA - 1) < ALIKE
    if usual and all(abs(a - b) < ALIKE / 4 for a, b in zip(numbers, srgb, strict=False)):
        return None
    try:
        return matrix_profile(pairs or PRIMARIES[1], SRGB_CURVE if usual else (1 / gamma,), "PNG gAMA and cHRM")
    except np.linalg.LinAlgError:  # corners on a line
        return None


def png_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """Return a PNG's chunks by name, each at most 1 kB of its content, without moving in the file.

    Raises:
        PictureError: If a chunk says that it goes on behind the file's end: a reader would take memory for all of it.
    """
    at, chunks = file.tell(), {}
    end = file.seek(0, os.SEEK_END)
    place = 8
    while place + 8 <= end and b"IEND" not in chunks:
        file.seek(place)
        head = file.read(8)
        size = int.from_bytes(head[:4])
        if place + 12 + size > end:
            raise PictureError("expected a whole picture, got a PNG that ends within a chunk; copy it again")
        chunks[head[4:]] = file.read(min(size, 1024))
        place += 12 + size
    file.seek(at)
    return chunks


def media_properties(file: BinaryIO) -> list[tuple[bytes, bytes]]:
    """Return kind and content of what an AVIF or HEIF file states of its pictures, without moving in the file.

    References:
        ISO/IEC 14496-12, 12.1.5 (colr); ISO/IEC 23008-12, 9.3 (meta, iprp, ipco)
    """
    at = file.tell()
    file.seek(0)
    meta = next((content for kind, content in _boxes(file.read(1 << 20)) if kind == b"meta"), b"")
    file.seek(at)
    properties = next((content for kind, content in _boxes(meta[4:]) if kind == b"iprp"), b"")
    return list(_boxes(next((content for kind, content in _boxes(properties) if kind == b"ipco"), b"")))


def bmp_profile(file: BinaryIO) -> bytes | None:
    """Return the profile embedded in a BMP, without moving in the file (Windows' BITMAPV5HEADER)."""
    at = file.tell()
    file.seek(14)
    head = file.read(124)
    profile = None
    if len(head) == 124 and int.from_bytes(head[:4], "little") >= 124 and head[56:60] == b"DEBM":
        start, size = struct.unpack_from("<II", head, 112)
        file.seek(14 + start)
        profile = file.read(min(size, 1 << 24))
    file.seek(at)
    return profile


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of the boxes of an ISO media file."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4]) or len(data) - at
        if size < 8:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size
