"""Reading a COCO annotation file of any size: which images there are, and where in the file each annotation lies.

The file is held as text once (450 MB for COCO's training set) and walked through element by element; of an annotation
only its ids and its place are kept. Whoever needs its content reads the place again, in another process if need be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.source import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_PARTS = ("images", "annotations", "categories")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An entry of "images"."""

    id: int
    file_name: str
    width: Any
    height: Any


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file holds."""

    images: list[CocoImage]
    categories: dict[int, str]
    """Name by id, in the order of the ids."""

    places: dict[int, bytes]
    """By image id: where its annotations are, as packed PLACE entries. Images without annotations have none."""


PLACE = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""One annotation: its bytes in the file."""


def read_coco_file(path: Path) -> CocoFile:
    """Walk through an annotation file.

    Raises DataError where it is no such file, where an id occurs twice, and where annotations belong to unknown images.
    """
    try:
        # One character per byte, whatever the encoding of the names in it, so that places are places in the file.
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    images: list[CocoImage] = []
    categories: dict[int, str] = {}
    ids: list[int] = []
    image_ids: list[int] = []
    places: list[tuple[int, int]] = []
    seen: set[str] = set()
    lists: set[str] = set()
    try:
        for part, entry, start, end in _entries(text, lists):
            seen.add(part)
            if part != "annotations" and not text[start:end].isascii():
                entry = json.loads(text[start:end].encode("latin-1"))
            if part == "annotations":
                ids.append(_id(entry, "id"))
                image_ids.append(_id(entry, "image_id"))
                places.append((start, end - start))
            elif part == "images":
                images.append(CocoImage(_id(entry, "id"), _text(entry, "file_name"), entry["width"], entry["height"]))
            elif part == "categories":
                number = _id(entry, "id")
                if number in categories:
                    raise ValueError(f"the category id {number} occurs twice")
                categories[number] = _text(entry, "name")
    except KeyError as error:
        raise DataError(f"{path}: an entry of '{part}' has no {error}: {_shortened(entry)}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged or no annotation file: {error}.") from error
    seen |= lists & {"annotations"}  # none of the images may have an object
    missing = [part for part in _PARTS if part not in seen]
    if missing:
        raise DataError(
            f"{path} lists no {' and no '.join(missing)}: it is no file of annotated objects in COCO's format."
        )
    _require_unique(path, "image", [image.id for image in images])
    _require_unique(path, "annotation", ids)
    return CocoFile(images, dict(sorted(categories.items())), _by_image(path, images, ids, image_ids, places))


def _entries(text: str, lists: set[str]) -> Iterator[tuple[str, Any, int, int]]:
    """(name of the list, element, its first character, its end) of all elements of the lists in the file's object.

    Adds the names of the lists to `lists`, those of empty ones too.
    """
    decode = json.JSONDecoder().raw_decode
    separator, position = _separator(text, 0, "{")
    start = _skip_space(text, position)
    if text[start : start + 1] == "}":
        return
    while separator != "}":
        name, position = decode(text, _skip_space(text, position))
        _, position = _separator(text, position, ":")
        position = _skip_space(text, position)
        if name in _PARTS and text[position : position + 1] == "[":
            lists.add(name)
            for element, start, end in _elements(text, position):
                yield name, element, start, end
                position = end
            _, position = _separator(text, position, "[]")
            if text[position - 1] == "[":  # an empty list: nothing has moved the position to its end
                _, position = _separator(text, position, "]")
        else:
            _, position = decode(text, position)
        separator, position = _separator(text, position, ",}")


def _elements(text: str, position: int) -> Iterator[tuple[Any, int, int]]:
    """(element, its first character, its end) of the list that begins at `position`."""
    decode = json.JSONDecoder().raw_decode
    separator, position = _separator(text, position, "[")
    start = _skip_space(text, position)
    if text[start : start + 1] == "]":
        return
    while separator != "]":
        element, end = decode(text, start)
        yield element, start, end
        separator, position = _separator(text, end, ",]")
        start = _skip_space(text, position)


def _separator(text: str, position: int, expected: str) -> tuple[str, int]:
    """The next character that is no space, one of `expected`, and the place after it; raises ValueError."""
    position = _skip_space(text, position)
    found = text[position : position + 1]
    if not found or found not in expected:
        raise ValueError(
            f"expected {' or '.join(expected)} at byte {position}, found {text[position : position + 9]!r}"
        )
    return found, position + 1


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _id(entry: Any, name: str) -> int:
    value = entry[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r} instead of a number: {_shortened(entry)}")
    return value


def _text(entry: Any, name: str) -> str:
    value = entry[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r} instead of a text: {_shortened(entry)}")
    return value


def _shortened(entry: Any) -> str:
    text = str(entry)
    return text if len(text) <= 120 else f"{text[:120]} ..."


def _require_unique(path: Path, what: str, ids: list[int]) -> None:
    """Evaluation keeps one entry per id and would silently lose the others."""
    table = np.sort(np.array(ids, np.int64))
    twice = np.unique(table[1:][table[1:] == table[:-1]]).tolist()
    if twice:
        shown = ", ".join(map(str, twice[:_SHOWN]))
        raise DataError(
            f"{path}: {len(twice):,} {what} ids occur more than once, such as {shown}. Evaluation would confuse them: "
            "give each its own."
        )


def _by_image(
    path: Path, images: list[CocoImage], ids: list[int], image_ids: list[int], places: list[tuple[int, int]]
) -> dict[int, bytes]:
    """Places of the annotations of each image, in the order of the file."""
    owners: npt.NDArray[np.int64] = np.array(image_ids, np.int64)
    order = np.argsort(owners, kind="stable")
    packed = np.array(places, PLACE)[order]
    found, starts = np.unique(owners[order], return_index=True)
    unknown = np.setdiff1d(found, np.array([image.id for image in images], np.int64))
    if len(unknown):
        strays = np.flatnonzero(np.isin(owners, unknown))
        example = int(strays[0])
        raise DataError(
            f"{path}: {len(strays):,} annotations belong to images that the file does not list, such as annotation "
            f"{ids[example]} of image {image_ids[example]}. Remove them, or add the images."
        )
    bounds = [*starts.tolist(), len(packed)]
    return {
        image_id: packed[bounds[number] : bounds[number + 1]].tobytes()
        for number, image_id in enumerate(found.tolist())
    }
