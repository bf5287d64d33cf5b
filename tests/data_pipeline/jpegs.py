"""JPEGs of many kinds for tests, and what Pillow makes of them."""

from __future__ import annotations

import functools
import io
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from data_pipeline.jpeg import parse_header
from data_pipeline.restart_rows import RestartRows, Span, insert, pieces_per_row

Pixels = npt.NDArray[np.uint8]

HEIGHT, WIDTH = 75, 101  # of the images below, as stored: no multiple of any MCU, and more than 8 rows of 8 pixels

SAMPLINGS = {
    "4:4:4": "1x1,1x1,1x1",
    "4:2:2": "2x1,1x1,1x1",
    "4:2:0": "2x2,1x1,1x1",
    "4:4:0": "1x2,1x1,1x1",
    "4:1:1": "4x1,1x1,1x1",
    "4:4:1": "1x4,1x1,1x1",
    "chroma of half the height in 2x2": "2x2,2x1,2x1",
}

KINDS = (
    *SAMPLINGS,
    *("gray", "gray of 2x2", "CMYK", "RGB", "progressive", "progressive 4:4:4", "optimized", "arithmetic"),
    *("restart every 3 MCUs", "restart every 2 rows", "restart every row", "a scan for each colour"),
    *(f"orientation {number}" for number in range(2, 9)),
)


def textured(height: int, width: int, seed: int = 0) -> Pixels:
    """An image with edges, slopes and noise, strongly coloured, so that no row of it resembles another."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-20, 21, (height, width, 3), dtype=np.int16)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def encoded(pixels: Pixels, mode: str = "RGB", kind: str = "JPEG", **options: object) -> bytes:
    """An image file by Pillow."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **{"quality": 85, **options})
    return file.getvalue()


def by_cjpeg(pixels: Pixels, *options: str) -> bytes:
    """A JPEG by libjpeg-turbo's cjpeg, which can do more than Pillow; skips the test where that is missing."""
    path = shutil.which("cjpeg")
    if path is None:
        pytest.skip("cjpeg is not installed (package libjpeg-turbo-progs)", allow_module_level=True)
    height, width = pixels.shape[:2]
    source = b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()
    return subprocess.run([path, *options], input=source, capture_output=True, check=True).stdout


@functools.cache
def of_kind(kind: str) -> bytes:
    """A JPEG of one of KINDS, HEIGHT x WIDTH as stored."""
    pixels = textured(HEIGHT, WIDTH)
    if kind in SAMPLINGS:
        return by_cjpeg(pixels, "-sample", SAMPLINGS[kind])
    if kind == "gray of 2x2":
        return by_cjpeg(pixels, "-grayscale", "-sample", "2x2")
    if kind == "arithmetic":
        return by_cjpeg(pixels, "-arithmetic")
    if kind == "a scan for each colour":
        with tempfile.NamedTemporaryFile("w") as script:
            script.write("0;\n1;\n2;\n")
            script.flush()
            return by_cjpeg(pixels, "-scans", script.name)
    if kind in ("gray", "CMYK"):
        return encoded(pixels, {"gray": "L"}.get(kind, kind))
    if kind.startswith("orientation "):
        exif = Image.Exif()
        exif[0x0112] = int(kind[-1])
        return encoded(pixels, exif=exif)
    options = {
        "RGB": {"keep_rgb": True},
        "progressive": {"progressive": True},
        "progressive 4:4:4": {"progressive": True, "subsampling": 0},
        "optimized": {"optimize": True},
        "restart every 3 MCUs": {"restart_marker_blocks": 3},
        "restart every 2 rows": {"restart_marker_rows": 2},
        "restart every row": {"restart_marker_rows": 1},
    }
    return encoded(pixels, **options[kind])


def by_pillow(data: bytes) -> Pixels:
    """What exact decoding must equal."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def in_rows(jpeg: bytes, offsets: tuple[int, ...], log: list[list[Span]] | None = None) -> RestartRows:
    """A JPEG in memory, to be read in rows; `log` is told which pieces are read."""
    ends = (*offsets, len(jpeg))

    def read(spans: Sequence[Span]) -> bytes:
        if log is not None:
            log.append(list(spans))
        return b"".join(jpeg[ends[first] : ends[stop]] for first, stop in spans)

    return RestartRows(offsets, read)


def rows_inserted(jpeg: bytes) -> tuple[bytes, tuple[int, ...]]:
    """restart_rows.insert; skips the test where it cannot run."""
    if shutil.which("jpegtran") is None:
        pytest.skip("jpegtran is not installed (package libjpeg-turbo-progs)")
    return insert(jpeg)


def boxes(height: int, width: int, count: int = 40, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width): random boxes, then some that end at every kind of boundary between MCUs."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(count):
        box_height, box_width = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
        found.append((int(top), int(left), box_height, box_width))
    for top, bottom in itertools.pairwise((*range(0, height, 8), height)):
        found += [(top, 0, bottom - top, width), (top, 3, 1, 2), (bottom - 1, 3, 1, 2), (0, 0, bottom, width)]
    return found


def repeated_rows(jpeg: bytes, height: int) -> bytes:
    """A JPEG of any height from one with restart rows: its first row of MCUs again and again. Takes no memory."""
    data, offsets = rows_inserted(jpeg)
    header = parse_header(data)
    head = bytearray(data[: offsets[1]])
    head[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    row = [data[start : end - 2] for start, end in itertools.pairwise(offsets[1 : 2 + pieces_per_row(header)])]
    pieces = row * -(-height // header.mcu_height)
    ends = [bytes([0xFF, 0xD0 + number % 8]) for number in range(len(pieces) - 1)] + [b"\xff\xd9"]
    return bytes(head) + b"".join(piece + end for piece, end in zip(pieces, ends, strict=True))
