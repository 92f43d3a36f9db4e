"""Files made to break a reader: python benchmarks/hostile.py builds them, reads each, and writes results/hostile.json.

Everything is drawn here from fixed seeds: files that end early, wrong check sums, flipped bytes, headers that lie,
absurd tags, bombs, formats that Pillow knows and we do not take. A worker reads them, and writes in all formats what it
could read, in a process that may not grow past 1 GB; when one kills it, the next is read by another.
"""

import argparse
import base64
import json
import multiprocessing
import random
import resource
import struct
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from antidiffusion.pictures.picture import Picture, PictureError, linf

HERE = Path(__file__).parent
LIMIT = 1_000_000_000  # bytes of a worker's memory
SECONDS = 60  # for one file

Case = tuple[str, str, bytes]  # family, name, content


def scene(width: int = 80, height: int = 72) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 90 * np.sin(x / (7 + 9 * k) + k) * np.cos(y / (11 + 5 * k)) for k in range(3)], -1)
    return Image.fromarray((waves + np.random.default_rng(0).normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bases() -> dict[str, bytes]:
    """Whole files, with metadata where the format holds it."""
    photo, tags = scene(), Image.Exif()
    tags[271], tags[274], tags[315] = "Maker", 6, "Author"
    tags[34665] = {36867: "2020:01:02 03:04:05", 37500: b"MAKER" * 20}
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    beside = {"exif": tags.tobytes(), "icc_profile": icc}
    return {
        "png": encoded(photo, "PNG", **beside),
        "png-palette": encoded(photo.quantize(64), "PNG", transparency=bytes(range(64))),
        "jpeg": encoded(photo, "JPEG", xmp=b"<x/>", **beside),
        "jpeg-progressive": encoded(photo, "JPEG", progressive=True),
        "jpeg-cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "mpo": encoded(photo, "MPO", save_all=True, append_images=[photo.resize((64, 64))]),
        "webp": encoded(photo, "WEBP", xmp=b"<x/>", **beside),
        "webp-lossless": encoded(photo.convert("RGBA"), "WEBP", lossless=True),
        "tiff": encoded(photo, "TIFF", exif=tags.tobytes(), icc_profile=icc),
        "tiff-lzw": encoded(photo, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encoded(photo, "TIFF", compression="jpeg"),
        "tiff-fax": encoded(photo.convert("1"), "TIFF", compression="group4"),
        "gif": encoded(photo.quantize(64), "GIF", transparency=3),
        "bmp": encoded(photo, "BMP"),
        "bmp-palette": encoded(photo.quantize(64), "BMP"),
        "avif": encoded(photo, "AVIF", speed=10, **beside),
    }


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def png_of(width: int, height: int, *extra: tuple[bytes, bytes], depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says this size; black as far as it is no more than 100 megapixels."""
    row = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 3) + 7) // 8
    packer, packed = zlib.compressobj(9), b""
    for _ in range(height if width * height <= 100_000_000 else 64):
        packed += packer.compress(bytes(min(row, 1 << 20)))
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return png(head, *extra, (b"IDAT", packed + packer.flush()), (b"IEND", b""))


def chunks_of(content: bytes) -> list[int]:
    """Return where a PNG's chunks begin."""
    at, starts = 8, []
    while at + 8 <= len(content):
        starts.append(at)
        at += 12 + int.from_bytes(content[at : at + 4])
    return starts


def put(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


def tiff_entries(content: bytes) -> list[int]:
    """Return where the entries of a little-endian TIFF's first directory begin."""
    start = int.from_bytes(content[4:8], "little")
    return [start + 2 + 12 * k for k in range(int.from_bytes(content[start : start + 2], "little"))]


def segment(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    return jpeg[:2] + b"".join(bytes([255, m]) + struct.pack(">H", len(d) + 2) + d for m, d in segments) + jpeg[2:]


def cases() -> Iterator[Case]:
    whole, random_ = bases(), random.Random(0)
    for name, content in whole.items():
        yield "whole", name, content
        for k in range(12):
            yield "truncated", f"{name}-{k}", content[: len(content) * k // 12 + k % 3]
        for k in range(10):
            broken = bytearray(content)
            for _ in range(1 + 3 * k):
                broken[random_.randrange(len(broken))] = random_.randrange(256)
            yield "flipped bytes", f"{name}-{k}", bytes(broken)
        for k in range(4):
            at = random_.randrange(len(content))
            yield "cut out", f"{name}-{k}", content[:at] + content[at + 97 :]
    for at in chunks_of(whole["png"]):
        end = at + 8 + int.from_bytes(whole["png"][at : at + 4])
        yield "wrong check sum", f"png-{at}", put(whole["png"], end, b"\1\2\3\4")
        yield "lying header", f"png-length-{at}", put(whole["png"], at, b"\x7f\xff\xff\xff")
    sides = (0, 1, 63, 65535, 2**31 - 1, 2**32 - 1)
    for width in sides:
        for height in sides[:: 1 + width % 2]:
            yield (
                "lying header",
                f"png-{width}x{height}",
                png((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")),
            )
    for depth in (0, 3, 16, 255):
        for colour in (1, 2, 3, 7):
            yield "lying header", f"png-{depth}-bits-{colour}", png_of(80, 72, depth=depth, colour=colour)
    frame = whole["jpeg"].index(b"\xff\xc0") + 5
    for height, width in ((0, 0), (65535, 65535), (1, 65535), (72, 65500), (12000, 80)):
        yield "lying header", f"jpeg-{width}x{height}", put(whole["jpeg"], frame, struct.pack(">HH", height, width))
        yield "lying header", f"gif-{width}x{height}", put(whole["gif"], 6, struct.pack("<HH", width, height))
        yield "lying header", f"bmp-{width}x{height}", put(whole["bmp"], 18, struct.pack("<ii", width, -height))
    for field, value in ((14, 12), (14, 2**31 - 1), (28, 7), (30, 2**31), (34, 2**31), (46, 2**31), (10, 2**31)):
        yield "lying header", f"bmp-{field}-{value}", put(whole["bmp"], field, struct.pack("<I", value))
    for name in ("tiff", "tiff-lzw", "tiff-jpeg", "tiff-fax"):
        for at in tiff_entries(whole[name]):
            tag = int.from_bytes(whole[name][at : at + 2], "little")
            yield "absurd tag", f"{name}-{tag}-count", put(whole[name], at + 4, b"\xff\xff\xff\x7f")
            yield "absurd tag", f"{name}-{tag}-value", put(whole[name], at + 8, b"\xff\xff\xff\xff")
            yield "absurd tag", f"{name}-{tag}-type", put(whole[name], at + 2, b"\x63\0")
            yield "absurd tag", f"{name}-{tag}-twice", put(whole[name], at, whole[name][at - 12 : at - 10])
    yield "absurd tag", "tiff-loop", put(whole["tiff"], tiff_entries(whole["tiff"])[-1] + 12, whole["tiff"][4:8])
    yield from bombs(whole)
    yield from other_formats()


def bombs(whole: dict[str, bytes]) -> Iterator[Case]:
    zeros = zlib.compress(bytes(200_000_000), 9)
    texts = (
        (b"zTXt", b"a\0\0"),
        (b"iTXt", b"a\0\1\0\0\0"),
        (b"iCCP", b"a\0\0"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
    )
    for name, head in texts:
        yield "bomb", f"png-{name.decode()}", png_of(80, 72, (name, head + zeros))
    yield "bomb", "png-many-texts", png_of(80, 72, *[(b"tEXt", b"k%d\0" % k + b"v" * 900) for k in range(20_000)])
    yield "bomb", "png-100-megapixels", png_of(10_000, 10_000)
    yield "bomb", "png-100-megapixels-palette", png_of(10_000, 10_000, (b"PLTE", bytes(range(30))), colour=3)
    yield "bomb", "png-100-megapixels-grey-16", png_of(10_000, 10_000, depth=16, colour=0)
    yield "bomb", "png-101-megapixels", png_of(10_001, 10_000)
    yield "bomb", "png-900-megapixels", png_of(30_000, 30_000)
    yield "bomb", "png-line", png_of(1_500_000, 64)
    yield (
        "bomb",
        "png-idat-too-long",
        png((b"IHDR", struct.pack(">IIBBBBB", 80, 72, 8, 2, 0, 0, 0)), (b"IDAT", zeros), (b"IEND", b"")),
    )
    jpeg = whole["jpeg"]
    yield "bomb", "jpeg-comments", segment(jpeg, *[(0xFE, b"c" * 60_000)] * 500)
    yield "bomb", "jpeg-segments", segment(jpeg, *[(0xE5, b"")] * 100_000)
    deep = b"<a>" * 20_000 + b"</a>" * 20_000
    name = b"http://ns.adobe.com/xap/1.0/\0"
    laughs = (
        b'<!DOCTYPE a [<!ENTITY b "'
        + b"b" * 999
        + b'"><!ENTITY c "'
        + b"&b;" * 999
        + b'">]><a>'
        + b"&c;" * 999
        + b"</a>"
    )
    for kind, packet in (
        ("deep", deep[:65_000]),
        ("laughs", laughs[:65_000]),
        ("attributes", b"<a " + b'b="" ' * 9000),
    ):
        yield "bomb", f"xmp-{kind}", segment(jpeg, (0xE1, name + packet))
    for kind, packet in (
        ("deep", b"<a>" * 400_000 + b"</a>" * 400_000),
        ("wide", b"<r>" + b"<a/>" * 1_500_000 + b"</r>"),
    ):
        yield "bomb", f"xmp-tiff-{kind}", encoded(scene(), "TIFF", tiffinfo={700: packet})
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", base64.b64encode(jpeg).decode())
    yield "bomb", "base64-text", encoded(scene(), "PNG", pnginfo=text)
    loop = (
        b"MM\0*\0\0\0\x08"
        + struct.pack(">H", 2)
        + struct.pack(">HHII", 0x8769, 4, 1, 8)
        + struct.pack(">HHII", 0x8825, 4, 1, 8)
    )
    yield "bomb", "exif-loop", segment(jpeg, (0xE1, b"Exif\0\0" + loop + b"\0\0\0\x08"))
    huge = b"MM\0*\0\0\0\x08" + struct.pack(">H", 3)
    huge += b"".join(struct.pack(">HHII", tag, kind, 2**31, 8) for tag, kind in ((270, 2), (315, 5), (0x9286, 7)))
    yield "bomb", "exif-counts", segment(jpeg, (0xE1, b"Exif\0\0" + huge + bytes(4)))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, profile in (("tags", put(icc, 128, b"\x7f\xff\xff\xff")), ("size", put(icc, 0, b"\xff\xff\xff\xff"))):
        yield "bomb", f"icc-{kind}", encoded(scene(), "JPEG", icc_profile=profile)
    for offset in (132, 136, 140):
        yield "bomb", f"icc-{offset}", encoded(scene(), "JPEG", icc_profile=put(icc, offset, b"\xff\xff\xff\xf0"))
    iptc = b"\x1c\x02\x50\x84\xff\xff\xff\xff"
    yield "bomb", "iptc", segment(jpeg, (0xED, b"Photoshop 3.0\x008BIM\4\4\0\0" + struct.pack(">I", len(iptc)) + iptc))
    yield "bomb", "gif-100-megapixels", encoded(Image.new("L", (10_000, 10_000)), "GIF")
    yield "bomb", "webp-16383", encoded(Image.new("RGB", (16_383, 6_000)), "WEBP", lossless=True, method=0)
    yield "bomb", "tiff-zip", encoded(Image.new("RGB", (9_000, 9_000)), "TIFF", compression="tiff_adobe_deflate")
    yield "bomb", "tiff-many-tags", encoded(scene(), "TIFF", tiffinfo=dict.fromkeys(range(60_000, 65_000), "x" * 50))


def other_formats() -> Iterator[Case]:
    photo = scene()
    for kind in (
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "ICO",
        "ICNS",
        "DDS",
        "EPS",
        "JPEG2000",
        "IM",
        "PDF",
        "DIB",
        "SPIDER",
        "XBM",
        "MSP",
        "PALM",
    ):
        for mode in ("RGB", "L", "1", "F"):
            try:
                yield "other format", f"{kind}-{mode}", encoded(photo.convert(mode), kind)
            except (OSError, KeyError, ValueError, SystemError):  # not every format holds every mode
                continue
    starts = {
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "cr3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        "psd": b"8BPS\0\1",
    }
    starts |= {
        "cr2": b"II*\0\x10\0\0\0CR\2\0",
        "raf": b"FUJIFILMCCD-RAW 0201",
        "jxl": b"\xff\x0a\xfa\x7f",
        "svg": b"<svg>",
    }
    for kind, start in starts.items():
        yield "other format", kind, start + random.Random(1).randbytes(4000)
    yield "other format", "empty", b""
    yield "other format", "zeros", bytes(10_000)
    yield "other format", "text", b"no picture\n" * 300


def memory(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def attempt(path: Path, folder: str) -> tuple[str, str]:
    """Read a file and write what it shows; return what became of it, and what was said."""
    try:
        picture, outcome = Picture.read(path), "read"
        large = picture.pixels.size > 10_000_000  # two such pictures would not fit
        for kind in ("png",) if large else ("png", "webp", "tiff", "bmp"):
            target = Path(folder, f"out.{kind}")
            try:
                picture.write(target, overwrite=True)
            except PictureError:  # BMP holds no metadata
                continue
            if not large and linf(Picture.read(target), picture):
                outcome = "written with other pixels"
        return outcome, ""
    except PictureError as error:
        said = str(error)
        parts = all(part in said for part in ("expected ", ", got ", "; "))
        return "refused in a sentence" if parts and "\n" not in said else "refused otherwise", said
    except MemoryError:
        return "out of memory", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()


def serve(pipe: Connection, folder: str) -> None:
    """Attempt the files that are named, within the memory limit, and say what became of each."""
    room = memory("VmData") + LIMIT - memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    for path in iter(pipe.recv, None):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        pipe.send((*attempt(path, folder), memory("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "hostile.json")
    args = parser.parse_args()
    from antidiffusion.protection import versions  # not in the workers: torch takes memory

    begun, counts, families = time.perf_counter(), Counter[str](), Counter[str]()
    peak, failures, slowest = ("", 0), list[str](), ("", 0.0)
    context = multiprocessing.get_context("spawn")
    worker: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for number, (family, name, content) in enumerate(cases()):
            path = Path(folder, f"{number}")
            path.write_bytes(content)
            if worker is None:
                pipe, end = context.Pipe()
                worker = context.Process(target=serve, args=(end, folder), daemon=True)
                worker.start()
                end.close()
            started = time.perf_counter()
            pipe.send(path)
            try:
                outcome, said, used = pipe.recv() if pipe.poll(SECONDS) else ("took too long", "", 0)
            except EOFError:
                worker.join()
                outcome, said, used = "crashed", f"exit code {worker.exitcode}", 0
            if outcome in ("crashed", "took too long"):
                worker.kill()
                worker = None
            counts[outcome] += 1
            families[family] += 1
            peak = max(peak, (f"{family}: {name}", used), key=lambda pair: pair[1])
            slowest = max(slowest, (f"{family}: {name}", time.perf_counter() - started), key=lambda pair: pair[1])
            if outcome not in ("read", "refused in a sentence"):
                failures.append(f"{family}: {name}: {outcome} {said[-600:]}")
            path.unlink()
        if worker is not None:
            pipe.send(None)
            worker.join()
    result = {
        "files": sum(counts.values()),
        "families": dict(families),
        "outcomes": {name: counts[name] for name in ("read", "refused in a sentence", "crashed", "traceback")}
        | dict(counts),
        "failures": failures,
        "peak_memory_mb": round(peak[1] / 1e6),
        "peak_memory_file": peak[0],
        "slowest_seconds": round(slowest[1], 1),
        "slowest_file": slowest[0],
        "seconds": round(time.perf_counter() - begun),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
