"""From a listing to one .beton file per split, as the ffcv package reads it, with JPEGs copied byte by byte.

The ffcv package does the writing (its DatasetWriter, field classes and page allocator), in this process and one sample
after the other, so that the same input gives the same bytes and an error ends the run: where ffcv's own writer
processes fail, it waits for them for ever. Images are read and checked beside that, by `jobs` processes.

    OUT/SPLIT.beton    fields "image" (RGBImageField) and "label" (IntField), samples in the order of the tar shards
    OUT/SPLIT.crc32    CRC-32 of every image, 4 bytes each
    OUT/index.json     classes, and per split: samples, bytes, SHA-256; written last
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.decode import decode_image
from data_pipeline.prepare import folder
from data_pipeline.prepare.beton_file import LARGEST_PAGE, PageTooSmallError, Stored, write_beton
from data_pipeline.prepare.build import Outcome, record_of
from data_pipeline.prepare.examine import CMYK, UnreadableImageError
from data_pipeline.prepare.left_out import (
    LEFT_OUT_FILE,
    LeftOut,
    nothing_left,
    printable,
    read_lines,
    stopped_by,
    to_lines,
)
from data_pipeline.prepare.listing import Item, Listing, mixed
from data_pipeline.prepare.load import Loading, load
from data_pipeline.prepare.options import BuildOptions
from data_pipeline.prepare.parallel import end_with_parent
from data_pipeline.progress import progress_bar
from data_pipeline.shards import set_index
from data_pipeline.shards.beton import (
    CHECKSUM_SUFFIX,
    BetonIndex,
    BetonSource,
    SplitFile,
    index_to_bytes,
    load_index,
)
from data_pipeline.shards.beton_format import SUFFIX
from data_pipeline.shards.files import TEMPORARY_PREFIX, atomic_write, sha256_of_file
from data_pipeline.shards.set_index import SetIndex, SplitIndex
from data_pipeline.shards.source import DataError

STORED_RAW = "stored as pixels"

# ffcv's own choice. An image lies within one page, so that larger images make all pages larger.
_PAGE_BYTES = 1 << 23
_LARGEST_SIDE = (1 << 16) - 1
_CHUNK_ITEMS, _CHUNK_BYTES = 16, 1 << 20  # that a process takes at a time
_WITHOUT_FFCV = (
    "--format ffcv needs the ffcv package, which {}: pip install 'dgt[ffcv]', after the system packages that "
    "docs/data.md names. Reading .beton files needs neither."
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class _Work:
    """How the items of one split become samples; picklable."""

    split: str
    loading: Loading
    raw_fraction: float

    def sample(self, item: Item) -> Stored | LeftOut:
        """Read an item and decode it as strictly as training does."""
        try:
            return self._stored(item)
        except UnreadableImageError as error:
            return LeftOut(self.split, item.name, str(error))

    def samples(self, items: list[Item]) -> list[Stored | LeftOut]:
        return [self.sample(item) for item in items]

    def _stored(self, item: Item) -> Stored:
        loaded = load(item, self.loading)
        facts, image = loaded.facts, loaded.files.image
        height, width = facts.upright_size
        if max(height, width) > _LARGEST_SIDE or 3 * height * width > LARGEST_PAGE:
            raise UnreadableImageError(f"{height} x {width} pixels are more than a .beton file can hold")
        # What ffcv's decoder would not show as a viewer does, it gets as pixels.
        jpeg = facts.extension == "jpg" and facts.orientation == 1 and CMYK not in facts.traits
        chosen = 3 * height * width <= _PAGE_BYTES and _share(item.key) < self.raw_fraction
        if jpeg and not chosen:
            return Stored(item.label, image, height, width, loaded.traits)
        pixels = decode_image(image, "exact")
        return Stored(item.label, pixels, height, width, (*loaded.traits, STORED_RAW))


def _share(key: str) -> float:
    """A number in [0, 1) that looks random, depends on the key alone, and says nothing about the order of samples."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6, person=b"stored raw").digest(), "big") / 2**48


