"""Looking at one image file before it goes into a shard."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from data_pipeline.decode import DecodeError, decode_image
from data_pipeline.shards.shard_index import SUBSAMPLINGS

_JPEG_START = b"\xff\xd8"
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of Pillow's formats whose extension is not their name
_MEMORY_ADDRESS = re.compile(r" ?<_io\.BytesIO[^>]*>")  # in Pillow's messages; it differs from run to run


class UnreadableImageError(Exception):
    """The file cannot be used for training; the message says why."""


@dataclass(frozen=True)
class ImageFacts:
    """What the index says about an image."""

    width: int
    height: int
    subsampling: str

    extension: str
    """What the file's content says that its extension should be, whatever it is called."""


def examine(data: bytes) -> ImageFacts:
    """Decode an image exactly as strictly as training will, and say what it is; raises UnreadableImageError."""
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        decode_image(data)
        return _jpeg_facts(data) if data[:2] == _JPEG_START else _other_facts(data)
    except DecodeError as error:
        raise UnreadableImageError(_MEMORY_ADDRESS.sub("", str(error))) from error
    except Exception as error:  # image libraries fail in many ways on bytes from outside; each is reported by its path
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _jpeg_facts(data: bytes) -> ImageFacts:
    try:
        import simplejpeg
    except ImportError:
        return _other_facts(data)
    height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
    return ImageFacts(width, height, subsampling if subsampling in SUBSAMPLINGS else "other", "jpg")


def _other_facts(data: bytes) -> ImageFacts:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        name = image.format or ""
        extension = _EXTENSIONS.get(name, name.lower())
        return ImageFacts(image.width, image.height, "other" if extension == "jpg" else "not a JPEG", extension)
