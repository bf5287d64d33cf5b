"""The segments of a JPEG file before its pixels: size, sampling, coding, orientation. No pixel is decoded here."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

START = b"\xff\xd8"

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # the others of this range are tables
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)
_START_OF_SCAN, _END_OF_IMAGE, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
_FILL = 0xFF
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, restart markers, another start of image
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')
_ORIENTATION_TAG = 0x0112
# (width, height) of chroma's samples, in those of luma
_SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411", (1, 4): "441"}
_BLOCK = 8  # pixels; JPEG transforms blocks of 8 x 8


class JpegHeader(NamedTuple):
    """What stands before the pixels of a JPEG."""

    height: int
    """As stored, before a rotation noted in EXIF; so is `width`."""

    width: int
    components: int
    """1 grey, 3 colour, 4 CMYK"""

    mcu_height: int
    """Height of the blocks that are coded as a unit, in pixels."""

    mcu_width: int
    sampling: bytes
    """A byte for each component: its samples in an MCU across (upper four bits) and down, in blocks of 8 x 8."""

    plain: bool
    """Huffman-coded, sequential, 8 bits, all components in one scan: rows of MCUs follow each other from the top."""

    progressive: bool
    restart_interval: int
    """MCUs between two restart markers; 0 without them."""

    orientation: int
    """As EXIF (or, without EXIF, XMP) notes it, 1 (upright) to 8."""

    height_at: int
    """Where the two bytes of the height lie."""

    scan_at: int
    """Where the first scan's coded pixels begin, in bytes."""

    @property
    def rows(self) -> int:
        """Rows of MCUs."""
        return -(-self.height // self.mcu_height)

    @property
    def mcus_per_row(self) -> int:
        return -(-self.width // self.mcu_width)

    @property
    def tall_chroma(self) -> bool:
        """A component has fewer rows than another, so that smooth upsampling looks at the rows above and below."""
        rows = [factors & 15 for factors in self.sampling]
        return min(rows) < max(rows)

    @property
    def wide_chroma(self) -> bool:
        """The same of columns."""
        columns = [factors >> 4 for factors in self.sampling]
        return min(columns) < max(columns)

    @property
    def subsampling(self) -> str:
        """ "444", "422", "420", "440", "411", "441" or "Gray"; "other" for what has no such name."""
        if self.components == 1:
            return "Gray"
        luma, chroma, black = self.sampling[0], set(self.sampling[1:3]), self.sampling[3:]
        if len(chroma) != 1 or black not in (b"", self.sampling[:1]):
            return "other"
        less = chroma.pop()
        (wide, over), (tall, under) = divmod(luma >> 4, less >> 4), divmod(luma & 15, less & 15)
        return "other" if over or under else _SUBSAMPLINGS.get((wide, tall), "other")

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) as a viewer shows it."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


def parse_header(data: bytes) -> JpegHeader:
    """Read the segments up to the first scan; raises ValueError saying what is wrong."""
    if data[:2] != START:
        raise ValueError("it does not begin as a JPEG")
    position, size = 2, len(data)
    frame_at = 0
    interval = exif = xmp = 0
    while True:
        if position + 4 > size:
            raise ValueError("it ends before its pixels")
        marker = data[position + 1]
        if data[position] != 0xFF:
            raise ValueError(f"there is no marker at byte {position}, where one must be")
        if marker == _FILL:
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        if marker == _END_OF_IMAGE:
            raise ValueError("it has no pixels")
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if end > size or end < position + 4:
            raise ValueError(f"the segment at byte {position} is longer than the file or has no length")
        if marker == _START_OF_SCAN:
            break
        if marker in _FRAMES:
            if frame_at:
                raise ValueError("it has two frame headers")
            frame_at = position
        elif marker == _RESTART_INTERVAL:
            interval = int.from_bytes(data[position + 4 : position + 6], "big")
        elif marker == _APP1:
            if not exif and data.startswith(_EXIF, position + 4):
                exif = position + 4 + len(_EXIF)
            elif not xmp and data.startswith(_XMP, position + 4):
                xmp = position + 4
        position = end
    if not frame_at:
        raise ValueError("it has no frame header before its pixels")
    orientation = _orientation(data, exif, xmp) if exif or xmp else 1
    return _header(data, frame_at, position, interval, orientation)


def _header(data: bytes, frame_at: int, scan: int, interval: int, orientation: int) -> JpegHeader:
    frame = data[frame_at + 1]
    length = data[frame_at + 2] << 8 | data[frame_at + 3]
    if length < 8:
        raise ValueError("its frame header is too short")
    bits, height, width, components = struct.unpack_from(">BHHB", data, frame_at + 4)
    if length != 8 + 3 * components or components == 0:
        raise ValueError("its frame header does not list its components")
    if height == 0 or width == 0:
        raise ValueError(f"its size is {height} x {width}")
    sampling = data[frame_at + 11 : frame_at + 10 + 3 * components : 3]
    rows, columns = [factors & 15 for factors in sampling], [factors >> 4 for factors in sampling]
    if not 1 <= min(rows + columns) <= max(rows + columns) <= 4:
        raise ValueError("its sampling factors are not from 1 to 4")
    one = components == 1  # alone it is coded block by block, whatever its factors say
    in_scan = data[scan + 4] if scan + 4 < len(data) else 0
    return JpegHeader(
        height,
        width,
        components,
        _BLOCK if one else _BLOCK * max(rows),
        _BLOCK if one else _BLOCK * max(columns),
        sampling=bytes(sampling),
        plain=frame in _SEQUENTIAL_FRAMES and bits == 8 and in_scan == components,
        progressive=frame in _PROGRESSIVE_FRAMES,
        restart_interval=interval,
        orientation=orientation,
        height_at=frame_at + 5,
        scan_at=scan + 2 + (data[scan + 2] << 8 | data[scan + 3]),
    )


def _orientation(data: bytes, exif: int, xmp: int) -> int:
    """From EXIF's TIFF header at `exif`; where that has no such tag, from the XMP packet at `xmp` (0: none)."""
    found = 0
    if exif:
        length = int.from_bytes(data[exif - 8 : exif - 6], "big")
        found = _tiff_orientation(data[exif : exif - 8 + length])
    if not found and xmp:
        length = int.from_bytes(data[xmp - 2 : xmp], "big")
        match = _XMP_ORIENTATION.search(data, xmp, xmp - 2 + length)
        found = int(match[2]) if match else 0
    return found if 1 <= found <= 8 else 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation tag in the first directory of a TIFF header (EXIF data is one); 0 if it is not there."""
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if byte_order is None:
            return 0
        (directory,) = struct.unpack_from(byte_order + "I", tiff, 4)
        (entries,) = struct.unpack_from(byte_order + "H", tiff, directory)
        for entry in range(entries):
            offset = directory + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(byte_order + "HHIH", tiff, offset)
            if tag == _ORIENTATION_TAG:
                return int(value)
    except struct.error:  # a directory that points outside its segment: the tag is unreadable, the pixels are not
        return 0
    return 0
