"""Who takes part in benchmarks/data_pipeline.py: one small module per library, named in one table.

A module's `start(task)` gives a Running contestant. A module whose library reads a form of its own has
`prepare(files, folder)` besides, which writes that form from the folder of JPEG files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

SIZE = 224
"""Height and width of every contestant's images, in pixels."""


@dataclass(frozen=True)
class Task:
    """What a contestant is asked to do."""

    contestant: str
    """A key of CONTESTANTS."""

    files: str
    """Folder of JPEG files: FILES/train/CLASS/NAME.jpg."""

    data: str
    """Folder or file of the form that the contestant reads."""

    num_images: int
    threads: int
    """Threads or worker processes that decode."""

    batch_size: int


@dataclass(frozen=True)
class Running:
    """A contestant that is ready to serve epochs."""

    epoch: Callable[[int], Iterator[Any]]
    """Epoch number -> batches, uint8 arrays or tensors of shape (n, 224, 224, 3) or (n, 3, 224, 224)."""

    versions: dict[str, str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    title: str
    module: str
    form: str
    """Which prepared form of the images it reads: a key of benchmarks.data.sets.FORMS, or its own."""

    packages: tuple[str, ...]
    """What pip has to install for it."""

    resampling: str


CONTESTANTS = {
    "ours-tar-linear": Contestant("ours, tar, linear", "ours", "tar", (), "linear"),
    "ours-tar-antialias": Contestant("ours, tar, antialias", "ours", "tar", (), "antialias"),
    "ours-rows-linear": Contestant("ours, restart rows, linear", "ours", "rows", (), "linear"),
    "ours-rows-antialias": Contestant("ours, restart rows, antialias", "ours", "rows", (), "antialias"),
    "ours-beton-linear": Contestant("ours, .beton, linear", "ours", "beton", (), "linear"),
    "ours-beton-antialias": Contestant("ours, .beton, antialias", "ours", "beton", (), "antialias"),
    "ffcv": Contestant("FFCV Loader", "ffcv_loader", "beton", ("ffcv",), "area"),
    "webdataset-pil": Contestant(
        "webdataset + PIL", "webdataset_tar", "tar", ("webdataset", "torchvision"), "antialias"
    ),
    "webdataset-simplejpeg": Contestant(
        "webdataset + simplejpeg", "webdataset_tar", "tar", ("webdataset", "simplejpeg", "opencv-python"), "linear"
    ),
    "torchvision-v2": Contestant("torchvision + v2", "torchvision_files", "files", ("torchvision",), "antialias"),
    "streaming-pil": Contestant("MosaicML Streaming + PIL", "mosaic", "mds", ("mosaicml-streaming",), "antialias"),
    "dali-cpu": Contestant("NVIDIA DALI, CPU", "dali_cpu", "files", ("nvidia-dali-cuda120",), "antialias"),
}

REFERENCE = "ffcv"
"""Ratios are relative to this contestant."""


def module_of(contestant: str) -> ModuleType:
    """The contestant's module; raises ImportError where its library is not installed."""
    return importlib.import_module(f"benchmarks.data.contestants.{CONTESTANTS[contestant].module}")


def package_versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name."""
    from importlib.metadata import version

    return {package: version(package) for package in packages}
