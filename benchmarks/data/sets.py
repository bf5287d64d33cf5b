"""The images of the benchmark and the forms in which the contestants read them; made once and kept.

FOLDER/NAME/files/train/CLASS/NNNN.jpg    the JPEG files, everybody's source
FOLDER/NAME/FORM                          the same bytes as tar shards, tar shards with restart rows, .beton, ...
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.data.team import REPOSITORY
from data_pipeline.prepare import synthetic_jpegs

_SIZE = "500x375"  # the most frequent one of ImageNet
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
    """The first `count` images of `python -m data_pipeline.prepare synthetic` (500x375, quality 90) as files."""
    files = folder / f"generated-{count}" / "files"
    if not files.is_dir():
        partial = _fresh(files)
        recipe = {"images": count, "val_images": 1, "classes": _CLASSES, "size": _SIZE, "vary": False, "seed": 0}
        listing = synthetic_jpegs.list_source(argparse.Namespace(**recipe))
        for number, item in enumerate(listing.splits["train"]):
            _write(partial, number, listing.read(item).image)
        partial.rename(files)
    return files


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
                _write(partial, number, file.read())
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


def _write(folder: Path, number: int, image: bytes) -> None:
    path = folder / "train" / f"class-{number % _CLASSES:02d}" / f"{number:06d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)


def _fresh(folder: Path) -> Path:
    """An empty folder to be renamed to `folder` when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
