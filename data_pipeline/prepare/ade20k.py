"""ADE20K as the scene parsing benchmark gives it out (ADEChallengeData2016.zip): 150 classes, 20,210 and 2,000 images.

B. Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.prepare.listing import Listing
from data_pipeline.prepare.mask_folders import Layout, list_mask_folders
from data_pipeline.shards.source import DataError
from data_pipeline.targets.masks import MaskLabels

NAME = "ade20k"
HELP = "ADE20K scene parsing (ADEChallengeData2016), 150 classes"

NUM_CLASSES = 150
NAMES_FILE = "objectInfo150.txt"
_FOLDERS = {"train": "training", "val": "validation"}

_EXAMPLES = """\
example:
  python -m data_pipeline.prepare ade20k --src ADEChallengeData2016 --out shards

SRC holds images/{training,validation}/*.jpg, annotations/{training,validation}/*.png and objectInfo150.txt, as the
archive has them; the splits become train and val. Masks are copied byte by byte: 1 to 150 are the classes, 0 is
"other objects" and is ignored.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the archive was unpacked."""
    parser.description = "Turn ADE20K into shards: KEY.jpg and KEY.seg.png."
    parser.epilog = _EXAMPLES
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder ADEChallengeData2016")


def list_source(arguments: argparse.Namespace) -> Listing:
    """The unpacked archive."""
    source: Path = arguments.src
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    layout = Layout(
        {split: f"images/{folder}" for split, folder in _FOLDERS.items()},
        {split: f"annotations/{folder}" for split, folder in _FOLDERS.items()},
    )
    labels = MaskLabels(NUM_CLASSES, first_label=1, ignore=(0,))
    return list_mask_folders(NAME, source, layout, read_names(source / NAMES_FILE), labels, {})


def read_names(path: Path) -> tuple[str, ...]:
    """The 150 names: a table with a line of headings, whose columns (by tabs) begin with Idx and end with Name."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. It is part of the archive.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is no text.") from error
    names = {}
    for line in lines[1:]:
        columns = [column.strip() for column in line.split("\t")]
        if columns[0].isdecimal():
            names[int(columns[0])] = columns[-1]
    if sorted(names) != list(range(1, NUM_CLASSES + 1)) or not all(names.values()):
        raise DataError(f"{path} is damaged: it should name the classes 1 to {NUM_CLASSES}, and names {len(names)}.")
    return tuple(names[number] for number in range(1, NUM_CLASSES + 1))
