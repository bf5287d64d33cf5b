"""What can be chosen for every converter, how it is typed, and how it is remembered in prepare.json."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from data_pipeline.prepare.listing import ShardSize

DEFAULT_QUALITY = 90
_DEFAULT_SHARD_SIZE = "64MB"
_T = TypeVar("_T")

Format = Literal["webdataset", "ffcv"]

COMMON_OPTIONS = ("shard_size", "num_shards", "format", "raw_fraction", "max_size", "quality", "restart_rows")
"""What BuildOptions.recorded may hold; prepare.json keeps these beside the converter's own."""


@dataclass(frozen=True)
class Recode:
    """What is done to images on their way into a shard. Without any of it they stay as they are, byte for byte."""

    max_size: int | None = None
    """An image whose shorter side has more pixels is made smaller, so that it has this many."""

    quality: int = DEFAULT_QUALITY
    """Of the JPEGs that are made where an image is encoded anew, 1 to 100."""

    restart_rows: bool = False
    """Put restart markers after every row of blocks of a JPEG and within it, which changes no pixel."""

    @property
    def changes_bytes(self) -> bool:
        """Whether an image in a shard may differ from its file in the source."""
        return self.max_size is not None or self.restart_rows


@dataclass(frozen=True)
class Part:
    """One of several jobs that share the work: `number` of `of`, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "3/16"; raises ValueError saying what is wrong."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None:
            raise ValueError(f"'{text}' is no part; give its number and how many there are, such as 3/16")
        number, of = int(match[1]), int(match[2])
        if not 1 <= number <= of:
            raise ValueError(f"there is no part {text}: parts are counted from 1/{of} to {of}/{of}")
        return cls(number, of)


@dataclass(frozen=True)
class BuildOptions:
    """How shards are made."""

    shard_size: ShardSize
    jobs: int
    stop_on_error: bool

    num_shards: int | None = None
    """How many shards the largest split gets, in place of `shard_size`; other splits get shards about as large."""

    recode: Recode = field(default_factory=Recode)

    part: Part | None = None
    """Make only this share of the shards."""

    format: Format = "webdataset"
    """Tar shards, or one .beton file per split, to which shards and parts do not apply."""

    raw_fraction: float = 0.0
    """The part of the images that a .beton file holds as pixels, though they could stay JPEG."""

    def recorded(self) -> dict[str, str]:
        """The choices on which the content depends, as prepare.json keeps them."""
        found = (
            {"shard_size": self.shard_size.text} if self.num_shards is None else {"num_shards": f"{self.num_shards}"}
        )
        if self.format == "ffcv":
            found = {"format": "ffcv"} | ({"raw_fraction": f"{self.raw_fraction}"} if self.raw_fraction else {})
        if self.recode.max_size is not None:
            found |= {"max_size": f"{self.recode.max_size}", "quality": f"{self.recode.quality}"}
        if self.recode.restart_rows:
            found["restart_rows"] = "yes"
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all converters share."""
    _add_shard_arguments(parser.add_argument_group("shards"))
    _add_image_arguments(parser.add_argument_group("images"))
    _add_work_arguments(parser.add_argument_group("work"))


def _add_shard_arguments(shards: argparse._ArgumentGroup) -> None:
    shards.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the shards")
    cut = shards.add_mutually_exclusive_group()
    cut.add_argument(
        "--shard-size",
        type=checked(ShardSize.parse),
        metavar="SIZE",
        help="the largest shard: samples (10000) or bytes (64MB, 256MiB) of the images as the source holds them; "
        f"default {_DEFAULT_SHARD_SIZE}",
    )
    cut.add_argument(
        "--num-shards",
        type=checked(count),
        metavar="N",
        help="cut the largest split into N shards, and the others into shards about as large",
    )
    shards.add_argument(
        "--format",
        choices=("webdataset", "ffcv"),
        default="webdataset",
        help="webdataset: tar shards (the default); ffcv: one OUT/SPLIT.beton per split, for data.backend ffcv and for "
        "the ffcv package, which writes it (extra ffcv)",
    )
    shards.add_argument(
        "--raw-fraction",
        type=checked(_fraction),
        metavar="F",
        help="with --format ffcv: hold this part of the images, 0 to 1, as pixels, which need no decoding and several "
        "times the bytes; default 0",
    )


