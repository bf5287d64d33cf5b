"""How the programs of this package treat errors."""

from __future__ import annotations

import sys
from collections.abc import Callable

KNOWN_ERROR = 2
"""Exit status of an error that one sentence explains."""


def guarded(program: str, act: Callable[[], int]) -> int:
    """Runs `act`; an error that its message explains ends in that message and `KNOWN_ERROR`, without a traceback."""
    from launch.checks import known_errors

    try:
        return act()
    except known_errors() as error:
        return refuse(program, str(error))
    except KeyboardInterrupt:
        return 130


def refuse(program: str, *reasons: str) -> int:
    """Says why nothing was done."""
    for reason in reasons:
        print(f"{program}: {reason}", file=sys.stderr)
    return KNOWN_ERROR
