"""What travels beside the pixels: named fields read from EXIF, XMP, IPTC and PNG text, and written anew.

No block is ever copied. Blocks hide previews of the untouched photo (thumbnails, maker notes, Photoshop resources,
gain maps), and a new kind of block would pass every list of what to remove; a list of what to keep it cannot pass.

References:
    EXIF: CIPA DC-008-2019. XMP: ISO 16684-1. IPTC: Photo Metadata Standard 2023.1 with its mapping of IIM to XMP.
"""

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from PIL import ExifTags, Image, ImageFile, IptcImagePlugin


class Field(NamedTuple):
    """Where a text is kept: its XMP property and form, EXIF tag, Windows' EXIF tag, IPTC number and PNG keyword."""

    xmp: str
    form: str = ""  # Seq, Bag or Alt; a plain value without
    exif: int | None = None
    windows: int | None = None
    iptc: int | None = None
    png: str | None = None


FIELDS = {
    "author": Field("dc:creator", "Seq", 315, 40093, 80, "Author"),
    "copyright": Field("dc:rights", "Alt", 33432, None, 116, "Copyright"),
    "description": Field("dc:description", "Alt", 270, 40092, 120, "Description"),
    "title": Field("dc:title", "Alt", None, 40091, 5, "Title"),
    "keywords": Field("dc:subject", "Bag", None, 40094, 25),
    "date": Field("photoshop:DateCreated", iptc=55),
    "headline": Field("photoshop:Headline", iptc=105),
    "credit": Field("photoshop:Credit", iptc=110),
    "source": Field("photoshop:Source", iptc=115),
    "instructions": Field("photoshop:Instructions", iptc=40),
    "author_title": Field("photoshop:AuthorsPosition", iptc=85),
    "rights_marked": Field("xmpRights:Marked"),
    "rights_owner": Field("xmpRights:Owner", "Bag"),
    "usage_terms": Field("xmpRights:UsageTerms", "Alt"),
    "web_statement": Field("xmpRights:WebStatement"),
    "data_mining": Field("plus:DataMining"),  # whether models may be trained on the picture
    "protected_by": Field("antidiffusion:ProtectedBy"),  # the mark of our own results
}
PLACES = {  # texts that say where: left out with the coordinates
    "place": Field("Iptc4xmpCore:Location", iptc=92),
    "city": Field("photoshop:City", iptc=90),
    "state": Field("photoshop:State", iptc=95),
    "country": Field("photoshop:Country", iptc=101),
}
NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "antidiffusion": "urn:antidiffusion",
}
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DATES = ("exif:DateTimeOriginal", "xmp:CreateDate")  # read after photoshop:DateCreated
LATITUDE, LONGITUDE = "exif:GPSLatitude", "exif:GPSLongitude"

MAX_PACKET = 8_000_000  # bytes of XMP; what is longer is history and previews
MAX_TEXT, MAX_TEXTS = 4000, 200  # characters of a text and texts of a field
SECONDS = 3600 * 10_000  # a degree in the unit of the coordinates that are written: 3 mm
MAKER_NOTE, COLOUR_SPACE, INTEROP_INDEX = 37500, 40961, 1
UNCOPIED = {36864, 37121, COLOUR_SPACE, 40960, 40962, 40963, ExifTags.IFD.Interop}  # of the encoding, not of the photo
SEGMENTS = (b"JFIF\0", b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0", b"Adobe")
IPTC_RESOURCE, RESOLUTION_RESOURCE = 0x0404, 0x03ED

SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"WEBPVP8",
    b"II*\0",
    b"MM\0*",
    b"GIF87a",
    b"GIF89a",
    b"ftypavif",
    b"ftyphei",
)
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]|[!-~]{300}")  # controls, and code


