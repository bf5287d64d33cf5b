"""How plans write numbers and tables."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "unknown"


def seconds(value: float | None) -> str:
    """A time in words."""
    if value is None:
        return UNKNOWN
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def gigabytes(value: int) -> str:
    """Bytes in words."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
