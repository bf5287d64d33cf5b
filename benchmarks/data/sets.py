"""The images of the benchmark and the forms in which the contestants read them; made once and kept.

FOLDER/NAME/files/train/CLASS/NNNN.jpg    the JPEG files, everybody's source
FOLDER/NAME/FORM                          the same bytes as tar shards, tar shards with restart rows, .beton, ...
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.data.team import REPOSITORY

HEIGHT, WIDTH = 375, 500  # the most frequent size of ImageNet's images
QUALITY = 90
_CLASSES = 10
_SHARDS = "8"  # enough for worker processes that share shards
FORMS = {
    "tar": ["--num-shards", _SHARDS],
    "rows": ["--num-shards", _SHARDS, "--restart-rows"],
    "beton": ["--format", "ffcv"],
}
"""Forms that `python -m data_pipeline.prepare imagefolder` makes, with its arguments."""


class PrepareError(Exception):
    """A form of the images could not be made; the message is for the table."""


def generated_files(folder: Path, count: int) -> Path:
    """`count` ImageNet-like JPEGs, 500x375, 4:2:0, quality 90, about 90 KB, always the same; returns their folder."""
    files = folder / f"generated-{count}" / "files"
    if not files.is_dir():
        partial = _fresh(files)
        for number in range(count):
            path = _path(partial, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(generate_jpeg(number))
        partial.rename(files)
    return files


def generate_jpeg(number: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Noise with the spectrum of photographs (amplitude 1 / frequency), in colours that vary less than brightness."""
    from PIL import Image

    rng = np.random.default_rng([0, number])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean
    planes = rng.standard_normal((3, height, width), dtype=np.float32)
    exponent = rng.uniform(1.0, 1.3)
    planes = np.fft.irfft2(np.fft.rfft2(planes) / frequency**exponent, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    brightness, *colours = planes * np.array([_CONTRAST, 20, 20])[:, None, None]
    pixels: npt.NDArray[np.float64] = np.stack(
        [brightness + colours[0], brightness - colours[0] / 2 - colours[1] / 2, brightness + colours[1]], axis=-1
    )
    file = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + rng.uniform(90, 150), 0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


_CONTRAST = 40


def photo_files(folder: Path, photos: Path, copies: int = 3) -> Path:
    """The JPEG files of a tar, each `copies` times, so that an epoch is long enough to be timed."""
    files = folder / f"{photos.stem}-x{copies}" / "files"
    if not files.is_dir():
        partial = _fresh(files)
        with tarfile.open(photos) as tar:
            members = [member for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))]
            for number, member in enumerate(copies * members):
                file = tar.extractfile(member)
                if file is None:
                    raise PrepareError(f"{photos}: {member.name} is no file")
                path = _path(partial, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
        partial.rename(files)
    return files


def num_files(files: Path) -> int:
    """Number of images of a set."""
    return sum(1 for _ in (files / "train").glob("*/*"))


def prepare_form(files: Path, form: str) -> Path:
    """Make one of FORMS from the files with this repository's own command; raises PrepareError."""
    folder = files.parent / form
    command = [sys.executable, "-m", "data_pipeline.prepare", "imagefolder", "--src", str(files), "--out", str(folder)]
    command += ["--splits", "train", *FORMS[form]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise PrepareError(f"`{' '.join(command[1:])}` ended with {done.returncode}: {lines[-1]}")
    return folder


def _path(folder: Path, number: int) -> Path:
    return folder / "train" / f"class-{number % _CLASSES:02d}" / f"{number:06d}.jpg"


def _fresh(folder: Path) -> Path:
    """An empty folder to be renamed to `folder` when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
