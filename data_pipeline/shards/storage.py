"""Where a set of shards is: a folder of this machine, or a URL whose files are fetched into a cache on this node."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.config import CacheConfig
from data_pipeline.shards import shard_index
from data_pipeline.shards.cache import Held
from data_pipeline.shards.source import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(://|::)")


@dataclass(frozen=True)
class SetFile:
    """One file of a set, and how to know it."""

    name: str
    """Its path within the set, such as "train/shard-000000.tar"."""

    size: int
    """Bytes."""

    sha256: str
    """Of the tar, in hexadecimal; of an index: of the tar that it belongs to."""

    @property
    def is_index(self) -> bool:
        """Whether it is the index of a shard, which carries checksums of its own."""
        return self.name.endswith(shard_index.SUFFIX)

    @property
    def address(self) -> str:
        """Its name in the cache, which says what it contains and not where it is from."""
        return f"{self.sha256}-{self.size}{shard_index.SUFFIX}" if self.is_index else f"{self.sha256}.tar"


def is_url(path: str) -> bool:
    """Whether a data path names remote storage rather than a folder of this machine."""
    return bool(_URL.match(path))


def without_secrets(url: str) -> str:
    """A URL as it may be shown: no user, password or query, in which signatures stand."""
    place = re.split(r"[?#]", url, maxsplit=1)[0]  # first, because a query may hold URLs
    return re.sub(r"(://)[^/]*@", r"\1", place)


def nothing_to_let_go() -> bool:
    """For callers of `hold` that keep no other files."""
    return False


class Storage(Protocol):
    """Where a set is, and how its files become local ones. May be used from several threads at once."""

    def shown(self, name: str = "") -> str:
        """Where a file of the set, or the set, is, for messages: without passwords and signatures."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """The whole of a small file, as it is now. Raises OSError or DataError."""
        ...

    def hold(self, file: SetFile, let_go: Callable[[], bool] = nothing_to_let_go) -> Held:
        """A local path to the whole file, which stays until it is closed.

        `let_go` is called where there is no room: it closes one file that the caller holds and does not need now, and
        says whether there was one. Raises DataError saying what was expected and what was found.
        """
        ...

    def expect(self, shards: Sequence[Sequence[SetFile]]) -> None:
        """These shards (the files of each) are held next, soonest first. Returns at once."""
        ...

    def stats(self) -> dict[str, float]:
        """What was done since the last call."""
        ...

    def close(self) -> None:
        """End what is under way. What is held stays held."""
        ...


def open_storage(path: str, config: CacheConfig) -> Storage:
    """The storage that a data path names. Nothing is read or written yet.

    Raises DataError where a URL has no cache, or a package that it needs is not installed.
    """
    if path.startswith(("file://", "local://")):
        return LocalFolder(Path(urllib.parse.unquote(path.partition("://")[2])))
    if not is_url(path):
        return LocalFolder(Path(path))
    if not config.folder:
        raise DataError(
            f"{without_secrets(path)} is remote: set data.cache.folder to a folder on each node's own disk, where its "
            "shards are kept, and data.cache.max_gb to what that disk can give"
        )
    from data_pipeline.shards.remote import CachedRemote

    return CachedRemote(path, config)


class LocalFolder:
    """A set in a folder of this machine, or of a file system that it has mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shown(self, name: str = "") -> str:
        return str(self.folder / name)

    def read_bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def hold(self, file: SetFile, let_go: Callable[[], bool] = nothing_to_let_go) -> Held:
        """The file's own path; nobody removes it."""
        return Held(self.folder / file.name)

    def expect(self, shards: Sequence[Sequence[SetFile]]) -> None:
        """All files are here."""

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is under way."""