@dataclass(frozen=True)
class Metadata:
    """What a picture says of itself.

    Arguments:
        texts: By names of `FIELDS` and `PLACES`; each at least one text, "date" one in ISO 8601.
        dpi: Horizontal and vertical pixels an inch, to one decimal.
        location: Latitude and longitude in degrees.
    """

    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    location: tuple[float, float] | None = None

    def with_text(self, name: str, *texts: str) -> Self:
        """Return the same metadata with a field's texts replaced."""
        return replace(self, texts=dict(self.texts) | {name: texts})

    def exif(self, *, nested: bool, dpi: bool) -> Image.Exif:
        """Return EXIF anew, with the date and the coordinates if directories may nest, and with the resolution."""
        tags = Image.Exif()
        for name, texts in self.texts.items():
            if tag := FIELDS[name].exif if name in FIELDS else None:
                tags[tag] = "; ".join(texts).encode()  # bytes: Pillow makes question marks of accents in a string
        if dpi and self.dpi:
            tags[282], tags[283], tags[296] = *self.dpi, 2
        date = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)T(\d\d:\d\d:\d\d)(.*)", "".join(self.texts.get("date", ())))
        if nested and date:
            taken = {36864: b"0232", 36867: f"{date[1]}:{date[2]}:{date[3]} {date[4]}"}
            tags[ExifTags.IFD.Exif] = taken | ({36881: date[5].replace("Z", "+00:00")} if date[5] else {})
        if nested and self.location:
            (north, latitude), (east, longitude) = (_sexagesimal(degrees) for degrees in self.location)
            place: dict[int, Any] = {0: b"\2\3\0\0", 1: "N" if north else "S", 2: latitude}
            tags[ExifTags.IFD.GPSInfo] = place | {3: "E" if east else "W", 4: longitude}
        return tags

    def xmp(self) -> bytes | None:
        """Return an XMP packet of the texts and coordinates in UTF-8, or None without any."""
        properties = []
        for name, texts in self.texts.items():
            key, form, *_ = (FIELDS | PLACES)[name]
            language = ' xml:lang="x-default"' if form == "Alt" else ""
            items = "".join(f"<rdf:li{language}>{escape(text)}</rdf:li>" for text in texts)
            value = f"<rdf:{form}>{items}</rdf:{form}>" if form else escape(texts[0])
            properties.append(f"<{key}>{value}</{key}>")
        if self.location:
            for key, degrees, ends in zip((LATITUDE, LONGITUDE), self.location, ("SN", "WE"), strict=True):
                whole, minutes = divmod(round(abs(degrees) * SECONDS), SECONDS)
                properties.append(f"<{key}>{whole},{minutes * 60 / SECONDS:.6f}{ends[degrees >= 0]}</{key}>")
        if not properties:
            return None
        used = sorted({text[1 : text.index(":")] for text in properties})
        spaces = "".join(f" xmlns:{prefix}={quoteattr(NAMESPACES[prefix])}" for prefix in used)
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
            f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""{spaces}>{"".join(properties)}</rdf:Description>'
            '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
        ).encode()


def read_metadata(image: ImageFile.ImageFile, notes: list[str], *, keep_location: bool) -> Metadata:
    """Return a loaded image's fields, XMP before IPTC before EXIF before PNG text; name in `notes` what is left out.

    EXIF that cannot be parsed is dropped from `image.info`, where the orientation would be looked for.
    """
    left: dict[str, None] = {}  # an ordered set
    found: dict[str, tuple[str, ...]] = {}
    where: list[float | None] = [None, None]
    readers = {"XMP packet": _read_xmp, "IPTC block": _read_iptc, "EXIF block": _read_exif, "text": _read_text}
    for kind, reader in readers.items():
        try:
            texts, place = reader(image, left)
        except Exception:  # as many types as there are ways to be broken
            notes.append(f"a broken {kind} was dropped")
            if reader is _read_exif:
                image.info.pop("exif", None)
            continue
        found = {name: value for name, value in _cleaned(texts, left).items() if name not in found} | found
        where = [old if old is not None else new for old, new in zip(where, place, strict=True)]
    latitude, longitude = where
    located = latitude is not None and longitude is not None and abs(latitude) <= 90 and abs(longitude) <= 180
    if not keep_location and (located or PLACES.keys() & found.keys()):
        left["the location"] = None
        found = {name: texts for name, texts in found.items() if name not in PLACES}
    if left:
        notes.append(f"left out of the metadata: {', '.join(left)}")
    return Metadata(
        {name: found[name] for name in (*FIELDS, *PLACES) if name in found},
        _resolution(image),
        (latitude, longitude) if keep_location and latitude is not None and longitude is not None and located else None,
    )


def holds_picture(data: bytes) -> bool:
    """Tell whether a picture file may begin anywhere in the data."""
    return any(signature in data for signature in SIGNATURES)


Found = tuple[dict[str, list[str]], tuple[float | None, float | None]]  # texts and coordinates


