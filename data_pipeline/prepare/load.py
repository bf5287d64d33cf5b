"""From an item of a listing to what goes into a shard: read it, examine it, encode it anew, or say why it is no use."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from data_pipeline import restart_rows
from data_pipeline.prepare import recode
from data_pipeline.prepare.examine import ImageFacts, UnreadableImageError, examine
from data_pipeline.prepare.listing import Item, Kind, Listing, ResizeTarget, SourceFiles
from data_pipeline.prepare.options import Recode
from data_pipeline.targets import TargetCheck, TargetError, target_check

RESIZED, ROWS_INSERTED, WITHOUT_ROWS = "made smaller", "given restart rows", "unable to take restart rows"


@dataclass(frozen=True)
class Loading:
    """How the items of one listing are loaded; picklable."""

    read: Callable[[Item], SourceFiles]
    kind: Kind = "classification"
    target_extension: str = ""
    resize_target: ResizeTarget | None = None
    recode: Recode = field(default_factory=Recode)
    check_target: TargetCheck | None = None

    @classmethod
    def of(cls, listing: Listing, recode: Recode) -> Loading:
        check = target_check(listing.kind, len(listing.classes), listing.targets)
        return cls(listing.read, listing.kind, listing.target_extension, listing.resize_target, recode, check)


@dataclass(frozen=True)
class Loaded:
    """An item's files as they go into a shard, proved to be usable."""

    files: SourceFiles
    facts: ImageFacts
    """Of the image in `files`."""

    rows: tuple[int, ...] = ()
    """Where the pieces of a JPEG with restart rows begin (data_pipeline.restart_rows), in bytes; empty without them."""

    traits: tuple[str, ...] = ()
    """What is worth counting: what the source's image was, and what was done to it."""


def load(item: Item, loading: Loading) -> Loaded:
    """Read an item, decode its image as strictly as training does, and change it as `loading.recode` says.

    Raises UnreadableImageError saying why it cannot be used.
    """
    return usable(read_files(item, loading), loading)


def read_files(item: Item, loading: Loading) -> SourceFiles:
    """An item's files as the source holds them; raises UnreadableImageError where they cannot be read."""
    try:
        return loading.read(item)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except ValueError as error:  # the converter says what is wrong with what it found
        raise UnreadableImageError(str(error)) from error


def usable(files: SourceFiles, loading: Loading) -> Loaded:
    """The files of an item as they go into a shard; raises UnreadableImageError."""
    if loading.target_extension and files.target is None:
        raise UnreadableImageError(f"there is no {loading.target_extension} for it")
    facts = examine(files.image)
    if loading.check_target is not None and files.target is not None:
        _check_target(files.target, facts, loading.check_target)
    loaded = Loaded(files, facts, traits=facts.traits)
    max_size = loading.recode.max_size
    if max_size is not None and min(facts.width, facts.height) > max_size:
        loaded = _resized(loaded, max_size, loading)
    return _with_rows(loaded, loading.recode) if loaded.facts.extension == "jpg" else loaded


def _check_target(target: bytes, facts: ImageFacts, check: TargetCheck) -> None:
    try:
        check(target, facts.upright_size)
    except TargetError as error:
        raise UnreadableImageError(str(error)) from error


def checksum(files: SourceFiles) -> int:
    """CRC-32 of an item's files as the source holds them."""
    return zlib.crc32(files.target or b"", zlib.crc32(files.image))


def _resized(loaded: Loaded, max_size: int, loading: Loading) -> Loaded:
    before = loaded.facts
    image = recode.smaller(loaded.files.image, max_size, loading.recode.quality, grey=before.subsampling == "Gray")
    facts = examine(image)
    target = loaded.files.target
    if target is not None and loading.resize_target is not None:
        target = loading.resize_target(target, before.upright_size, (facts.height, facts.width))
    return Loaded(SourceFiles(image, target), facts, traits=(*loaded.traits, RESIZED))


def _with_rows(loaded: Loaded, chosen: Recode) -> Loaded:
    """Note the restart rows that a JPEG has, or give it some where that was chosen."""
    image = loaded.files.image
    rows = restart_rows.find_rows(image)
    if rows or not chosen.restart_rows:
        return replace(loaded, rows=rows)
    image, rows = recode.with_restart_rows(image)
    trait = ROWS_INSERTED if rows else WITHOUT_ROWS
    return replace(loaded, files=replace(loaded.files, image=image), rows=rows, traits=(*loaded.traits, trait))
