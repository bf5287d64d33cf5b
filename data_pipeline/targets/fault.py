"""The one error of this package, and how sizes are written in its messages."""

from __future__ import annotations


class TargetError(ValueError):
    """A target does not say what it must, or does not fit its image. The message says what was found."""


def require_same_size(what: str, size: tuple[int, int], upright: tuple[int, int]) -> None:
    """Raise TargetError where (height, width) `size` of a target is not that of its image, `upright`."""
    if size == upright:
        return
    hint = ""
    if size == upright[::-1]:
        hint = "; if EXIF says that the image is to be turned, turn its pixels and remove the note, or turn the target"
    raise TargetError(f"{what} is {size[1]}x{size[0]} and the image, upright, {upright[1]}x{upright[0]}{hint}")
