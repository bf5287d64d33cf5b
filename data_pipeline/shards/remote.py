"""A set behind a URL, as local files: a cache on this node, filled when a file is needed, or a little before."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from data_pipeline.config import CacheConfig
from data_pipeline.shards.cache import Cache, Held, NoRoomError
from data_pipeline.shards.fetch import Counts, Fetcher
from data_pipeline.shards.forking import renew_after_fork
from data_pipeline.shards.lookahead import LookAhead
from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import SetFile, nothing_to_let_go, without_secrets
from data_pipeline.shards.transport import CalledOffError, Remote

logger = logging.getLogger(__name__)

ROOM_SECONDS = 300.0
"""How long a read waits for room in a cache in which nothing changes. Sources that stand still let go long before."""

ROOM_WARNING_SECONDS = 10.0
"""After how long such a read says that it waits."""

_OTHER_FETCHES_POLL = 0.05
_ROOM_POLL = 0.25


class CachedRemote:
    """A set behind a URL. Each of its files is fetched once per node and found in the node's cache from then on.

    The files' names in the cache are digests of their content, so that sets, prefixes and versions never mix. In a
    process that was forked from the one that opened it, it begins anew and shares nothing but the cache.
    """

    def __init__(self, url: str, config: CacheConfig) -> None:
        """Raises DataError where fsspec, or what it needs for this kind of URL, is not installed."""
        self._url, self._config = url, config
        self._cache = Cache(config.folder, int(config.max_gb * 1e9))
        self._fetcher: Fetcher | None = None
        self._wanted: dict[str, int] = {}
        self._begin()
        self._the_fetcher()  # now, because it may find that a package is missing
        renew_after_fork(self)

    def shown(self, name: str = "") -> str:
        return f"{without_secrets(self._url).rstrip('/')}/{name}".rstrip("/")

    def read_bytes(self, name: str) -> bytes:
        with self._unless_closed():
            return self._the_fetcher().read(name, self._cancelled)

    def hold(self, file: SetFile, let_go: Callable[[], bool] = nothing_to_let_go) -> Held:
        with self._unless_closed():
            self._prepare()
            held = self._cache.hold(file.address, file.size)
            if not file.is_index:
                self._counts.add("cache_misses" if held is None else "cache_hits")
            return held if held is not None else self._hold_when_fetched(file, let_go)

    def expect(self, shards: Sequence[Sequence[SetFile]]) -> None:
        order = [file.address for shard in shards for file in shard]
        self._wanted = {address: rank for rank, address in enumerate(order)}
        self._ahead.expect(shards)

    def stats(self) -> dict[str, float]:
        """`cache_hits` and `cache_misses` of shards, `fetched_bytes`, `fetch_retries`, `fetch_seconds` of all
        threads."""
        return self._counts.take()

    def close(self) -> None:
        self._cancelled.set()
        self._ahead.close()

    def after_fork(self) -> None:
        """In a child process: forget the parent's threads, connections and fetches."""
        self._cache.after_fork()
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._counts = Counts()
        self._wanted = {}
        self._failed: dict[str, tuple[float, str]] = {}  # when and why a file could not be fetched at last
        self._fetcher = None
        self._ahead: LookAhead[Sequence[SetFile]] = LookAhead(self._fetch_ahead, self._config.ahead)
        weakref.finalize(self, _call_off, self._cancelled)
        # At the interpreter's end before fsspec closes its connections, which looks like a failure to a thread that
        # reads: finalizers run there, too, but the youngest first, and fsspec's is younger.
        atexit.register(self._cancelled.set)

    def _the_fetcher(self) -> Fetcher:
        with self._lock:
            if self._fetcher is None:
                remote = Remote(self._url, self._config.timeout)
                self._fetcher = Fetcher(remote, self._config.attempts, self._counts)
            return self._fetcher

    def _prepare(self) -> None:
        warning = self._cache.prepare()
        if warning:
            logger.warning("%s", warning)

    def _make(self, file: SetFile, rank: int, since: float) -> Held | None:
        """Fetch a file unless another thread or process does; None where it does. Raises NoRoomError, DataError: also
        where another thread has failed to after `since`, so that who waited for it does not begin all tries anew."""
        claim = self._cache.claim(file.address, file.size, self._wanted, rank)
        if claim is None:
            return self._cache.hold(file.address, file.size)
        with contextlib.closing(claim):
            failed, why = self._failed.get(file.address, (0.0, ""))
            if why and failed >= since:
                raise DataError(why)
            try:
                return self._the_fetcher().fetch(file, claim, self._cancelled)
            except NoRoomError:  # of this moment
                raise
            except DataError as error:
                self._failed[file.address] = time.monotonic(), str(error)
                raise

    def _hold_when_fetched(self, file: SetFile, let_go: Callable[[], bool]) -> Held:
        began = time.monotonic()
        state, since, told = 0, began, False
        while True:
            pause = _OTHER_FETCHES_POLL
            try:
                held = self._make(file, 0, began)
                if held is not None:
                    return held
            except NoRoomError as error:
                if let_go():
                    continue
                if error.state != state:
                    state, since = error.state, time.monotonic()
                elif time.monotonic() - since > ROOM_SECONDS:
                    raise
                elif time.monotonic() - since > ROOM_WARNING_SECONDS and not told:
                    told = True
                    logger.warning("waiting with %s: %s", self.shown(file.name), str(error))
                pause = _ROOM_POLL
            if self._cancelled.wait(pause):
                raise CalledOffError

    def _fetch_ahead(self, shard: Sequence[SetFile]) -> None:
        try:
            self._prepare()
            for file in shard:
                self._fetch_file_ahead(file)
        except CalledOffError:
            return
        except DataError as error:
            logger.info("not fetched ahead, and to be tried again when it is read: %s", str(error))

    def _fetch_file_ahead(self, file: SetFile) -> None:
        rank, began = self._wanted.get(file.address), time.monotonic()
        while rank is not None and self._wanted.get(file.address) == rank:
            try:
                # a hold counts as a use: what is here already does not leave before what is cold
                held = self._cache.hold(file.address, file.size) or self._make(file, rank, began)
            except NoRoomError:  # there may be some when others are through with theirs
                if self._cancelled.wait(_ROOM_POLL):
                    raise CalledOffError from None
                continue
            if held is not None:  # else another process fetches it
                held.close()
            return

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        try:
            if self._cancelled.is_set():
                raise CalledOffError
            yield
        except CalledOffError:
            raise ValueError("the source was closed") from None


def _call_off(cancelled: threading.Event) -> None:
    """The source is gone: its threads end, and nothing is left to do at the interpreter's end."""
    cancelled.set()
    atexit.unregister(cancelled.set)
