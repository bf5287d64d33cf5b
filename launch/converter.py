"""A converter as the jobs of launch/prepare_job.py run it: `python -m data_pipeline.prepare` of this file's snapshot.

    python CODE/launch/converter.py imagenet --src /raw --out /data/in1k --part 3/16

Where DGT_FINISHED_SHARDS names a file, that gets a line for each shard that is finished.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

WRONG_USAGE = 64
"""Exit status where the converter refuses its arguments (EX_USAGE of sysexits.h). argparse's own, 2, is also what
Python ends with where it cannot open a program, which may be there at the next attempt."""
FINISHED_VARIABLE = "DGT_FINISHED_SHARDS"


def note_finished_shards(path: str) -> None:
    """Has this process add a line to a file for each shard that it finishes, that is, whose index it puts in its place.

    A converter alone knows which shards are its part's, and it may be killed at any moment. The processes that share
    its work import this file, too, and do the same.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".idx"):
            with contextlib.suppress(OSError), open(path, "a") as file:
                file.write(f"{arguments[1]}\n")

    sys.addaudithook(hook)


def main() -> int:
    """The converters, from the folder that this file lies in; returns the exit status."""
    from data_pipeline.prepare import main as prepare

    try:
        return prepare()
    except SystemExit as end:
        if end.code != 2:
            raise
        return WRONG_USAGE


if __name__ in ("__main__", "__mp_main__") and FINISHED_VARIABLE in os.environ:  # the latter in multiprocessing
    note_finished_shards(os.environ[FINISHED_VARIABLE])
if __name__ == "__main__":
    sys.exit(main())
