"""What an unfinished run remembers of each shard that it has written: what lay behind it, and what was found.

With it, the run that continues keeps a shard after reading its source once, without decoding or encoding anything.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.prepare.examine import UnreadableImageError
from data_pipeline.prepare.folder import json_bytes
from data_pipeline.prepare.listing import Item
from data_pipeline.prepare.load import Loading, checksum, read_files
from data_pipeline.shards.files import atomic_write


@dataclass(frozen=True)
class Note:
    """What is known about a shard that was written."""

    sha256: str
    """Of the tar, in hexadecimal."""

    source: str
    """Digest of the source's files, as SourceDigest gives it."""

    left_out: list[tuple[str, str]]
    """(path, reason) of the images that are not in it."""

    counts: dict[str, int]
    """How many of its images have which traits (load.Loaded.traits)."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json_bytes(vars(self)))


def read_note(path: Path) -> Note | None:
    """A note, or None where there is none to be read."""
    try:
        content = json.loads(path.read_bytes())
        left_out = [(str(name), str(reason)) for name, reason in content["left_out"]]
        counts = {str(trait): int(count) for trait, count in content["counts"].items()}
        return Note(str(content["sha256"]), str(content["source"]), left_out, counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the shard is then looked at, or written again


class SourceDigest:
    """A digest of the files behind a shard, added one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, item: Item, crc32: int | None) -> None:
        """`crc32` of its files (load.checksum), or None where they cannot be read."""
        content = "fixed" if not item.modified else str(crc32)
        self._digest.update(json.dumps([item.key, item.name, item.label, content]).encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def source_now(items: list[Item], loading: Loading) -> str:
    """The digest of the files as they are at this moment; those that cannot change are not read."""
    digest = SourceDigest()
    for item in items:
        digest.add(item, source_crc32(item, loading) if item.modified else None)
    return digest.hexdigest()


def source_crc32(item: Item, loading: Loading) -> int | None:
    """Of an item's files as the source holds them; None where they cannot be read."""
    try:
        return checksum(read_files(item, loading))
    except UnreadableImageError:
        return None
