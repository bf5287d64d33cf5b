"""Looking at one image file before it goes into a shard."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from data_pipeline import jpeg
from data_pipeline.decode import DecodeError, decode_image

_ORIENTATION_TAG = 0x0112
_EXTENSIONS = {"TIFF": "tif"}  # of Pillow's formats whose extension is not their name

CMYK, PROGRESSIVE, GRAYSCALE = "CMYK", "progressive", "grayscale"
ROTATED, NOT_JPEG = "rotated by EXIF", "not JPEG"
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

    orientation: int = 1
    """As EXIF notes it, 1 (upright) to 8."""

    traits: tuple[str, ...] = ()
    """What is unusual about the file: "CMYK", "progressive", "grayscale", "rotated by EXIF", "not JPEG"."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) as a viewer shows it."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def examine(data: bytes) -> ImageFacts:
    """Decode an image exactly as strictly as training will, and say what it is; raises UnreadableImageError."""
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        decode_image(data)
        return _jpeg_facts(data) if data.startswith(jpeg.START) else _other_facts(data)
    except DecodeError as error:
        raise UnreadableImageError(_MEMORY_ADDRESS.sub("", str(error))) from error
    except Exception as error:  # image libraries fail in many ways on bytes from outside; each is reported by its path
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _jpeg_facts(data: bytes) -> ImageFacts:
    header = jpeg.parse_header(data)
    found = {
        CMYK: header.components == 4,
        PROGRESSIVE: header.progressive,
        GRAYSCALE: header.components == 1,
        ROTATED: header.orientation != 1,
    }
    traits = tuple(trait for trait, present in found.items() if present)
    return ImageFacts(header.width, header.height, header.subsampling, "jpg", header.orientation, traits)


def _other_facts(data: bytes) -> ImageFacts:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        name = image.format or ""
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        traits = (NOT_JPEG,) if orientation == 1 else (NOT_JPEG, ROTATED)
        return ImageFacts(
            image.width, image.height, "not a JPEG", _EXTENSIONS.get(name, name.lower()), orientation, traits
        )
