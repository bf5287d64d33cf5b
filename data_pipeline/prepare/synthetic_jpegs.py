"""Photograph-like JPEGs, drawn rather than found: for benchmarks and for trying a whole set of any size.

An image is noise with as much contrast in every octave of spatial frequency, which is what photographs have (D. J.
Field, "Relations between the statistics of natural images and the response properties of cortical cells", 1987), under
a few shapes with sharp edges whose outline and hue tell the class. As JPEGs of quality 90 they are about as large as
photographs of the same size, and cost as much to decode.
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import hashlib
import io
import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.listing import Item, Listing, SourceFiles
from data_pipeline.shards.source import DataError

NAME = "synthetic"
HELP = "photograph-like JPEGs made from a seed, for benchmarks; nothing to download"

_DESCRIPTION = """\
Make JPEGs that are about as large, and as much work to decode, as photographs. Outline and hue of the shapes in an
image tell its class. An image is a function of the seed, its split, its number, --size, --vary and --classes, and of
the libraries that draw and encode it: another version of NumPy, Pillow or libjpeg-turbo may give other bytes."""

_EPILOG = """\
examples:
  python -m data_pipeline.prepare synthetic --out bench                            10,000 + 1,000 of 500x375, 1.0 GB
  python -m data_pipeline.prepare synthetic --out bench --images 1281167 --val-images 50000 --vary --num-shards 1024

Shards are cut by an estimate of the images' sizes: with --shard-size in bytes they are that large within some percent.
"""

_QUALITY = 90
_BYTES_PER_PIXEL = 0.5
_SMALLEST, _LARGEST = 32, 8192
_BRIGHTNESS, _COLOUR = 36, 14  # contrast that an octave adds, of 255
_COARSE = 2  # octaves from this one on have colour
_GRAIN = (4, 20)  # of the finest detail, least and most: photographs of one size differ as much in bytes
_SIDES = (0, 3, 4, 5, 6)  # 0: an ellipse
_ASPECTS = ((4, 3), (4, 3), (3, 4), (3, 2), (1, 1), (2, 3), (16, 9))


@dataclass(frozen=True)
class Recipe:
    """All that an image depends on beside its split and number."""

    width: int
    height: int
    vary: bool
    classes: int
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many images of which size."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="to train on; default %(default)s")
    parser.add_argument("--val-images", type=int, default=1_000, metavar="N", help="held out; default %(default)s")
    parser.add_argument("--classes", type=int, default=1_000, metavar="N", help="default %(default)s")
    parser.add_argument("--size", default="500x375", metavar="WxH", help="in pixels; default %(default)s")
    parser.add_argument(
        "--vary",
        action="store_true",
        help="images of different sizes and shapes, as in collected sets: on average as many pixels as --size has",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default %(default)s")


def list_source(arguments: argparse.Namespace) -> Listing:
    """The images to be made; nothing is drawn before it is read, in whichever process does that."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", arguments.size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (_SMALLEST <= width <= _LARGEST and _SMALLEST <= height <= _LARGEST):
        raise DataError(f"--size {arguments.size}: give width x height, {_SMALLEST} to {_LARGEST}, such as 500x375.")
    for name in ("images", "val_images", "classes"):
        if getattr(arguments, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}.")
    recipe = Recipe(width, height, arguments.vary, arguments.classes, arguments.seed)
    estimate = round(width * height * _BYTES_PER_PIXEL)
    splits = {
        split: [
            Item(f"{number:08d}", f"{split}/{number:08d}", number % recipe.classes, estimate, place=(split, number))
            for number in range(count)
        ]
        for split, count in (("train", arguments.images), ("val", arguments.val_images))
    }
    options = {name: str(getattr(arguments, name)) for name in ("size", "vary", "classes", "seed")}
    names = tuple(f"class-{label:05d}" for label in range(recipe.classes))
    return Listing(NAME, options, names, splits, functools.partial(_read, recipe))


def _read(recipe: Recipe, item: Item) -> SourceFiles:
    split, number = item.place
    return SourceFiles(draw_jpeg(recipe, split, number))


def draw_jpeg(recipe: Recipe, split: str, number: int) -> bytes:
    """The JPEG file of an image: a function of its arguments alone (and of the libraries that draw and encode it)."""
    from PIL import Image

    key = hashlib.sha256(f"{recipe.seed} {split}".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8"), counter=[0, 0, 0, number]))
    width, height = _varied(recipe, rng) if recipe.vary else (recipe.width, recipe.height)
    picture = Image.fromarray(_noise(width, height, rng))
    _draw_shapes(picture, number % recipe.classes, rng)
    contrast = int(rng.integers(*_GRAIN))
    grain = _uniform(rng, contrast, (height, width, 1))
    pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _varied(recipe: Recipe, rng: np.random.Generator) -> tuple[int, int]:
    """A width and a height, with half to one and a half times as many pixels as the recipe says."""
    across, down = _ASPECTS[rng.integers(len(_ASPECTS))]
    unit = math.sqrt(recipe.width * recipe.height * rng.uniform(0.5, 1.5) / (across * down))
    return max(_SMALLEST, round(unit * across)), max(_SMALLEST, round(unit * down))


def _noise(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Coloured noise, uint8 (height, width, 3): octave by octave, each at twice the resolution of the one before."""
    from PIL import Image

    octaves = max(1, math.ceil(math.log2(max(width, height) / 4)))
    pixels = np.full((1, 1, 3), 128, dtype=np.uint8)
    for octave in range(octaves, -1, -1):
        size = (math.ceil(width / 2**octave), math.ceil(height / 2**octave))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        if octave:  # the finest is added last, over the shapes too
            change = _uniform(rng, _BRIGHTNESS, (size[1], size[0], 1))
            if octave >= _COARSE:  # colours change less than brightness, and slower
                change = change + _uniform(rng, _COLOUR, (size[1], size[0], 3))
            pixels = np.clip(pixels + change, 0, 255).astype(np.uint8)
    return pixels


def _uniform(rng: np.random.Generator, most: int, shape: tuple[int, ...]) -> npt.NDArray[np.int16]:
    """Whole numbers from -most to most."""
    return rng.integers(-most, most + 1, shape, dtype=np.int16)


def _draw_shapes(picture: object, label: int, rng: np.random.Generator) -> None:
    """Draw 3 to 7 shapes of the class's outline and hue into a Pillow image."""
    from PIL import Image, ImageDraw

    assert isinstance(picture, Image.Image)
    draw = ImageDraw.Draw(picture)
    sides = _SIDES[label % len(_SIDES)]
    hue = (label // len(_SIDES)) * 0.618034 % 1.0  # the golden ratio spreads the hues of any number of classes evenly
    for _ in range(int(rng.integers(3, 8))):
        radius = min(picture.size) * float(rng.uniform(0.05, 0.22))
        x, y = float(rng.uniform(0, picture.width)), float(rng.uniform(0, picture.height))
        rgb = colorsys.hsv_to_rgb(hue, float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.4, 1.0)))
        fill = (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))
        if sides:
            draw.regular_polygon((x, y, radius), sides, rotation=float(rng.uniform(0, 360)), fill=fill)
        else:
            draw.ellipse((x - radius, y - radius * 0.7, x + radius, y + radius * 0.7), fill=fill)
