"""The size of an image from its header, without a decoder."""

import struct

from hybridgen.data.sources.protocol import BrokenRecord

FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTED = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts of a PNG that may state its orientation
MAX_SEGMENTS = 65_536  # of a JPEG header, where a byte of padding counts as one


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP from its header, without a decoder. Raises BrokenRecord for other data.

    PIL's WebP reader allocates the canvas when it opens a file, so the size must be checked before.
    """
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return struct.unpack(">II", data[16:24])
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_size(data)
    except (struct.error, IndexError):
        raise BrokenRecord("the header is cut off") from None
    raise BrokenRecord(f"not an image in {', '.join(FORMATS)}")


def may_turn(data: bytes) -> bool:
    """Whether a file may state an orientation: a PNG does so in few of its chunks, which may follow the pixels."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 8 <= len(data):
        kind = data[at + 4 : at + 8]
        if kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(ORIENTED, at + 8)):
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return data[:4] != b"\x89PNG"


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise BrokenRecord("the JPEG has no frame header")
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # padding, and markers without a body
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    raise BrokenRecord(f"the JPEG has no frame header in its first {MAX_SEGMENTS} segments")
