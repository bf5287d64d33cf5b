"""Time and memory to go on within huge data sets: python -m benchmarks.data_resume [--rounds N] [--json FILE]

Two sets: 14 million samples in 1,400 shards under order "global", and 5 billion in 500,000 shards under "block" (rank
17 of 64, 8 canonical streams). Their index.json and the shards that are read are real files; all shards have the same
content and are hard links to one. Each position is measured in a process of its own, from opening the folder to holding
the first batch. The memory is the most that the process held beyond what it held with everything imported, which is
listed beside it: torch built for CUDA alone takes half a gigabyte.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

SHARD_SAMPLES = 10_000


@dataclass(frozen=True)
class Case:
    """A data set and who reads it."""

    what: str
    shards: int
    order: Literal["global", "block"]
    streams: int
    rank: int
    world_size: int
    global_batch_size: int
    max_seconds: float
    max_bytes: int

    @property
    def samples(self) -> int:
        """Samples in the set."""
        return self.shards * SHARD_SAMPLES

    def positions(self) -> list[int]:
        """Where to go on: at the start, and at whole batches within and near the end of the epoch."""
        step = self.global_batch_size
        return [int(share * self.samples) // step * step for share in (0, 0.37, 0.9999)]


CASES = (
    Case("14 million samples, global", 1_400, "global", 1, 0, 1, 256, 2.0, 500_000_000),
    Case("5 billion samples, block", 500_000, "block", 8, 17, 64, 16_384, 2.0, 1_000_000_000),
)


def make_set(folder: Path, case: Case, one: Path) -> None:
    """Writes the case's index.json, and links to the shard `one` for those shards that its positions are read from."""
    from data_pipeline.order import EpochOrder
    from data_pipeline.shards import set_index, shard_index

    header = shard_index.load(one.with_suffix(".idx")).header
    names = tuple(f"shard-{number:06d}.tar" for number in range(case.shards))
    samples, tar_bytes, index_bytes = (
        np.full(case.shards, value) for value in (SHARD_SAMPLES, header.tar_bytes, header.file_bytes)
    )
    split = set_index.SplitIndex(
        names, samples, tar_bytes, index_bytes, (header.tar_sha256.hex(),) * case.shards, left_out=0
    )
    (folder / "train").mkdir(parents=True)
    (folder / set_index.FILE_NAME).write_bytes(set_index.to_bytes(set_index.SetIndex(("a", "b"), {"train": split})))
    if case.order == "block":
        order = EpochOrder("block", split.samples, 0, 0, streams=case.streams)
        places = np.concatenate([position + np.arange(4 * case.global_batch_size) for position in case.positions()])
        needed = np.unique(order.at(places[places < len(order)])[0] // SHARD_SAMPLES).tolist()
    else:
        needed = list(range(case.shards))
    for number in needed:
        for suffix in (".tar", ".idx"):
            (folder / "train" / names[number]).with_suffix(suffix).hardlink_to(one.with_suffix(suffix))


def write_shard(path: Path) -> None:
    """A shard of 10,000 tiny images."""
    from data_pipeline.shards import writer

    def samples() -> Iterator[writer.EncodedSample]:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 30, 90)).save(file, "JPEG")
        for number in range(SHARD_SAMPLES):
            yield writer.EncodedSample(f"{number:08d}", "jpg", file.getvalue(), number % 2, 8, 8, "420")

    writer.write_shard(path, samples())


def resume_here(folder: Path, case: Case, position: int) -> dict[str, Any]:
    """Opens the set in this process, goes to the position and takes one batch."""
    from data_pipeline.config import DataConfig
    from data_pipeline.loader import build_loader

    config = DataConfig(
        path=str(folder), num_classes=2, image_size=64, num_threads=2, order=case.order, canonical_nodes=case.streams
    )
    before = memory("VmRSS")
    started = time.perf_counter()
    with build_loader(
        config, "train", train=True, global_batch_size=case.global_batch_size, rank=case.rank,
        world_size=case.world_size, seed=0,
    ) as loader:  # fmt: skip
        loader.load_state_dict({**loader.state_dict(), "consumed": position})
        batch = next(iter(loader))
        seconds = time.perf_counter() - started
    most = memory("VmHWM")
    return {"seconds": seconds, "bytes": most - before, "imports": before, "ids": batch.ids.tolist()}


def memory(name: str) -> int:
    """Resident memory of this process, in bytes: "VmRSS" now, "VmHWM" at most.

    (The latter rather than getrusage's, which counts the process that started this one.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resume_elsewhere(folder: Path, case: Case, position: int) -> dict[str, Any]:
    """`resume_here` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_resume", "--at", str(position), "--case", str(CASES.index(case))]
    ended = subprocess.run(
        [*command, "--folder", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def measure(rounds: int = 3, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """What each case takes: the median time and the most memory over its positions, and both limits."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        one = Path(scratch, "one.tar")
        write_shard(one)
        for number, case in enumerate(cases):
            folder = Path(scratch, str(number))
            make_set(folder, case, one)
            for position in case.positions():
                results = [resume_elsewhere(folder, case, position) for _ in range(rounds)]
                found.append(
                    {
                        "what": f"{case.what}, at {position:,}",
                        "seconds": statistics.median(result["seconds"] for result in results),
                        "bytes": max(result["bytes"] for result in results),
                        "imports": max(result["imports"] for result in results),
                        "max_seconds": case.max_seconds,
                        "max_bytes": case.max_bytes,
                    }
                )
    return found


def main() -> None:
    """Measures every case and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per position; default %(default)s")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    for name, kind in (("--at", int), ("--case", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # how this program starts itself
    options = parser.parse_args()
    if options.at is not None:
        print(json.dumps(resume_here(options.folder, CASES[options.case], options.at)))
        return
    found = measure(options.rounds)
    table = Table(title="open, seek, first batch")
    for column in ("what", "seconds", "limit", "MB", "limit", "imports"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for entry in found:
        sizes = [f"{entry[name] / 1e6:.0f}" for name in ("bytes", "max_bytes", "imports")]
        table.add_row(entry["what"], f"{entry['seconds']:.2f}", f"{entry['max_seconds']:g}", *sizes)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
