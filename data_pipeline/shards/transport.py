"""Reading the bytes of a remote set's files over fsspec: where they are, how they stream, and what failed and why."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import without_secrets

HTTP_PIECE_BYTES = 1 << 20
"""Read at a time from an HTTP response; must arrive within the timeout."""

RANGE_PIECE_BYTES = 8 << 20
"""Asked for at a time from other storage, less with every failed try; must arrive within the timeout."""

MOST_WHOLE_BYTES = 1 << 30
"""An index.json that is larger is none: that of half a million shards has about 60 MB."""

_WHOLE_FILE_TIMEOUTS = 10  # a small file of unknown size comes in one piece, which may take this many timeouts
_WORTH_ANOTHER_TRY = (408, 425, 429)  # of the answers 400 to 499: too slow, too early, too many
_POLL_SECONDS = 0.1

Result = TypeVar("Result")


class TransportError(Exception):
    """A try to read a file failed. `permanent`: another one would fail alike. `after`: seconds the server asks for.
    `anew`: what is here of the file is no part of the one that is there."""

    def __init__(self, reason: str, *, permanent: bool = False, after: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent
        self.after = after
        self.anew = anew


class CalledOffError(Exception):
    """The work was called off: its result is not wanted any more."""


class Stream(Protocol):
    """The bytes of a file from `start` on. `total`: the file's size, where the server says so."""

    start: int
    total: int | None

    def read(self) -> bytes:
        """The next piece; empty at the end."""
        ...

    def close(self) -> None: ...