def _add_image_arguments(images: argparse._ArgumentGroup) -> None:
    images.add_argument(
        "--max-size",
        type=checked(count),
        metavar="PIXELS",
        help="make an image whose shorter side is longer than this smaller, so that it is this long (exact decoding, "
        "upright, Lanczos), and encode it as JPEG; without it, and where an image is small enough, bytes are copied",
    )
    images.add_argument(
        "--quality",
        type=checked(_quality),
        metavar="Q",
        help=f"of the JPEGs that --max-size makes, 1 to 100; default {DEFAULT_QUALITY}",
    )
    images.add_argument(
        "--restart-rows",
        action="store_true",
        help="put restart markers after every row of blocks of each JPEG and within it, so that training decodes only "
        "what a crop needs; jpegtran does it without decoding: no pixel changes (photographs get 0.7 %% larger)",
    )
    images.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="at an unreadable image: leave it out, report it and end with exit code 3 (skip, the default); "
        "or stop at once with exit code 1",
    )


def _add_work_arguments(work: argparse._ArgumentGroup) -> None:
    work.add_argument(
        "--jobs",
        type=checked(count),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: the %(default)s cores this program may use",
    )
    share = work.add_mutually_exclusive_group()
    share.add_argument(
        "--part",
        type=checked(Part.parse),
        metavar="I/N",
        help="make only part I of N, such as 3/16; the parts may run at the same time, on any nodes that share DIR",
    )
    share.add_argument(
        "--merge", action="store_true", help="after all parts: check that they are there and write the index"
    )


def from_arguments(arguments: argparse.Namespace) -> BuildOptions:
    """The choices that were typed; raises ValueError where they do not fit together."""
    if arguments.quality is not None and arguments.max_size is None:
        raise ValueError("--quality is that of images made smaller by --max-size; without it, nothing is encoded anew")
    if arguments.format == "ffcv":
        for name in ("shard_size", "num_shards", "part", "merge"):
            if getattr(arguments, name):
                raise ValueError(f"--format ffcv makes one file per split: --{name.replace('_', '-')} does not apply")
        if arguments.restart_rows:
            raise ValueError("--restart-rows is for tar shards, whose index says where the rows are; ffcv has none")
    elif arguments.raw_fraction is not None:
        raise ValueError("--raw-fraction is for --format ffcv; tar shards hold images as they are")
    return BuildOptions(
        shard_size=arguments.shard_size or ShardSize.parse(_DEFAULT_SHARD_SIZE),
        jobs=arguments.jobs,
        stop_on_error=arguments.on_error == "stop",
        num_shards=arguments.num_shards,
        recode=Recode(arguments.max_size, arguments.quality or DEFAULT_QUALITY, arguments.restart_rows),
        part=arguments.part,
        format=arguments.format,
        raw_fraction=arguments.raw_fraction or 0.0,
    )


def checked(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """`parse`, whose ValueError argparse then shows as it is."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def count(text: str) -> int:
    """Read a whole number from 1 on; raises ValueError saying what is wrong."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise ValueError(f"'{text}' is no number of 1 or more")
    return int(text)


def held_out(text: str) -> float:
    """Read the part of each class that --val-fraction holds out; raises ValueError saying what is wrong."""
    if not re.fullmatch(r"\d*\.?\d+", text) or not 0 < float(text) < 1:
        raise ValueError(f"'{text}' is no part to hold out; give a number between 0 and 1, such as 0.1")
    return float(text)


def _fraction(text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text) or float(text) > 1:
        raise ValueError(f"'{text}' is no part of the images; give 0 to 1, such as 0.25")
    return float(text)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise ValueError(f"'{text}' is no JPEG quality; give 1 to 100")
    return int(text)
