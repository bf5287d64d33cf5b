"""JPEGs with a restart marker after every row of MCUs, of which any run of rows can be read and decoded alone.

An MCU is the smallest block that a JPEG codes as a unit: 8 to 32 pixels high. Such a file falls into pieces: piece 0
holds everything up to the pixels (the start-of-scan segment included), each further one a row of MCUs with the marker
that ends it; the last runs to the end of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartRows:
    """A JPEG with restart rows of which nothing is read before it is asked for."""

    pieces: int
    """How many pieces the file has: its rows of MCUs and one."""

    read: Callable[[int, int], bytes]
    """read(first, stop): the bytes of the pieces first <= piece < stop, proved to be those that were written. Raises
    what the source's own `read` raises."""

    def whole(self) -> bytes:
        """The whole file."""
        return self.read(0, self.pieces)
