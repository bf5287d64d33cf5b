"""Images that are too large to be decoded, or large enough to be decoded one at a time."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jpegs
import pytest

from data_pipeline import decode
from data_pipeline.config import Decoding
from data_pipeline.decode import DecodeError, open_image
from data_pipeline.restart_rows import find_rows


def _claims(kind: str, height: int, width: int) -> bytes:
    """A small file whose header claims a size."""
    if kind == "JPEG":
        data = bytearray(jpegs.of_kind("4:2:0"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    if kind == "PNG":
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
        body = b"IDAT" + zlib.compress(b"\0")
        chunks = [
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + end
    data = bytearray(jpegs.encoded(jpegs.textured(16, 16), kind="WEBP", lossless=kind == "WebP lossless"))
    if kind == "WebP lossless":
        data[21:25] = (width - 1 | (height - 1) << 14).to_bytes(4, "little")
    elif kind == "WebP":
        data[26:30] = struct.pack("<HH", width, height)
    else:  # extended: a chunk with the size of the canvas goes in front
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        data[12:12] = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
        data[4:8] = struct.pack("<I", len(data) - 8)
    return bytes(data)


BOMBS = [("JPEG", 65000), ("PNG", 200_000), ("WebP", 16383), ("WebP lossless", 16383), ("WebP extended", 1 << 24)]


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow only"])
@pytest.mark.parametrize(("kind", "side"), BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(
    monkeypatch: pytest.MonkeyPatch, kind: str, side: int, decoder: str
) -> None:
    if decoder == "pillow only":
        monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    with pytest.raises(DecodeError, match=f"its header claims {side:,} x {side:,} pixels, more than the 178,956,970"):
        open_image(_claims(kind, side, side))


_MEASURED = """
import resource, sys
from data_pipeline import decode
{imports}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
{program}
print(peak() - before)
"""


def _peak_mib(imports: str, program: str, *arguments: object) -> float:
    """What a program adds, after its imports, to the peak of the memory that its process holds."""
    command = [sys.executable, "-c", _MEASURED.format(imports=imports, program=program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


FRAME_MIB = 9000 * 12_000 * 3 / 2**20


_SERVING = """
import threading
import numpy as np
import simplejpeg
import torch
from data_pipeline.batch import Batch, EpochReader, LabelledImages
from data_pipeline.config import DataConfig
from data_pipeline.restart_rows import RestartRows
from data_pipeline.shards.source import RawSample
from data_pipeline.transforms import eval_transform, resize, train_transform
data = open(sys.argv[1], "rb").read()
ends = (*map(int, sys.argv[2].split()), len(data))
rows = RestartRows(ends[:-1], lambda spans: b"".join(data[ends[first] : ends[stop]] for first, stop in spans))
resize(np.zeros((64, 64, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), "antialias")
class Source:
    def __len__(self): return 8
    def read(self, index): return RawSample(str(index), IMAGE, 0, "shard", verified=True)
placing = LabelledImages(TRANSFORM(DataConfig(image_size=224)))
reader = EpochReader(Source(), placing, 0, 0, False, decoding=DECODING)
images = torch.zeros((4, 224, 224, 3), dtype=torch.uint8)
ids, nothing = torch.arange(4), torch.zeros(4, dtype=torch.int64)
batch = Batch(images, nothing.clone(), ids, nothing, ids, torch.ones(4, dtype=torch.bool), [])
def work(number):
    reader.fill(batch, range(number, number + 1))
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
"""

_FOUR_THREADS = """
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(image.numpy().std() > 5 for image in images)
"""


@pytest.mark.parametrize(
    ("decoding", "transform", "image", "most_mib"),
    [
        (
            "fast",
            "train_transform",
            "data",
            100,
        ),  # at 1/8 of the size a frame takes 5 MiB, and libjpeg's rows some more
        ("fast", "eval_transform", "rows", 160),  # its 20 MB are read, joined and cut, and malloc keeps what is freed
        ("exact", "train_transform", "data", 2.2 * FRAME_MIB),  # one frame and one box at a time, of four threads
    ],
)
def test_memory_for_a_12000_x_9000_image_is_bounded(
    tmp_path: Path, decoding: Decoding, transform: str, image: str, most_mib: float
) -> None:
    pytest.importorskip("simplejpeg")
    strip = jpegs.by_cjpeg(jpegs.textured(32, 12_000), "-sample", "2x2", "-quality", "60")
    large = jpegs.repeated_rows(strip, 9000)
    (tmp_path / "large.jpg").write_bytes(large)
    serving = _SERVING.replace("DECODING", repr(decoding)).replace("TRANSFORM", transform).replace("IMAGE", image)
    offsets = " ".join(map(str, find_rows(large)))
    assert len(offsets.split()) == 1 + 563 * 6
    assert _peak_mib(serving, _FOUR_THREADS, tmp_path / "large.jpg", offsets) < most_mib


def test_refusing_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    for number, (kind, side) in enumerate(BOMBS):
        (tmp_path / str(number)).write_bytes(_claims(kind, side, side))
    (tmp_path / "sound").write_bytes(jpegs.encoded(jpegs.textured(9, 9), kind="WEBP"))
    warm_up = "decode.decode_image(open(sys.argv[1], 'rb').read())"
    refused = """
for path in sys.argv[2:]:
    try:
        decode.decode_image(open(path, "rb").read())
    except decode.DecodeError:
        continue
    raise AssertionError(path)
"""
    bombs = [tmp_path / str(number) for number in range(len(BOMBS))]
    assert _peak_mib(warm_up, refused, tmp_path / "sound", *bombs) < 10
