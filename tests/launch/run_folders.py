"""Run folders written by hand, Slurm's commands played by small scripts, processes that hold a run's lock."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

from launch import events, jobs, runs
from launch.runs import JobRecord

TOKEN = "slurm-20261124-053612-1a2b"
ONE = f"{TOKEN}|one"
"""The end of squeue's line about the job of the run `one`: comment and name."""
HOLD = """
import signal, sys, time
from pathlib import Path
from launch import runs
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
with runs.locked(Path(sys.argv[1])):
    print("held", flush=True)
    while True:
        time.sleep(0.05)
"""
REPORT = "epoch  2/10 [====                ] step {step}/500  loss 0.5000  lr 1.00e-03  812 images/s"


class Place:
    """A folder of runs, and what Slurm is to answer: an empty queue and no accounting at first."""

    def __init__(self, folder: Path):
        self.folder = folder / "runs"
        self.folder.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        self.queue()
        self.command("sacct", errors="Slurm accounting storage is disabled", code=1)

    def run(self, name: str, cluster: str | None = "slurm", job: str = "12", **changes: Any) -> Path:
        """A run's folder, submitted unless `cluster` is None."""
        run = self.folder / name
        run.mkdir()
        (run / "config.yaml").write_text("name: x\nsteps: {max_steps: 0}\n")
        if cluster:
            token = TOKEN if cluster == "slurm" else "local-20261124-053612-1a2b"
            record = JobRecord(
                cluster, token, job if cluster == "slurm" else "", 2, 4, True, ("python", "train.py"), "/", {},
                "2026-11-24T05:36:12", socket.gethostname(),
            )  # type: ignore[arg-type]  # fmt: skip
            (run / "job.json").write_text(json.dumps(asdict(record) | changes))
        return run

    def command(self, name: str, output: str = "", errors: str = "", code: int = 0, before: str = ":") -> None:
        """Puts one of Slurm's commands on the path; its calls are noted. `before`: what it does first, in shell."""
        script = f"#!/bin/sh\n{before}\necho {name} \"$@\" >> {self.calls}\ncat <<'END'\n{output}\nEND\n"
        path = self.bin / name
        path.write_text(script + f"echo '{errors}' >&2\nexit {code}\n")
        path.chmod(0o755)

    def queue(self, *lines: str) -> None:
        """What squeue answers: number|state|reason|nodes|start|comment|name."""
        self.command("squeue", "\n".join(lines))

    def scancel(self, *lines: str, before: str = ":") -> None:
        """Puts scancel on the path, after which squeue answers these lines. `before`: what it does first, in shell."""
        self.command("squeue.then", "\n".join(lines))
        self.command("scancel", before=f"{before}\nmv {self.bin}/squeue.then {self.bin}/squeue")

    def called(self, name: str) -> list[str]:
        """The calls of a command."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.split()[0] == name]

    def type(self, *words: str) -> int:
        """Runs the program in this process."""
        return jobs.main([*words, "--runs", str(self.folder)])


def tell(run: Path, *story: str, token: str | None = None) -> None:
    """Notes events: KIND, or stopped:REASON. `token`: of another submission than the last."""
    record = runs.read_record(run)
    token = token or (record.token if record else None)
    for word in story:
        kind, _, reason = word.partition(":")
        facts: dict[str, Any] = {"attempt": 0, "nodes": ["n1", "n2"]} if kind == "started" else {}
        events.note(run, kind, f"{word} was noted", reason=reason or None, token=token, **facts)  # type: ignore[arg-type]


def report(run: Path, *rows: dict[str, Any]) -> None:
    """Lines of metrics.jsonl, and the log that goes with them."""
    (run / "logs").mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file, (run / "logs" / "rank-0.log").open("a") as log:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            log.write(REPORT.format(step=row["step"]) + "\n")


@contextmanager
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run's lock, until the end or its SIGINT, after which its status is 7."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()