def build_beton(listing: Listing, out: Path, options: BuildOptions) -> Outcome:
    """Make the folder `out` hold the listing's images as one .beton file per split.

    Upright JPEGs in gray or colour are copied; `options.raw_fraction` of them, chosen by their keys and none above
    8 MiB of pixels, and everything else, is stored as the pixels of exact decoding. A finished folder is left as it is;
    what a killed run left behind is thrown away. Raises DataError where the ffcv package is missing, where `out` holds
    something else or cannot be written, where the source of a finished folder has changed, and where images are
    unreadable and `options.stop_on_error` is set.
    """
    _require_possible(listing, options)
    try:
        if not (out / folder.RECORD_FILE).exists():  # once `out` is claimed, other options would be refused
            _require_space(listing, out, options)
        folder.claim(out, record_of(listing, options))
        with folder.locked(out, shared=False, whose=f"Another run is preparing {out}"):
            return _finished(listing, out, options) or _build_locked(listing, out, options)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DataError(
                f"The disk is full: {out} could not be written ({os.strerror(error.errno)}). Free some space and run "
                "the same command again."
            ) from error
        raise DataError(folder.why_not_used(out, error)) from error


def _require_possible(listing: Listing, options: BuildOptions) -> None:
    if listing.kind != "classification":
        raise DataError(f"--format ffcv holds images and labels, not the targets of {listing.converter}.")
    if importlib.util.find_spec("ffcv") is None:
        raise DataError(_WITHOUT_FFCV.format("is not installed"))


def _import_ffcv() -> None:
    try:
        import ffcv  # noqa: F401
    except ImportError as error:  # it is there, and a system library that it was built with is not
        raise DataError(_WITHOUT_FFCV.format(f"does not load ({error})")) from error


def _require_space(listing: Listing, out: Path, options: BuildOptions) -> None:
    if options.recode.max_size is None:
        needed = sum(item.size for items in listing.splits.values() for item in items)
        folder.require_space(out, needed, exact=False)


def _finished(listing: Listing, out: Path, options: BuildOptions) -> Outcome | None:
    """What a finished folder holds; None where index.json or a file is missing or is not what it was.

    Images that were changed since are compared with what is stored; raises DataError where they differ.
    """
    try:
        index = load_index(out)
        if index is None or index.splits.keys() != listing.splits.keys():
            return None
        sources = {
            split: BetonSource(out / f"{split}{SUFFIX}", index.classes, stated)
            for split, stated in index.splits.items()
        }
        left_out = read_lines(out / LEFT_OUT_FILE)
    except DataError:
        return None
    for split, source in sources.items():
        gone = {entry.path for entry in left_out if entry.split == split}
        items = [item for item in mixed(listing.splits[split]) if item.name not in gone]
        work = _Work(split, Loading.of(listing, options.recode), options.raw_fraction)
        changed = _first_changed(source, items, work, (out / f"{split}{SUFFIX}").stat().st_mtime)
        if changed is not None:
            raise DataError(
                f"The source of {out} has changed since that was finished ({printable(changed)}). Prepare it into "
                "another folder, or delete that one first."
            )
    return _outcome(index, left_out, Counter(), was_finished=True)


def _first_changed(source: BetonSource, items: list[Item], work: _Work, written: float) -> str | None:
    """Name of the first image that is newer than the file and not what that holds; None without one."""
    if len(items) != len(source):
        return "another number of readable images"
    for number, item in enumerate(items):
        if item.modified > written:
            now, stored = work.sample(item), source.read(number)
            if isinstance(now, LeftOut) or (now.label, _bytes(now.image)) != (stored.label, _bytes(stored.image)):
                return item.name
    return None


def _bytes(image: object) -> bytes:
    return image if isinstance(image, bytes) else np.asarray(image).tobytes()


def _build_locked(listing: Listing, out: Path, options: BuildOptions) -> Outcome:
    (out / set_index.FILE_NAME).unlink(missing_ok=True)
    for path in out.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink()
    _require_space(listing, out, options)
    _import_ffcv()
    splits: dict[str, SplitFile] = {}
    left_out: list[LeftOut] = []
    counts: Counter[str] = Counter()
    with progress_bar("preparing", sum(len(items) for items in listing.splits.values())) as advance:
        for split, items in listing.splits.items():
            work = _Work(split, Loading.of(listing, options.recode), options.raw_fraction)
            build = _SplitBuild(out / f"{split}{SUFFIX}", mixed(items), work, options, advance)
            splits[split] = build.make(listing.classes)
            left_out += build.left_out
            counts += build.counts
    index = BetonIndex(listing.classes, splits)
    folder.write_if_changed(out / LEFT_OUT_FILE, to_lines(left_out))
    folder.write_if_changed(out / set_index.FILE_NAME, index_to_bytes(index))
    return _outcome(index, left_out, counts, was_finished=False)


