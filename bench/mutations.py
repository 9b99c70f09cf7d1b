"""Ways to spoil a DICOM file: bytes in, bytes out, decided by a random generator alone."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pydicom
from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement

from models.ct.header import HEADER_TAGS

Random = np.random.Generator

LONG_VRS = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"}  # PS3.5 7.1.2
VRS = [*LONG_VRS, "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS"]
VRS += ["ST", "TM", "UI", "UL", "US", "??", "\0\0"]
SIZES = [0, 1, 2, 3, 511, 513, 4095, 4097, 32767, 65534, 65535]
COUNTS = ["0", "1", "2", "-1", "65536", "2147483647", "99999999999999999999", "1e9", "nan", " ", "1\\2"]
TEXTS = [
    b"nan",
    b"-inf",
    b"1e400",
    b"1\\2\\3\\4\\5\\6\\7",
    b"0\\0\\0\\0\\0\\0",
    b"\0",
    b"\xff\xfe\xfd",
    b"",
    b"\\\\\\",
    b"x" * 70,
]
LENGTHS = [0, 1, 2, 7, 255, 65535, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
DECIDING = {tag_for_keyword(each) for each in [*HEADER_TAGS, "PixelData"]}
SYNTAXES = [each for each in uid.AllTransferSyntaxes if "JPIP" not in each.name]
# Where a frame says its size, from its marker on: JPEG (T.81 B.2.2), JPEG-LS (T.87 C.2.2), JPEG 2000 (T.800 A.5.1).
FRAME_HEADERS = [(bytes([0xFF, sof]), (5, ">HH")) for sof in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7)]
FRAME_HEADERS += [(b"\xff\x4f\xff\x51", (8, ">LL"))]


@dataclass(frozen=True)
class Original:
    """A readable DICOM file."""

    name: str
    content: bytes

    @cached_property
    def elements(self) -> list[RawDataElement]:
        """Its outermost elements, in order; none where its positions are those of an inflated stream."""
        dataset = pydicom.dcmread(io.BytesIO(self.content), force=True)
        if dataset.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
            return []
        every = map(dataset.get_item, dataset.keys())
        return [each for each in every if isinstance(each, RawDataElement)]

    @property
    def pixels_at(self) -> int:
        """Where the value of PixelData begins; the middle of the file where that is not known."""
        found = (each.value_tell for each in self.elements if each.tag == 0x7FE00010)
        return next(found, len(self.content) // 2)


def header_bytes(original: Original, random: Random) -> bytes:
    return _scribbled(original.content, 0, original.pixels_at, random)


def pixel_bytes(original: Original, random: Random) -> bytes:
    return _scribbled(original.content, original.pixels_at, len(original.content), random)


def tag(original: Original, random: Random) -> bytes:
    """One element takes another's tag, or one that nothing has."""
    content, element = bytearray(original.content), _chosen(original, random)
    if element is None:
        return header_bytes(original, random)
    other = int(
        random.choice([each.tag for each in original.elements] + [0, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0x7FE00010])
    )
    struct.pack_into(
        "<HH" if element.is_little_endian else ">HH", content, _start(element), other >> 16, other & 0xFFFF
    )
    return bytes(content)


def vr(original: Original, random: Random) -> bytes:
    content, element = bytearray(original.content), _chosen(original, random)
    if element is None or element.is_implicit_VR:
        return header_bytes(original, random)
    start = _start(element) + 4
    content[start : start + 2] = str(random.choice(VRS)).encode()
    return bytes(content)


def length(original: Original, random: Random) -> bytes:
    content, element = bytearray(original.content), _chosen(original, random)
    if element is None:
        return header_bytes(original, random)
    wrong = int(random.choice([*LENGTHS, element.length + 1, max(0, element.length - 1), element.length * 2]))
    order = "<" if element.is_little_endian else ">"
    if element.is_implicit_VR or element.VR in LONG_VRS:
        struct.pack_into(f"{order}L", content, element.value_tell - 4, wrong & 0xFFFFFFFF)
    else:
        struct.pack_into(f"{order}H", content, element.value_tell - 2, wrong & 0xFFFF)
    return bytes(content)


