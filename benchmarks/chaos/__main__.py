"""Breaks real training runs at random until the time is over, and proves each of them unharmed, bit for bit.

    python -m benchmarks.chaos --minutes 5

Every run is small (dgt_nano on synthetic images, two ranks, mixing, drop path, averaged weights) and meets one to
three faults in each of its attempts; the last attempt is left alone. Every step of every attempt, and all tensors,
metrics and progress at the end, must be those of a run that met no fault. What was injected, survived and lost is
printed and, with --record, added to docs/benchmarks/chaos.json. A run that is lost stays in the output folder with all
its records.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.chaos import record
from benchmarks.chaos.faults import plan
from benchmarks.chaos.runs import ENGINES, WORLD_SIZE, small_run
from benchmarks.chaos.trial import Reference, Trial, undisturbed

DISK_MB = 400
USUAL_ENGINES = ("ddp", "fsdp")  # DeepSpeed need not be installed


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a run was lost."""
    options = parser().parse_args(argv)
    seed = int(time.time()) if options.seed is None else options.seed
    out = Path(options.out or tempfile.mkdtemp(prefix="dgt-chaos-"))
    print(f"seed {seed}; records in {out}")
    started = time.monotonic()
    survived: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    runs = 0
    with small_disk(out / "disk") as disk:
        references = {engine: reference(engine, out, disk) for engine in options.engine or USUAL_ENGINES}
        for number in itertools.count(options.first):
            if time.monotonic() - started > 60 * options.minutes or runs == options.runs:
                break
            engine = list(references)[number % len(references)]
            trial = one_run(engine, references[engine], seed, number, out, disk, started + 60 * options.minutes)
            runs += 1
            (lost if trial.trouble else survived).update(fault.name for fault in trial.met)
            if trial.trouble:
                tell_loss(trial, number)
            total = survived.total() + lost.total()
            print(f"run {number} ({engine}): {len(trial.rounds)} attempts, {len(trial.met)} faults; "
                  f"in all {total} injected, {survived.total()} survived, {lost.total()} lost", flush=True)  # fmt: skip
    entry = record.session(seed, time.monotonic() - started, runs, survived, lost)
    print(record.table(entry))
    if options.record:
        sessions = record.add(Path(options.record), entry)
        print("the record: {} survived, {} lost".format(*record.totals(sessions)))
    return 1 if lost else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    result.add_argument("--minutes", type=float, default=5.0, help="begin no further run after this long")
    result.add_argument("--runs", type=int, help="or after this many")
    result.add_argument(
        "--engine", action="append", choices=list(ENGINES), help="default: ddp and fsdp in turn; may be repeated"
    )
    result.add_argument("--seed", type=int, help="of the faults' choice (times vary all the same); default: the clock")
    result.add_argument("--first", type=int, default=0, help="number of the first run, to repeat one of a session")
    result.add_argument("--out", metavar="DIR", help="where runs and records go; default: a new folder")
    result.add_argument("--record", nargs="?", const=str(record.RECORD), metavar="FILE", help="add the result to FILE")
    return result


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system that can be filled without harm; raises SystemExit where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the chaos harness needs a small file system that it can fill: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def reference(engine: str, out: Path, disk: Path) -> Reference:
    """The undisturbed run of an engine."""
    shutil.rmtree(out / f"{engine}-undisturbed", ignore_errors=True)
    shutil.rmtree(out / f"{engine}-undisturbed-records", ignore_errors=True)
    config = small_run(out / f"{engine}-undisturbed", engine)
    return undisturbed(config, WORLD_SIZE, out / f"{engine}-undisturbed-records", disk / "run")


def one_run(
    engine: str, undisturbed_run: Reference, seed: int, number: int, out: Path, disk: Path, until: float
) -> Trial:
    """A whole run under faults; its records are kept where it is lost."""
    rng = random.Random(f"{seed} {number}")
    records = out / f"run-{number:05d}"
    shutil.rmtree(records, ignore_errors=True)
    config = dataclasses.replace(small_run(disk, engine), name="run")
    shutil.rmtree(config.run_dir, ignore_errors=True)
    trial = Trial(config, undisturbed_run, records)
    while not trial.finished and not trial.trouble and len(trial.rounds) < 25 and time.monotonic() < until:
        trial.go_on(plan(rng, undisturbed_run.scene), rng)
    trial.conclude()
    if trial.trouble:
        shutil.copytree(config.run_dir, records / "run")
    else:
        shutil.rmtree(records)
    return trial


def tell_loss(trial: Trial, number: int) -> None:
    """All that is needed to look into it."""
    print(f"LOST: run {number}: {trial.trouble}\n  kept in {trial.records}")
    for i, planned in enumerate(trial.rounds, 1):
        for fault in planned:
            print(f"  attempt {i}: {fault.name} {fault.orders} {'happened' if fault.happened else 'did not happen'}")


if __name__ == "__main__":
    sys.exit(main())
