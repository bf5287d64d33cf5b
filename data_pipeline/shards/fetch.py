"""Fetching one file into the cache: tried again where that may help, resumed where it stopped, proved, then named."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from data_pipeline.shards import shard_index
from data_pipeline.shards.cache import Claim, Held
from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import SetFile
from data_pipeline.shards.transport import CalledOffError, Remote, TransportError

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
"""Longest pause before the second try, in seconds; each further one may be twice as long."""

LONGEST_PAUSE = 30.0
"""No pause is longer, in seconds, whatever the server asks for."""

Result = TypeVar("Result")


@dataclass
class Counts:
    """What was done since the counts were last taken; shared by threads."""

    _counts: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """The counts, which begin anew at 0."""
        names = ("cache_hits", "cache_misses", "fetched_bytes", "fetch_retries", "fetch_seconds")
        with self._lock:
            taken, self._counts = self._counts, {}
        return {name: float(taken.get(name, 0)) for name in names}


@dataclass(frozen=True)
class Fetcher:
    """How files are fetched from one set."""

    remote: Remote
    attempts: int
    counts: Counts = field(default_factory=Counts)

    def fetch(self, file: SetFile, claim: Claim, cancelled: threading.Event) -> Held:
        """Make the file of `claim` whole. What was fetched stays for the next try, also where this one fails.

        Raises DataError naming the URL, what was expected and what was found; CalledOffError.
        """
        started = time.perf_counter()
        try:
            self._retrying(file.name, lambda attempt: self._try(file, claim, attempt, cancelled), cancelled)
        finally:
            self.counts.add("fetch_seconds", time.perf_counter() - started)
        return claim.commit()

    def read(self, name: str, cancelled: threading.Event) -> bytes:
        """The whole of a small file, not kept. Raises DataError, CalledOffError."""
        return self._retrying(name, lambda attempt: self.remote.read(name, cancelled), cancelled)

    def _retrying(self, name: str, work: Callable[[int], Result], cancelled: threading.Event) -> Result:
        shown = self.remote.shown(name)
        draw = random.Random()  # of its own: the pauses must not move the random numbers of a training run
        for attempt in range(1, self.attempts + 1):
            try:
                return work(attempt)
            except TransportError as error:
                if cancelled.is_set():  # what closes the connections has called this work off before
                    raise CalledOffError from None
                if error.permanent or attempt == self.attempts:
                    tries = "" if attempt == 1 else f" (tried {attempt} times)"
                    raise DataError(f"{shown} cannot be fetched: {error}{tries}") from None
                self.counts.add("fetch_retries")
                pause = pause_before(attempt, error.after, draw)
                # as text: a record that is kept would keep the error, its frames, and with them shards in use
                logger.warning("%s: %s; try %d of %d in %.1f s", shown, str(error), attempt + 1, self.attempts, pause)
                if cancelled.wait(pause):
                    raise CalledOffError from None
        raise AssertionError("attempts is at least 1")

    def _try(self, file: SetFile, claim: Claim, attempt: int, cancelled: threading.Event) -> None:
        digest = hashlib.sha256()
        for piece in claim.read():
            digest.update(piece)
        if claim.length < file.size:
            try:
                stream = self.remote.open(file.name, claim.length, file.size, attempt, cancelled)
            except TransportError as error:
                if error.anew:
                    claim.restart()
                raise
            with contextlib.closing(stream):
                if stream.start != claim.length:  # the server knows no ranges and begins at the beginning
                    claim.restart()
                    digest = hashlib.sha256()
                if stream.total not in (None, file.size):
                    claim.restart()
                    raise TransportError(f"it has {stream.total:,} bytes; expected are {file.size:,}")
                while piece := stream.read():
                    if claim.length + len(piece) > file.size:
                        claim.restart()
                        raise TransportError(f"it has more than the expected {file.size:,} bytes")
                    digest.update(piece)
                    claim.write(piece)
                    self.counts.add("fetched_bytes", len(piece))
        if claim.length < file.size:
            raise TransportError(f"it ended after {claim.length:,} bytes; expected are {file.size:,}")
        _verify(file, claim, digest.hexdigest())


def pause_before(attempt: int, asked: float, draw: random.Random) -> float:
    """Seconds to wait after try `attempt` failed: doubling, capped, and spread so that many clients do not come back
    at once. `asked`: what the server asks for at least."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
    return max(draw.uniform(longest / 2, longest), min(asked, LONGEST_PAUSE))


def _verify(file: SetFile, claim: Claim, found: str) -> None:
    """Raises TransportError, and throws the bytes away, where they are not those of the set."""
    problem = ""
    if file.is_index:
        try:
            header = shard_index.unpack(b"".join(claim.read())).header
            if header.tar_sha256.hex() != file.sha256:
                problem = f"it is the index of a tar with SHA-256 {header.tar_sha256.hex()}; expected is {file.sha256}"
        except ValueError as error:
            problem = f"it is not the index of a shard that this program can use: {error}"
    elif found != file.sha256:
        problem = f"its SHA-256 is {found}; expected is {file.sha256}"
    if problem:
        claim.restart()
        raise TransportError(f"{problem}. Where the set was prepared anew, start again to read its new index.json")
