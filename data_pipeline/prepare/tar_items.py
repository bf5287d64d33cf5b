"""Items whose images lie in tars (or are files of their own), and what the archives of ImageNet's releases hold.

images.tar            holds one tar per class, or the images themselves
images.tar/n01440764.tar/n01440764_18.JPEG
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline.prepare.imagefolder import EXTENSIONS
from data_pipeline.prepare.listing import Item, SourceFiles
from data_pipeline.prepare.tar_members import Contents, list_members, list_until_damage, read_member
from data_pipeline.progress import progress_bar

WNID = re.compile(r"n\d{8}")
"""A WordNet id, as ImageNet names its classes."""

_CLASS_TAR = re.compile(rf"(?:.*/)?({WNID.pattern})\.tar")
_THREADS = 16  # reading headers waits for the disk, or the network, and not for the processor

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def read_item(item: Item) -> SourceFiles:
    """The image at `item.place`: (path, offset), or a text saying why there is none. Raises OSError, ValueError."""
    if isinstance(item.place, str):
        raise ValueError(item.place)
    path, offset = item.place
    return SourceFiles(read_member(path, offset, item.size))


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image. Hidden files, such as macOS adds to a tar, are none."""
    return not _is_hidden(name) and os.path.splitext(name)[1].lower().removeprefix(".") in EXTENSIONS


def _is_hidden(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith(".")


@dataclass(frozen=True)
class ClassTar:
    """A tar with the images of one class: a file, or a member of a larger tar."""

    wnid: str
    path: str
    start: int
    size: int


@dataclass(frozen=True)
class ClassImages:
    """What a class tar holds."""

    wnid: str
    files: list[FoundImage]
    ignored: Counter[str]
    damage: str
    """Why there may be more; empty where the tar was read to its end."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image file, not yet read."""

    name: str
    size: int
    modified: float
    place: tuple[str, int]


def class_tars_in(source: Path, ignored: Counter[str]) -> list[ClassTar]:
    """The class tars of a folder, or of one large tar, in the order of their classes; other files are counted.

    Raises DamagedTarError, OSError.
    """
    if source.is_dir():
        files = [(entry.name, str(entry), 0, entry.stat().st_size) for entry in source.iterdir() if entry.is_file()]
    else:
        contents = list_members(source)
        ignored.update({kind: count for kind, count in contents.passed_over.items() if kind != "folder"})
        files = [(member.name, str(source), member.offset, member.size) for member in contents.members]
    found = []
    for name, path, start, size in files:
        match = _CLASS_TAR.fullmatch(name)
        if match:
            found.append(ClassTar(match[1], path, start, size))
        else:
            ignored[kind_of(name)] += 1
    return sorted(found, key=lambda tar: (tar.wnid, tar.path, tar.start))


def list_class_tars(tars: list[ClassTar]) -> Iterator[ClassImages]:
    """What each of the tars holds, in their order; shows its progress."""
    return in_threads(_list_class_tar, tars, "reading class tars")


def _list_class_tar(tar: ClassTar) -> ClassImages:
    return images_among(tar.wnid, list_until_damage(tar.path, tar.start, tar.size), tar.path, f"{tar.wnid}.tar/")


def images_among(wnid: str, contents: Contents, path: str, prefix: str) -> ClassImages:
    """The images of a tar in the file `path`; the rest is counted."""
    modified = os.stat(path).st_mtime
    ignored = Counter({kind: count for kind, count in contents.passed_over.items() if kind != "folder"})
    files = []
    for member in contents.members:
        if is_image(member.name):
            files.append(FoundImage(prefix + member.name, member.size, modified, (path, member.offset)))
        else:
            ignored[kind_of(member.name)] += 1
    return ClassImages(wnid, files, ignored, contents.damage)


def kind_of(name: str) -> str:
    """How a file that is no image is counted."""
    return "hidden" if _is_hidden(name) else os.path.splitext(name)[1].lower() or "without extension"


def in_threads(function: Callable[[_Job], _Result], jobs: list[_Job], what: str) -> Iterator[_Result]:
    """`function` of each job, in their order, with a progress bar."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with progress_bar(what, len(jobs), "files") as advance:
            for result in pool.map(function, jobs):
                advance(1)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def some(names: Iterable[object], limit: int = 5) -> str:
    """The first few, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit:,} more" if len(listed) > limit else "")
