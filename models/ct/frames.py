"""What a compressed frame says of its own size, which its decoder believes."""

import struct

Shape = tuple[int, int, int]  # rows, columns, samples per pixel

JPEG_2000 = b"\xff\x4f\xff\x51"  # SOC and SIZ (T.800 A.5.1)
JPEG = b"\xff\xd8"  # SOI (T.81 B.2.1)
# SOF0 to SOF15 of JPEG (T.81 table B.1) without DHT, JPG and DAC, and SOF55 of JPEG-LS (T.87 C.1.1).
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def frame_shape(frame: bytes) -> Shape | None:
    """The rows, columns and samples of a frame of the JPEG family; None where it does not say."""
    try:
        return _jpeg(frame) if frame.startswith(JPEG) else _jpeg_2000(frame)
    except (struct.error, IndexError):  # it ends before it has said so
        return None


def _jpeg_2000(frame: bytes) -> Shape | None:
    start = frame.find(JPEG_2000)  # at the beginning, unless somebody left the boxes of a JP2 file around it
    if start < 0:
        return None
    right, bottom, left, top = struct.unpack_from(">LLLL", frame, start + 8)
    (samples,) = struct.unpack_from(">H", frame, start + 40)
    return bottom - top, right - left, samples


def _jpeg(frame: bytes) -> Shape | None:
    at = len(JPEG)
    while frame[at] == 0xFF:
        while frame[at + 1] == 0xFF:  # fill bytes (T.81 B.1.1.2)
            at += 1
        if frame[at + 1] in FRAME_HEADERS:
            rows, columns, samples = struct.unpack_from(">HHB", frame, at + 5)
            return rows, columns, samples
        at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])
    return None