def _read_xmp(image: ImageFile.ImageFile, left: dict[str, None]) -> Found:
    packet = image.info.get("xmp") or b""
    if not packet:
        return {}, (None, None)
    if len(packet) > MAX_PACKET or b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("too long, or with definitions of its own")
    root = ElementTree.fromstring(packet.decode("utf-8").strip("\ufeff\0 \r\n\t"))
    values: dict[str, list[str]] = {}
    short = {f"{{{space}}}": f"{prefix}:" for prefix, space in NAMESPACES.items()}
    for description in root.findall(f".//{{{RDF}}}RDF/{{{RDF}}}Description"):
        pairs = [(key, [value]) for key, value in description.attrib.items() if not key.startswith(f"{{{RDF}}}")]
        for child in description:
            items = child.findall(f"*/{{{RDF}}}li")
            if len(items) > 1 and child[0].tag == f"{{{RDF}}}Alt":  # languages
                default = "{http://www.w3.org/XML/1998/namespace}lang"
                items = [item for item in items if item.get(default) == "x-default"][:1] or items[:1]
            pairs.append((child.tag, [item.text or "" for item in items] if len(child) else [child.text or ""]))
        for key, value in pairs:
            space = key[: key.find("}") + 1]
            values.setdefault(short.get(space, space) + key[len(space) :], value)
    texts = {name: values.pop(spec.xmp) for name, spec in (FIELDS | PLACES).items() if spec.xmp in values}
    for key in DATES:
        if (dated := values.pop(key, None)) and "date" not in texts:
            texts["date"] = dated
    latitude, longitude = (_degrees("".join(values.pop(key, []))) for key in (LATITUDE, LONGITUDE))
    if any(key.endswith("Thumbnails") for key in values):
        left["XMP thumbnails"] = None
    if any("GCamera" in key or "/camera/" in key or "hdr-gain-map" in key or "container" in key for key in values):
        left["a gain map or film"] = None
    if any(not key.endswith("Thumbnails") for key in values):
        left["other XMP fields"] = None
    return texts, (latitude, longitude)


def _read_iptc(image: ImageFile.ImageFile, left: dict[str, None]) -> Found:
    resources = image.info.get("photoshop") or {}
    if resources.keys() - {IPTC_RESOURCE, RESOLUTION_RESOURCE} or 34377 in getattr(image, "tag_v2", {}):
        left["Photoshop resources"] = None
    found: Mapping[Any, Any] = IptcImagePlugin.getiptcinfo(image) or {}
    texts = {}
    for name, spec in (FIELDS | PLACES).items():
        value = found.get((2, spec.iptc))
        if value is not None:
            texts[name] = [_text(item) for item in (value if isinstance(value, list) else [value])]
    if "date" in texts and found.get((2, 60)):
        texts["date"] = [f"{texts['date'][0]}T{_text(found[(2, 60)])}"]
    return texts, (None, None)


def _read_exif(image: ImageFile.ImageFile, left: dict[str, None]) -> Found:
    hexed = image.info.get("Raw profile type exif")  # ImageMagick's text chunk, before PNG had eXIf
    if hexed and "exif" not in image.info:
        image.info["exif"] = bytes.fromhex("".join(hexed.split("\n")[3:]))
    if image.format == "TIFF":
        tags = image.getexif()
    else:
        tags = Image.Exif()
        tags.load(image.info.get("exif") or b"")  # afresh: what the image keeps of a broken block is empty
    taken, gps = tags.get_ifd(ExifTags.IFD.Exif), tags.get_ifd(ExifTags.IFD.GPSInfo)
    texts = {}
    for name, spec in FIELDS.items():
        if spec.exif is not None and spec.exif in tags:
            texts[name] = [_text(tags[spec.exif])]
        elif spec.windows is not None and spec.windows in tags:
            texts[name] = [bytes(tags[spec.windows]).decode("utf-16-le").strip("\0")]
    for date, zone in ((36867, 36881), (36868, 36882), (306, 36880)):
        stamp = taken.get(date) or tags.get(date)
        if stamp and _date(_text(stamp)):
            texts["date"] = [_text(stamp).strip("\0 ") + _text(taken.get(zone, "")).strip("\0 ")]
            break
    if image.format != "TIFF" and tags.get_ifd(ExifTags.IFD.IFD1):
        left["the EXIF thumbnail"] = None
    if MAKER_NOTE in taken:
        left["the maker note"] = None
    if tags.keys() & {271, 272} or taken.keys() - UNCOPIED - {MAKER_NOTE, 36867, 36868, 36880, 36881, 36882}:
        left["camera settings"] = None
    places = []
    for degrees, end in ((2, 1), (4, 3)):
        parts = [float(part) for part in gps.get(degrees, ())]
        known = len(parts) == 3 and all(map(math.isfinite, parts))
        sign = -1 if _text(gps.get(end, "")).strip("\0 ") in ("S", "W") else 1
        places.append(sign * _rounded(parts[0] + parts[1] / 60 + parts[2] / 3600) if known else None)
    return texts, (places[0], places[1])


def _read_text(image: ImageFile.ImageFile, left: dict[str, None]) -> Found:
    """Read PNG's text chunks; say what else there is beside the pixels."""
    chunks = dict(getattr(image, "text", {}))
    if "comment" in image.info:
        left["a comment"] = None
    if any(not content.startswith(SEGMENTS) for _, content in getattr(image, "applist", [])):
        left["other application data"] = None  # previews, extended XMP, content credentials
    texts = {name: [str(chunks.pop(spec.png))] for name, spec in FIELDS.items() if spec.png and spec.png in chunks}
    if chunks.keys() - {"XML:com.adobe.xmp", "Raw profile type exif"}:
        left["other text"] = None
    return texts, (None, None)


