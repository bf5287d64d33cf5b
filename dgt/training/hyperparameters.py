"""What a run was, for TensorBoard's table of runs (its HPARAMS tab)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Dotted keys and values of nested plain settings; lists and None as text, as the table knows neither."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, (bool, int, float, str)) else str(value)


def add(curves: SummaryWriter, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Writes the settings, and that the last points of the curves `metrics` are the run's results.

    Into the curves' own file: SummaryWriter.add_hparams would make a folder of its own for each call, which looks like
    a run of its own.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(flat(settings)), dict.fromkeys(metrics, 0.0)):
        curves._get_file_writer().add_summary(summary)
