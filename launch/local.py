"""The same job on this machine, in the foreground: one process per rank, with what torchrun and Slurm would give them.

Signals go on to the ranks, which agree, checkpoint and leave. A rank that dies ends the others within seconds. Whether
another attempt follows is decided as in a Slurm job, by launch/verdict.py, from the same markers, with the same events.
"""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import events, runs
from launch.cluster import free_port
from launch.signals import STOP_SIGNALS, Noted
from launch.verdict import Ending, Tally, Verdict, decide, saved

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
"""How long the other ranks may take to say what they met after one has died; they cannot go on without it."""
TAIL_LINES = 20
CRASHED, INTERRUPTED = 1, 128 + signal.SIGINT
"""Exit statuses, as of launch/train.py."""
Marker = tuple[runs.End, dict[str, Any]] | None
"""How an attempt ended by its own words; None where it crashed."""
INTERRUPTS_TO_KILL = 3
"""Ctrl-C once checkpoints, twice ends the ranks at once, and this often kills them."""


@dataclass(frozen=True)
class LocalJob:
    """What is to run."""

    token: str
    """Distinguishes its markers from those of other jobs of the run."""
    run: Path
    """The run's folder."""
    command: tuple[str, ...]
    """What every rank executes."""
    processes: int
    use_gpus: bool
    max_retries: int
    """Crashes in a row without a new checkpoint that are followed by another attempt."""


def run(job: LocalJob, lock: int) -> int:
    """Runs the job to its end; returns the exit status: 0 complete or stopped as planned, 130 after Ctrl-C.

    `lock`: descriptor of the run's lock, handed on to the ranks so that it lasts as long as they do.
    """
    noted, tally, attempt = Noted(), Tally(), 0
    try:
        noted.install()
        while True:
            before = runs.newest_checkpoint(job.run)
            note(job, attempt, "started", f"attempt {attempt} on this machine, from {before or 'the beginning'}")
            marker = run_attempt(job, attempt, noted, lock)
            if asked_to_stop(marker, noted):
                return note_stop(job, attempt, marker, noted)
            newest = runs.newest_checkpoint(job.run)
            verdict = decide(
                Ending(marker, "", progressed=newest != before, hung=runs.hang_of(marker_prefix(job, attempt))),
                tally,
                job.max_retries,
            )
            tally = verdict.tally
            note_end(job, attempt, verdict, newest)
            if verdict.action != "again":
                return verdict.status
            attempt += 1
            say(f"starting again from the newest checkpoint (retry {tally.fruitless} of {job.max_retries})")
    finally:
        noted.restore()


def asked_to_stop(marker: Marker, noted: Noted) -> bool:
    """Whether the attempt ended because somebody asked for it; on this machine that ends the job."""
    return marker[0] == "interrupted" if marker else bool(noted.received)


def note_stop(job: LocalJob, attempt: int, marker: Marker, noted: Noted) -> int:
    """Notes that the job was stopped; returns the exit status."""
    if marker:
        text, status = f"stopped by {marker[1]['signal']}{saved(marker[1])}", 0
        if marker[1]["signal"] == "SIGINT":
            status = INTERRUPTED
    elif noted.received.count(signal.SIGINT) > 1:
        text, status = "ended at once, as asked; the newest checkpoint stays", INTERRUPTED
        say(text)
    else:
        text, status = f"the ranks died after {signal.Signals(noted.received[0]).name}, before they had saved", CRASHED
    note(job, attempt, "stopped", text, reason="signal", step=runs.step_of(runs.newest_checkpoint(job.run)))
    return status


def note_end(job: LocalJob, attempt: int, verdict: Verdict, newest: str | None) -> None:
    """Notes how an attempt ended, and says what the console does not show yet."""
    step = runs.step_of(newest)
    if verdict.action == "done":
        note(job, attempt, "finished", verdict.text, step=step)
        return
    note(job, attempt, "stopped", verdict.text, reason=verdict.reason, step=step)
    if verdict.action == "stop" and verdict.reason in ("crash", "hang"):
        note(job, attempt, "gave-up", verdict.text, step=step)
        if job.max_retries:
            say(verdict.text)


def note(job: LocalJob, attempt: int, event: events.Event, text: str, **facts: Any) -> None:
    """Notes an event of the run; a full disk costs the note, not the run."""
    try:
        events.note(job.run, event, text, token=job.token, attempt=attempt, **facts)
    except OSError as error:
        say(f"{events.FILE} could not be written: {error.strerror or error}")