def _outcome(index: BetonIndex, left_out: list[LeftOut], counts: Counter[str], was_finished: bool) -> Outcome:
    splits = {
        name: SplitIndex(
            names=(f"{name}{SUFFIX}",),
            samples=np.array([split.samples]),
            tar_bytes=np.array([split.bytes]),
            index_bytes=np.array([0]),
            sha256=(split.sha256,),
            left_out=split.left_out,
        )
        for name, split in index.splits.items()
    }
    total = sum(split.samples for split in index.splits.values())
    made = 0 if was_finished else total
    return Outcome(
        index=SetIndex(index.classes, splits),
        left_out=left_out,
        shards_written=0 if was_finished else len(splits),
        shards_kept=len(splits) if was_finished else 0,
        images_written=made,
        counts=dict(counts),
        counted=made,
        was_finished=was_finished,
    )


class _SplitBuild:
    """The making of one file, and what was found on the way."""

    def __init__(
        self, path: Path, items: list[Item], work: _Work, options: BuildOptions, advance: Callable[[int], None]
    ) -> None:
        self._path, self._items, self._work, self._options, self._advance = path, items, work, options, advance
        self.left_out: list[LeftOut] = []
        self.counts: Counter[str] = Counter()
        self._done = 0

    def make(self, classes: tuple[str, ...]) -> SplitFile:
        """Write the file, whole or not at all, and say what it is."""
        largest = max((item.size for item in self._items), default=0)
        page_bytes = max(_PAGE_BYTES, _power_of_2(largest))
        with atomic_write(self._path) as file:
            temporary = Path(file.name)
            while True:
                try:
                    checksums = write_beton(temporary, self._samples(), len(self._items), min(page_bytes, LARGEST_PAGE))
                    break
                except PageTooSmallError as error:  # only decoding told; all pages are of one size
                    page_bytes = _power_of_2(error.needed)
            source = BetonSource(temporary, classes)
            samples, digest = len(source), source.digest
            source.close()
            size, sha256 = temporary.stat().st_size, sha256_of_file(temporary).hex()
        with atomic_write(self._path.with_suffix(CHECKSUM_SUFFIX)) as file:
            file.write(checksums.tobytes())
        return SplitFile(
            samples,
            size,
            sha256,
            digest,
            left_out=len(self.left_out),
            raw=self.counts[STORED_RAW],
            checksums=hashlib.sha256(checksums.tobytes()).hexdigest(),
        )

    def _samples(self) -> Iterator[Stored]:
        """The usable samples, in order; notes the others."""
        self._advance(-self._done)  # those of a first attempt
        self._done = 0
        self.left_out.clear()
        self.counts.clear()
        for sample in _in_order(self._work, self._items, self._options.jobs):
            if isinstance(sample, LeftOut):
                self._leave_out(sample)
            else:
                self.counts.update(sample.traits)
                yield sample
            self._done += 1
            self._advance(1)
        if len(self.left_out) == len(self._items):
            raise nothing_left(self._work.split, self.left_out)

    def _leave_out(self, sample: LeftOut) -> None:
        if self._options.stop_on_error:
            raise stopped_by(sample.path, sample.reason)
        self.left_out.append(sample)


def _power_of_2(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _in_order(work: _Work, items: list[Item], jobs: int) -> Iterator[Stored | LeftOut]:
    """What becomes of each item, in order, made by `jobs` processes a little ahead of its use."""
    if jobs == 1 or len(items) <= _CHUNK_ITEMS:
        for item in items:
            yield work.sample(item)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker)
    pending: deque[Future[list[Stored | LeftOut]]] = deque()
    try:
        for chunk in _chunks(items):
            pending.append(pool.submit(work.samples, chunk))
            if len(pending) > 2 * jobs:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process died (out of memory?). Run the same command again, with fewer --jobs."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK_ITEMS or sum(each.size for each in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()
