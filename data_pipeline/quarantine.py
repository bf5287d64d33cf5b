"""Damaged samples: each is reported once, written to a file that survives the run, and counted against a budget."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

from data_pipeline.shards.source import DamagedSampleError, DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """What one rank knows of damaged samples in one split.

    The file has one JSON object per line: {"shard", "key", "reason", "sample", "epoch", "rank"}. All ranks and all
    attempts of a run append to it, whole lines only; a sample that is already listed is not listed again. A file that
    cannot be written is reported once and does not end anything.
    """

    def __init__(self, path: Path | None, rank: int, limit: int, consequence: str) -> None:
        """`limit`: different damaged samples that are borne. `consequence`: what becomes of one, for the log."""
        self._path, self._rank, self._limit, self._consequence = path, rank, limit, consequence
        self._known: set[int] = set()

    def note(self, sample_id: int, epoch: int, error: DamagedSampleError) -> None:
        """Take note of a damaged sample. Raises DataError where that is one too many."""
        if sample_id in self._known:
            return
        self._known.add(sample_id)
        logger.warning("%s; %s", error, self._consequence)
        if self._path is not None:
            place = {"shard": error.shard, "key": error.key, "reason": error.reason}
            try:
                _append(self._path, {**place, "sample": sample_id, "epoch": epoch, "rank": self._rank})
            except OSError as problem:
                logger.error("%s cannot be written: %s", self._path, problem.strerror)
                self._path = None
        if len(self._known) > self._limit:
            raise DataError(
                f"{len(self._known)} damaged samples are more than max_bad_samples = {self._limit}; the last: {error}. "
                "Check the shards with `python -m data_pipeline.verify`, or raise the limit"
            ) from error


def _append(path: Path, entry: dict[str, str | int]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        if any((entry["shard"], entry["key"]) == place for place in map(_place_of, content.splitlines())):
            return
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        if content and not content.endswith(b"\n"):
            line = b"\n" + line  # a full disk has cut the last one off
        if os.write(descriptor, line) < len(line):  # one call: lines of different ranks do not mix
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def _place_of(line: bytes) -> tuple[str, str] | None:
    """(shard, key) that a line lists; None for one that was cut off."""
    try:
        entry = json.loads(line)
        return entry["shard"], entry["key"]
    except (ValueError, KeyError, TypeError):
        return None