def value(original: Original, random: Random) -> bytes:
    """One element's value replaced by a text that is no number, too many of them, or too long; its length is right."""
    element = _chosen(original, random)
    if element is None or element.length in (0, 0xFFFFFFFF):
        return header_bytes(original, random)
    content, start = original.content, element.value_tell
    text = TEXTS[random.integers(len(TEXTS))]
    text = (text * (element.length // max(1, len(text)) + 1))[: element.length] if text else b" " * element.length
    return content[:start] + text + content[start + element.length :]


def numbers(original: Original, random: Random) -> bytes:
    """Sizes and counts that the pixels do not have: huge, zero, negative or none."""
    dataset = pydicom.dcmread(io.BytesIO(original.content), force=True)
    for _ in range(random.integers(1, 4)):
        keyword = str(
            random.choice(
                [
                    "Rows",
                    "Columns",
                    "NumberOfFrames",
                    "BitsAllocated",
                    "BitsStored",
                    "HighBit",
                    "SamplesPerPixel",
                    "PixelRepresentation",
                    "PlanarConfiguration",
                ]
            )
        )
        if keyword == "NumberOfFrames":
            text = str(random.choice(COUNTS)).encode()
            dataset[0x00280008] = RawDataElement(pydicom.tag.Tag(0x00280008), "IS", len(text), text, 0, False, True)
        else:
            setattr(dataset, keyword, int(random.choice([*SIZES, 8, 12, 16, 32, 64])))
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=False)
    return stream.getvalue()


def syntax(original: Original, random: Random) -> bytes:
    """The file says that it is in another transfer syntax."""
    content = original.content
    said = content.find(b"\x02\x00\x10\x00UI")
    if said < 0:
        return header_bytes(original, random)
    (old,) = struct.unpack_from("<H", content, said + 6)
    other = str(random.choice(SYNTAXES)).encode()
    other += b"\0" * (len(other) % 2)
    changed = content[: said + 6] + struct.pack("<H", len(other)) + other + content[said + 8 + old :]
    group = changed.find(b"\x02\x00\x00\x00UL\x04\x00")
    if group < 0:
        return changed
    (size,) = struct.unpack_from("<L", changed, group + 8)
    return changed[: group + 8] + struct.pack("<L", size + len(other) - old) + changed[group + 12 :]


def codestream(original: Original, random: Random) -> bytes:
    """The compressed picture says that it is of another size than the header does."""
    found = [
        (at, layout)
        for marker, layout in FRAME_HEADERS
        if (at := original.content.find(marker, original.pixels_at)) > 0
    ]
    if not found:
        return pixel_bytes(original, random)
    changed = bytearray(original.content)
    at, (start, form) = found[random.integers(len(found))]
    sizes = [int(random.choice([0, 1, 7, 256, 1024, 8192, 20_000, 65_535])) for _ in range(2)]
    struct.pack_into(form, changed, at + start, *sizes)
    return bytes(changed)


def truncated(original: Original, random: Random) -> bytes:
    end = len(original.content) if random.random() < 0.5 else original.pixels_at
    return original.content[: random.integers(0, end)]


def spliced(original: Original, random: Random, other: Original) -> bytes:
    """The beginning of one file and the end of another."""
    first = random.integers(0, original.pixels_at * 2)
    return original.content[:first] + other.content[random.integers(0, other.pixels_at * 2) :]


def shifted(original: Original, random: Random) -> bytes:
    """Some bytes more, or fewer, somewhere."""
    at, count = int(random.integers(0, original.pixels_at)), int(random.integers(1, 64))
    inserted = random.bytes(count) if random.random() < 0.5 else b""
    return original.content[:at] + inserted + original.content[at + (0 if inserted else count) :]


MUTATIONS: dict[str, Callable[[Original, Random], bytes]] = {
    each.__name__: each
    for each in (header_bytes, tag, vr, length, value, numbers, syntax, pixel_bytes, codestream, truncated, shifted)
}


def _scribbled(content: bytes, start: int, end: int, random: Random) -> bytes:
    changed = bytearray(content)
    for place in random.integers(start, max(end, start + 1), int(2 ** random.uniform(0, 6))):
        if place < len(changed):
            changed[place] = random.integers(256)
    return bytes(changed)


def _chosen(original: Original, random: Random) -> RawDataElement | None:
    """Half of the time one of those that decide what becomes of the file."""
    every = original.elements
    if random.random() < 0.5:
        every = [each for each in every if each.tag in DECIDING] or every
    return every[random.integers(len(every))] if every else None


def _start(element: RawDataElement) -> int:
    """Where the element's tag is."""
    long = not element.is_implicit_VR and element.VR in LONG_VRS
    return element.value_tell - (12 if long else 8)
