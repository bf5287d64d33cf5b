"""JPEGs with a restart marker after every row of MCUs, of which any run of rows can be read and decoded alone.

An MCU is the smallest block that a JPEG codes as a unit: 8 to 32 pixels high. Such a file falls into pieces: piece 0
holds everything up to the pixels (the start-of-scan segment included), each further one a row of MCUs with the marker
that ends it; the last runs to the end of the file. The coding starts afresh after each marker, so a header with another
height and any run of rows, their markers numbered from 0 again, is a whole JPEG: its pixels are those of the original,
except that smooth chroma upsampling looks one row of pixels beyond either end.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.jpeg import JpegHeader, parse_header

_MARKER = re.compile(rb"\xff[\xd0-\xd7]")
_FIRST_MARKER, _MARKERS = 0xD0, 8
_END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class RestartRows:
    """A JPEG with restart rows of which nothing is read before it is asked for."""

    offsets: tuple[int, ...]
    """Where its pieces begin, from its first byte; as many as its rows of MCUs, and one."""

    read: Callable[[int, int], bytes]
    """read(first, stop): the bytes of the pieces first <= piece < stop, proved to be those that were written. Raises
    what the source's own `read` raises."""

    def whole(self) -> bytes:
        """The whole file."""
        return self.read(0, len(self.offsets))


def insert(jpeg: bytes) -> tuple[bytes, tuple[int, ...]]:
    """The JPEG with a restart marker after every row of MCUs, and where its pieces begin, in bytes.

    libjpeg-turbo's jpegtran does it without decoding: every pixel stays as it is, and so do EXIF, colour profile and
    comments. A progressive file becomes a sequential one, and Huffman tables are optimised. A JPEG that cannot take
    such rows (lossless, 12 bits, more than one scan needed, damaged) is given back as it is, without offsets.

    Raises FileNotFoundError naming the package to install where jpegtran is missing.
    """
    program = shutil.which("jpegtran")
    if program is None:
        raise FileNotFoundError("restart rows need the program jpegtran: install the package libjpeg-turbo-progs")
    command = [program, "-restart", "1", "-optimize", "-copy", "all"]
    done = subprocess.run(command, input=jpeg, capture_output=True, check=False)
    offsets = find_rows(done.stdout) if done.returncode == 0 else ()
    return (done.stdout, offsets) if offsets else (jpeg, ())


def find_rows(jpeg: bytes) -> tuple[int, ...]:
    """Where the pieces of a JPEG begin, in bytes; empty where it has no restart marker after every row of MCUs."""
    try:
        header = parse_header(jpeg)
    except ValueError:
        return ()
    markers = [match.end() for match in _MARKER.finditer(jpeg, header.scan_at)]
    per_row = -(-header.width // header.mcu_width)
    whole = header.plain and header.restart_interval == per_row and jpeg.endswith(_END_OF_IMAGE)
    return (0, header.scan_at, *markers) if whole and len(markers) == header.rows - 1 else ()


def cut_rows(jpeg: RestartRows, head: bytes, header: JpegHeader, first: int, stop: int) -> bytearray:
    """A JPEG of the rows of MCUs first <= row < stop; `head` is piece 0 and `header` what it says.

    Raises ValueError where the pieces are not those of such a JPEG.
    """
    offsets = jpeg.offsets
    if len(offsets) != header.rows + 1 or len(head) != offsets[1]:
        raise ValueError(f"it has {header.rows} rows of MCUs, and the index lists {len(offsets) - 1}")
    body = jpeg.read(1 + first, 1 + stop)
    if len(body) < (offsets[1 + stop] if stop < header.rows else 1 + offsets[stop]) - offsets[1 + first]:
        raise ValueError("it ends within its rows of MCUs")
    data = bytearray(head)
    data += body
    if stop < header.rows:
        data[-2:] = _END_OF_IMAGE
    if first % _MARKERS:  # else they are numbered right as they are
        shift = len(head) - offsets[1 + first] - 1
        for number, end in enumerate(offsets[2 + first : 1 + stop]):
            data[end + shift] = _FIRST_MARKER + number % _MARKERS
    height = min(stop * header.mcu_height, header.height) - first * header.mcu_height
    data[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    return data
