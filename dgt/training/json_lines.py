"""Files of one JSON object per line, which a kill or a full disk may have cut anywhere, or a person edited."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read(path: Path, *whole: str) -> Iterator[dict[str, Any]]:
    """The objects of the file, oldest first; other lines are passed over.

    `whole`: keys that must have whole numbers. Raises OSError.
    """
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), int) for key in whole):
            yield row


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds an object on a line of its own, even where the last line was cut. Raises OSError."""
    separator = "\n" if is_cut(path) else ""
    # opened anew each time: what was closed survives the death of this node on a network file system
    with path.open("a") as file:
        file.write(separator + json.dumps(row) + "\n")


def is_cut(path: Path) -> bool:
    """Whether the file's last line is not whole."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 1, 0))
        return file.read(1) not in (b"", b"\n")