def marker_prefix(job: LocalJob, attempt: int) -> str:
    """Where an attempt's markers are, without their endings."""
    return str(job.run / "jobs" / f"{job.token}.{attempt}")


def run_attempt(job: LocalJob, attempt: int, noted: Noted, lock: int) -> Marker:
    """Starts the ranks once, waits for their end, reports a death; returns the marker that they left."""
    marker = marker_prefix(job, attempt)
    logs = [job.run / "logs" / f"rank-{rank}.log" for rank in range(job.processes)]
    for folder in (logs[0].parent, job.run / "jobs"):
        folder.mkdir(parents=True, exist_ok=True)
    runs.claim(marker)
    begins = [log.stat().st_size if log.exists() else 0 for log in logs]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with held_back():
            port = free_port()
            for rank, log in enumerate(logs):
                ranks.append(start_rank(job, rank, rank_environment(job, rank, port, marker), log, lock))
        console = Mirror(logs[0], begins[0])
        dead = supervise(ranks, noted, console)
    finally:
        for process in ranks:
            kill(process)
    end = runs.read_marker(marker)
    killed_on_request = end is None and noted.received.count(signal.SIGINT) > 1
    words_are_shown = end is not None and (end[0] != "failed" or 0 in dead)  # rank 0's are on the console already
    if not (killed_on_request or words_are_shown):
        report_death(ranks, dead, logs, begins)
    return end


def start_rank(job: LocalJob, rank: int, environment: dict[str, str], log: Path, lock: int) -> subprocess.Popen[bytes]:
    """One process, in a session of its own: Ctrl-C reaches it through the launcher alone, once."""
    with log.open("ab") as output:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )


def rank_environment(job: LocalJob, rank: int, port: int, marker: str) -> dict[str, str]:
    """The variables of torchrun's contract, and what launch/train.py asks for."""
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(job.processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(job.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "DGT_LAUNCHER_PID": str(os.getpid()),
        runs.LOCK_VARIABLE: "1",
        runs.MARKER_VARIABLE: marker,
    }
    return environment if job.use_gpus else environment | {"CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def held_back() -> Iterator[None]:
    """Blocks the stop signals; a process that starts meanwhile has them blocked until its handlers are there."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def supervise(ranks: list[subprocess.Popen[bytes]], noted: Noted, console: Mirror) -> list[int]:
    """Waits until all ranks have ended, passing signals on; returns the ranks that died, first deaths first.

    A death starts the grace of the others, after which they are killed; those do not count as dead.
    """
    passed_on = 0
    dead: list[int] = []
    deadline = float("inf")
    while True:
        running = [process for process in ranks if process.poll() is None]
        console.show()
        deaths = [r for r, process in enumerate(ranks) if process.returncode not in (None, 0, INTERRUPTED)]
        deaths = [r for r in deaths if r not in dead]
        dead += sorted(deaths, key=lambda r: ranks[r].returncode > 0)  # a kill is the cause of others' errors
        if not running:
            return dead
        for number in noted.received[passed_on:]:
            passed_on += 1
            for process in running:
                process.send_signal(number)
        if noted.received.count(signal.SIGINT) >= INTERRUPTS_TO_KILL:
            return dead
        if dead and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return dead
        time.sleep(POLL_SECONDS)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a rank and whatever it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report_death(ranks: list[subprocess.Popen[bytes]], dead: list[int], logs: list[Path], begins: list[int]) -> None:
    """Says which rank died first and how, with the end of its log, and names the others."""
    if not dead:
        say("all ranks have left without saying how training ended; see " + str(logs[0]))
        return
    first, *others = dead
    say(f"rank {first} {ending(ranks[first].returncode)}; the end of {logs[first]}:")
    with logs[first].open("rb") as file:
        file.seek(begins[first])
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines[-TAIL_LINES:]:
        print(f"    {line}", file=sys.stderr)
    for rank in others:
        say(f"then rank {rank} {ending(ranks[rank].returncode)}, see {logs[rank]}")


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def say(text: str) -> None:
    """The launcher's own words, apart from the ranks'."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


class Mirror:
    """Shows on the console what is appended to a log."""

    def __init__(self, log: Path, begin: int):
        self.log, self.shown = log, begin
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self) -> None:
        """Prints what has come since the last call; a console that has gone away is no reason to stop."""
        with self.log.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        self.shown += len(new)
        if new:
            with suppress(BrokenPipeError):
                sys.stdout.write(self.decoder.decode(new))
                sys.stdout.flush()