def _cleaned(texts: Mapping[str, list[str]], left: dict[str, None]) -> dict[str, tuple[str, ...]]:
    """Return what is text and nothing else."""
    kept = {}
    for name, values in texts.items():
        normal = [re.sub("\r\n?", "\n", value).strip("\0 \n\t") for value in values[:MAX_TEXTS]]
        if name == "date":
            normal = [_date(value) for value in normal[:1]]
        wanted = [value for value in normal if value]
        plain = [
            value for value in wanted if len(value) <= MAX_TEXT and not NO_TEXT.search(value) and not _hides(value)
        ]
        if len(plain) < len(wanted):
            left[f"a {name} that is no plain text"] = None
        if plain:
            kept[name] = tuple(plain) if (FIELDS | PLACES)[name].form in ("Seq", "Bag") else ("; ".join(plain),)
    return kept


def _hides(text: str) -> bool:
    """Tell whether a text holds a picture in base64 or in hexadecimal digits, in lines of any length."""
    packed = re.sub(r"\s+", "", text).replace("-", "+").replace("_", "/")
    for run in re.findall("[A-Za-z0-9+/]{64,}", packed):
        for start in range(4):
            if holds_picture(base64.b64decode(run[start : start + (len(run) - start) // 4 * 4])):
                return True
    runs = re.findall("[0-9a-fA-F]{64,}", packed)
    return any(holds_picture(binascii.unhexlify(run[s : s + (len(run) - s) // 2 * 2])) for run in runs for s in (0, 1))


def _text(value: Any) -> str:
    """Decode what EXIF and IPTC call ASCII, mostly UTF-8 today, which Pillow gives as bytes or as Latin-1."""
    raw = value if isinstance(value, bytes) else str(value).encode("latin-1", "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _date(text: str) -> str:
    """Return a date of EXIF, IPTC or XMP in ISO 8601 to the second at most, "" for none."""
    found = re.match(
        r"(\d{4})[:-]?(\d\d)[:-]?(\d\d)(?:[T ](\d\d):?(\d\d)(?::?(\d\d))?(?:\.\d+)?)?\s*([+-]\d\d:?\d\d|Z)?", text
    )
    if not found or not ("01" <= found[2] <= "12" and "01" <= found[3] <= "31"):
        return ""
    day = f"{found[1]}-{found[2]}-{found[3]}"
    if not found[4] or found[4] > "23":
        return day
    zone = found[7] or ""
    zone = f"{zone[:3]}:{zone[-2:]}" if len(zone) > 1 else zone
    return f"{day}T{found[4]}:{found[5]}:{found[6] or '00'}{zone}"


def _degrees(text: str) -> float | None:
    """Read XMP's coordinate, "48,51.5N" or "48,51,30N"."""
    found = re.fullmatch(r"(\d{1,3}),(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?([NSEW])", text.strip())
    if not found:
        return None
    degrees = int(found[1]) + float(found[2]) / 60 + float(found[3] or 0) / 3600
    return -_rounded(degrees) if found[4] in "SW" else _rounded(degrees)


def _rounded(degrees: float) -> float:
    return round(degrees * SECONDS) / SECONDS


def _sexagesimal(degrees: float) -> tuple[bool, tuple[float, float, float]]:
    whole, rest = divmod(round(abs(degrees) * SECONDS), SECONDS)
    minutes, seconds = divmod(rest, SECONDS // 60)
    return degrees >= 0, (float(whole), float(minutes), seconds * 3600 / SECONDS)


def _resolution(image: ImageFile.ImageFile) -> tuple[float, float] | None:
    """Return pixels an inch that the file states: EXIF's or TIFF's tags, else the format's own."""
    tags = image.getexif()
    if 282 in tags and 283 in tags and tags.get(296, 2) in (2, 3):
        stated: Any = [tags[key] for key in (282, 283)]
        unit = 2.54 if tags.get(296, 2) == 3 else 1
    elif image.format == "JPEG":
        unit = {1: 1, 2: 2.54}.get(image.info.get("jfif_unit", 0), 0)
        stated = image.info.get("jfif_density", ())
    else:
        stated, unit = image.info.get("dpi", ()) if image.format != "TIFF" else (), 1
    try:
        x, y = (round(float(value) * unit, 1) for value in stated)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return (x, y) if 1 <= x <= 100_000 and 1 <= y <= 100_000 else None
