"""Small image folders and shards, made anew for each test session."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import FaultyServer, serving

ImageFile = Callable[..., bytes]
ImageTree = Callable[..., Path]


def _image_file(seed: int, width: int = 40, height: int = 30, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def image_file() -> ImageFile:
    """image_file(seed, width=40, height=30, kind="JPEG", mode="RGB"): the bytes of an image file."""
    return _image_file


@pytest.fixture(scope="session")
def image_tree() -> ImageTree:
    """image_tree(folder, {"train": {"cat": 5}}): writes folder/train/cat/0000.jpg ... and returns the folder."""

    def write(folder: Path, splits: dict[str, dict[str, int]]) -> Path:
        seed = 0
        for split, classes in splits.items():
            for name, count in classes.items():
                (folder / split / name).mkdir(parents=True)
                for number in range(count):
                    seed += 1
                    path = folder / split / name / f"{number:04d}.jpg"
                    path.write_bytes(_image_file(seed, width=33 + seed % 9, height=30 + seed % 7))
        return folder

    return write


@pytest.fixture(scope="session")
def shard_source(tmp_path_factory: pytest.TempPathFactory, image_tree: ImageTree) -> Path:
    """The images behind `shard_folder`: bird, cat and dog with 9, 8, 7 images to train on, and 5, 4, 2 held out."""
    splits = {"train": {"bird": 9, "cat": 8, "dog": 7}, "val": {"bird": 5, "cat": 4, "dog": 2}}
    return image_tree(tmp_path_factory.mktemp("source"), splits)


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory, shard_source: Path) -> Path:
    """3 classes; 24 training images in 4 shards of 6, 11 to validate in 2 shards. Tests do not write into it."""
    from data_pipeline.prepare import main

    out = tmp_path_factory.mktemp("shards") / "set"
    assert main(["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", "1"]) == 0
    return out


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    """A copy of `shard_folder` that a test may damage."""
    shutil.copytree(shard_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def flip() -> Callable[[Path, int], None]:
    """flip(path, position): changes one bit of a file."""

    def flip_bit(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 0x01
        path.write_bytes(data)

    return flip_bit


@pytest.fixture(scope="session")
def large_set(image_tree: ImageTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, one training shard of about 2 MB: more than a connection has under way."""
    from data_pipeline.prepare import main

    folder = tmp_path_factory.mktemp("large")
    images = image_tree(folder / "images", {"train": {"a": 2, "b": 1, "c": 1}, "val": {"a": 1, "b": 1, "c": 1}})
    noise = np.random.Generator(np.random.PCG64(0))
    for path in (images / "train").rglob("*.jpg"):
        Image.fromarray(noise.integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(path, quality=95)
    assert main(["imagefolder", "--src", str(images), "--out", str(folder / "set"), "--jobs", "1"]) == 0
    return folder / "set"


@pytest.fixture
def server(shard_folder: Path) -> Iterator[FaultyServer]:
    """`shard_folder`, given out by a server on loopback."""
    with serving(shard_folder) as running:
        yield running


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch from servers on loopback, with hardly a pause between tries."""
    from data_pipeline.shards import fetch

    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
