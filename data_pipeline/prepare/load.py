"""From an item of a listing to what goes into a shard: read it, examine it, or say why it cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.prepare.examine import ImageFacts, UnreadableImageError, examine
from data_pipeline.prepare.listing import Item, SourceFiles

Read = Callable[[Item], SourceFiles]


@dataclass(frozen=True)
class Loaded:
    """An item's files, proved to be usable."""

    files: SourceFiles
    facts: ImageFacts


def load(item: Item, read: Read) -> Loaded:
    """Read an item and decode its image as strictly as training does; raises UnreadableImageError saying why not."""
    files = read_files(item, read)
    return Loaded(files, examine(files.image))


def read_files(item: Item, read: Read) -> SourceFiles:
    """An item's files; raises UnreadableImageError where they cannot be read."""
    try:
        return read(item)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except ValueError as error:  # the converter says what is wrong with what it found
        raise UnreadableImageError(str(error)) from error
