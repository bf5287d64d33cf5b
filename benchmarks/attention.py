"""DG-Attention against dense attention, side by side in one run: python -m benchmarks.attention [--threads 1]

Forward and forward+backward with grouping and selection included, float32, at the sizes of a stage. Rounds are
interleaved: every contestant runs once per round, so that a busy moment of the machine meets all of them. Prints the
median time of each and its ratio to dense attention (above 1 is faster), with the spread of that ratio over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dgt.ops import dg_attention

CONTESTANTS = ("dense", "grouped", "reference")
REFERENCE_LIMIT = 3136
"""Longest sequence for the loops of the definition."""


def main() -> None:
    """Runs every size and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[196, 784, 3136, 12544], help="tokens per image")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--batch", type=int, default=2, help="image-heads")
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=98)
    parser.add_argument("--json", type=Path, help="write all times and the machine to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    table = Table(title=f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
                        f"{options.threads} thread(s), B*H={options.batch}, D=32, G={options.groups}, "
                        f"k={options.top_k}, float32")  # fmt: skip
    for column in ("L", "pass", "contestant", "median ms", "against dense", "spread"):
        table.add_column(column, justify="right")
    results = []
    for length in options.lengths:
        for backward in (False, True):
            times = measure(length, backward, options)
            for name, seconds in times.items():
                ratios = sorted(d / s for d, s in zip(times["dense"], seconds, strict=True))
                table.add_row(
                    str(length), "forward+backward" if backward else "forward", name,
                    f"{1e3 * statistics.median(seconds):.1f}", f"{statistics.median(ratios):.2f}x",
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                )  # fmt: skip
                results.append({"length": length, "backward": backward, "contestant": name, "seconds": seconds})
    Console().print(table)
    if options.json:
        facts = {"torch": torch.__version__, "machine": platform.platform(), "threads": options.threads}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1))


def measure(length: int, backward: bool, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contestant in every round; one round before them is not counted."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(options.batch, 1, length, 32, generator=rng).requires_grad_(backward) for _ in range(3))
    names = [name for name in CONTESTANTS if name != "reference" or length <= REFERENCE_LIMIT]

    def once(name: str) -> Callable[[], Tensor]:
        return lambda: dg_attention(q, k, v, num_groups=options.groups, top_k=options.top_k, backend=name)

    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(options.rounds + 1):
        for name in names:
            started = time.perf_counter()
            out = once(name)()
            if backward:
                out.sum().backward()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
