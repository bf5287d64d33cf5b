"""Images that cannot be used: what is known of each, the file that lists them, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.shards.source import DataError

LEFT_OUT_FILE = "left_out.jsonl"


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be read."""

    split: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


def to_lines(entries: Sequence[LeftOut]) -> bytes:
    """The content of LEFT_OUT_FILE."""
    return b"".join(f"{json.dumps(asdict(entry))}\n".encode() for entry in entries)


def read_lines(path: Path) -> list[LeftOut]:
    """What LEFT_OUT_FILE lists; nothing where there is none. Raises DataError where it is damaged."""
    try:
        return [LeftOut(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run the command without --merge to write it again.") from error


def stopped_by(path: str, reason: str) -> DataError:
    """The error that --on-error stop makes of an image."""
    return DataError(
        f"{printable(path)} cannot be used: {printable(reason)}. Repair it, or leave such images out with --on-error "
        "skip; then run the same command again."
    )


def nothing_left(split: str, entries: Sequence[LeftOut]) -> DataError:
    """The error that a split is whose images are all unreadable; `entries` are those of all splits."""
    own = [entry for entry in entries if entry.split == split]
    if not own:
        return DataError(f"The split '{split}' has no images.")
    return DataError(f"None of the {len(own):,} images of the split '{split}' can be read; the first: {own[0]}.")


def printable(name: str) -> str:
    """A name or a message as text that every terminal takes: names may hold control characters, or be no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