class Remote:
    """The storage behind one URL. Used by any number of threads, but only by the process that made it."""

    def __init__(self, url: str, timeout: float) -> None:
        """`timeout`: seconds that an answer or a piece of a file may take. Raises DataError where fsspec, or what it
        needs for this kind of URL, is not installed."""
        self._url, self._timeout = url, timeout
        self._fs, self._root = _file_system(url, timeout)
        parts = urllib.parse.urlsplit(url.rpartition("::")[2])
        self._is_http = parts.scheme in ("http", "https")
        values = [value for _, value in urllib.parse.parse_qsl(parts.query)]
        secrets = {parts.query, parts.netloc.rpartition("@")[0], parts.password or "", parts.username or "", *values}
        texts = {
            text for secret in secrets for text in (secret, urllib.parse.unquote(secret), urllib.parse.quote(secret))
        }
        # the longest first, because they hold others; a shorter one than this is no secret, and part of many words
        self._secrets = sorted((text for text in texts if len(text) > 3), key=len, reverse=True)

    def shown(self, name: str) -> str:
        """The URL of a file of the set, for messages."""
        return f"{without_secrets(self._url).rstrip('/')}/{name}"

    def read(self, name: str, cancelled: threading.Event) -> bytes:
        """The whole of a small file. Raises TransportError, CalledOffError."""
        if not self._is_http:
            timeout = self._timeout * _WHOLE_FILE_TIMEOUTS
            end = MOST_WHOLE_BYTES + 1
            found = self._call(lambda: self._submit("cat_file", self._path(name), start=0, end=end), cancelled, timeout)
            _check_size(len(found))
            return bytes(found)
        content = bytearray()
        with contextlib.closing(self._open_http(name, 0, cancelled)) as stream:
            while piece := stream.read():
                content += piece
                _check_size(len(content))
        return bytes(content)

    def open(self, name: str, start: int, end: int, attempt: int, cancelled: threading.Event) -> Stream:
        """Begin to read a file of `end` bytes at `start`; its stream begins at 0 where the server knows no ranges.

        The stream's `read` raises TransportError, CalledOffError, as this does. `attempt` counts from 1.
        """
        if self._is_http:
            return self._open_http(name, start, cancelled)
        piece = max(HTTP_PIECE_BYTES // 4, RANGE_PIECE_BYTES >> (attempt - 1))

        def read_range(first: int, stop: int) -> bytes:
            return self._call(lambda: self._submit("cat_file", self._path(name), start=first, end=stop), cancelled)

        return _Ranges(read_range, start, end, piece)

    def _open_http(self, name: str, start: int, cancelled: threading.Event) -> Stream:
        answer = _HttpAnswer(self._fs, self._path(name), start, self._timeout)
        self._call(lambda: self._run(answer.begin()), cancelled)
        return _HttpStream(answer, lambda work: self._call(lambda: self._run(work), cancelled), self._fs.loop)

    def _call(
        self, submit: Callable[[], concurrent.futures.Future[Any]], cancelled: threading.Event, timeout: float = 0.0
    ) -> Any:
        try:
            # a little longer than the asynchronous side waits, which knows more about what happened
            return _wait(submit(), cancelled, (timeout or self._timeout) + 2 * _POLL_SECONDS)
        except (CalledOffError, TransportError):
            raise
        except concurrent.futures.CancelledError:
            raise CalledOffError from None
        except Exception as error:  # what storage libraries raise has no common type
            if isinstance(error, RuntimeError) and "shutdown" in str(error):
                raise CalledOffError from None  # the interpreter ends: asyncio starts no more threads
            error.__traceback__ = None  # asyncio's frames lead back to the error, and from it to all callers' frames
            raise self._explained(error) from None  # the original's text and traceback may hold the URL's secrets

    def _run(self, work: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        return asyncio.run_coroutine_threadsafe(_until_the_end(work), self._fs.loop)

    def _submit(self, method: str, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        if getattr(self._fs, "async_impl", False):
            return self._run(getattr(self._fs, f"_{method}")(*args, **options))
        return _in_thread(lambda: getattr(self._fs, method)(*args, **options))

    def _path(self, name: str) -> str:
        if not self._is_http:
            return f"{self._root.rstrip('/')}/{name}"
        parts = urllib.parse.urlsplit(self._root)
        path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def _explained(self, error: Exception) -> TransportError:
        """What to say of an error. Those of optional packages are known by their names."""
        if isinstance(error, (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)):
            return TransportError(f"nothing, or too little, came within {self._timeout:g} seconds")
        if type(error).__name__ == "ClientPayloadError":  # aiohttp's, whose own text speaks of other things
            return TransportError("the connection ended before the file did")
        if isinstance(error, FileNotFoundError):
            return TransportError("there is no such file (404)", permanent=True)
        if isinstance(error, PermissionError):
            return TransportError(f"access is denied ({self._cleaned(error)})", permanent=True)
        status = getattr(error, "status", None) or getattr(error, "code", None)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY
        no_credentials = type(error).__name__ == "NoCredentialsError"  # botocore's
        return TransportError(self._cleaned(error), permanent=refused or no_credentials)

    def _cleaned(self, error: Exception) -> str:
        text = str(error).replace(" ssl:default", "")  # aiohttp says so of plain HTTP, too
        for secret in self._secrets:
            text = text.replace(secret, "...")
        text = re.sub(r"\w+://[^\s'\"<>]+", lambda url: without_secrets(url[0]), text)  # such as of a redirect's target
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Ranges:
    """A file read in ranges, one request for each."""

    def __init__(self, read_range: Callable[[int, int], bytes], start: int, end: int, piece: int) -> None:
        """`piece`: bytes asked for at a time, up to `end`."""
        self._read_range, self._end, self._piece = read_range, end, piece
        self.start = self._at = start
        self.total: int | None = None

    def read(self) -> bytes:
        """The next bytes of the file; none at its end."""
        stop = min(self._at + self._piece, self._end)
        if self._at >= stop:
            return b""
        piece = self._read_range(self._at, stop)
        self._at += len(piece)
        if self._at < stop:
            self._end = self._at  # the file is shorter: beyond its end there is nothing to ask for
        return piece

    def close(self) -> None:
        """Nothing is open between two ranges."""


class _HttpAnswer:
    """The asynchronous side of one HTTP response; runs in fsspec's loop."""

    def __init__(self, fs: Any, url: str, start: int, timeout: float) -> None:
        self._fs, self._url, self._timeout = fs, url, timeout
        self._response: Any = None
        self._failed: Exception | None = None
        self.start = start
        self.total: int | None = None

    async def begin(self) -> None:
        """Send the request and wait for the answer's headers."""
        import aiohttp

        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if self.start:
            headers["Range"] = f"bytes={self.start}-"
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
        request = session.get(self._fs.encode_url(self._url), headers=headers, timeout=limits, **options)
        self._response = response = await asyncio.wait_for(request, self._timeout)
        try:
            self._understand(response)
        except TransportError:
            response.close()
            raise

    def _understand(self, response: Any) -> None:
        status = response.status
        if status in (404, 410):
            raise TransportError(f"there is no such file ({status})", permanent=True)
        if status in (401, 403):
            raise TransportError(f"access is denied ({status} {response.reason})", permanent=True)
        if status == 416:
            raise TransportError(f"it has no byte number {self.start:,} (416)", anew=True)
        if status not in (200, 206):
            final = 300 <= status < 500 and status not in _WORTH_ANOTHER_TRY
            after = response.headers.get("Retry-After", "")
            raise TransportError(
                f"the server answers {status} {response.reason}",
                permanent=final,
                after=float(after) if after.isdecimal() else 0.0,
            )
        encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        if status == 200:
            self.start = 0
            self.total = None if encoded else response.content_length  # else it counts the bytes that are sent
            return
        if encoded:  # though it was not asked for
            raise TransportError("the server compresses a part of a file, which cannot be gone on with", anew=True)
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != self.start:
            raise TransportError("the server answers 206 with another range than was asked for")
        self.total = None if found[2] == "*" else int(found[2])

    async def take(self) -> bytes:
        """The next piece. What came before an error is returned first."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            try:
                raise failed
            finally:
                del failed  # see _wait
        pieces: list[bytes] = []
        missing, deadline = HTTP_PIECE_BYTES, time.monotonic() + self._timeout
        try:
            while missing:
                left = max(deadline - time.monotonic(), 0.001)
                piece = await asyncio.wait_for(self._response.content.read(missing), left)
                if not piece:
                    break
                pieces.append(piece)
                missing -= len(piece)
        except Exception as error:
            if not pieces:
                raise
            self._failed = error
        return b"".join(pieces)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class _HttpStream:
    """A response read by a thread."""

    def __init__(self, answer: _HttpAnswer, call: Callable[[Coroutine[Any, Any, bytes]], bytes], loop: Any) -> None:
        self._answer, self._call, self._loop = answer, call, loop
        self.start, self.total = answer.start, answer.total

    def read(self) -> bytes:
        return self._call(self._answer.take())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._answer.close)


def _check_size(size: int) -> None:
    if size > MOST_WHOLE_BYTES:
        raise TransportError(
            f"it has more than {MOST_WHOLE_BYTES:,} bytes, too many for what it must be", permanent=True
        )


def _file_system(url: str, timeout: float) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the set's place in it."""
    protocol = re.split("://|::", url, maxsplit=1)[0].lower()
    shown = without_secrets(url)
    extra = "Install the extra: pip install 'dgt[remote]'"
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError:
        raise DataError(f"{shown} needs the package fsspec to be read. {extra}") from None
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        # proxies and .netrc of the environment count; what is configured for fsspec counts more
        options["client_kwargs"] = {"trust_env": True, **conf.get(protocol, {}).get("client_kwargs", {})}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**limits, **conf.get(protocol, {}).get("config_kwargs", {})}
    try:
        # an instance of its own: one that is shared may belong to another process or have other options
        fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        hint = extra if protocol in ("http", "https", "s3", "s3a") else f"Install what it names: {error}"
        raise DataError(f"{shown} needs a package that is not installed to be read. {hint}") from None
    except ValueError as error:
        raise DataError(f"{shown} cannot be read: {error}") from None
    if hasattr(fs, "retries"):
        fs.retries = 1  # tries are counted, reported and spaced in one place: data_pipeline.shards.fetch
    return fs, root


async def _until_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which counts as cancelled once the interpreter ends and asyncio starts no more threads.

    Nobody may be waiting for it any more then, and asyncio would report an error that nobody asks for.
    """
    try:
        return await work
    except RuntimeError as error:
        if "shutdown" in str(error):
            raise asyncio.CancelledError from None
        raise


def _wait(future: concurrent.futures.Future[Result], cancelled: threading.Event, timeout: float) -> Result:
    """The result of a future. No frame of an error's traceback may lead back to the error: the frames of all callers
    would live, and keep shards open, until the garbage collector comes by."""
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                return future.result(_POLL_SECONDS)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise  # the work itself ran out of time
                if cancelled.is_set():
                    future.cancel()
                    raise CalledOffError from None
                if time.monotonic() >= deadline:
                    future.cancel()
                    raise
    finally:
        del future


def _in_thread(work: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Run blocking work where it can be abandoned: a daemon thread that nothing waits for at exit."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error.with_traceback(None))

    threading.Thread(target=run, name="storage call", daemon=True).start()
    return future
