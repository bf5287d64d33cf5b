"""The parent's side: worker processes, one per contestant, that run in turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.data.contestants import Task

REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE = 900.0
"""Seconds after which a contestant that does not answer is given up."""
_FAREWELL = 20.0
"""Seconds that a contestant has to end by itself."""


class ContestantError(Exception):
    """A contestant could not be started or failed; the message is for the table."""


class Worker:
    """A worker process. It waits, idle, between two orders."""

    def __init__(self, python: str, log: Path) -> None:
        self._log = log
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.data.worker"],
                cwd=REPOSITORY,
                env=environment,
                bufsize=0,  # nothing is left to be written when a worker's end is closed
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )

    def order(self, patience: float = _PATIENCE, **order: Any) -> dict[str, Any]:
        """Send an order and wait for the answer; raises ContestantError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
        except BrokenPipeError as error:
            raise ContestantError(f"its process has ended; see {self._log}") from error
        line = self._line(stdout.fileno(), patience)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def _line(self, descriptor: int, patience: float) -> bytes:
        line, deadline = b"", time.monotonic() + patience
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ContestantError(f"no answer for {patience:.0f} s; see {self._log}")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise ContestantError(f"its process has ended; see {self._log}")
            line += part
        return line

    def stop(self) -> None:
        """End the process and everything below it."""
        with contextlib.suppress(ContestantError, subprocess.TimeoutExpired):  # it is killed in any case
            self.order(do="stop", patience=_FAREWELL)
            self._process.wait(_FAREWELL)  # libraries tidy up shared memory when they may end by themselves
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def start_worker(python: str, task: Task, log: Path) -> tuple[Worker, dict[str, str]]:
    """A worker that is ready to serve its first epoch, and the versions of its packages; raises ContestantError."""
    worker = Worker(python, log)
    try:
        return worker, worker.order(do="start", task=asdict(task))["versions"]
    except BaseException:
        worker.stop()
        raise


def prepare_in_worker(python: str, contestant: str, files: Path, folder: Path, log: Path) -> None:
    """Let a contestant write its own form of the images; raises ContestantError."""
    worker = Worker(python, log)
    try:
        worker.order(do="prepare", contestant=contestant, files=str(files), folder=str(folder))
    finally:
        worker.stop()
