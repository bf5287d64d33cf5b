"""A data preparation on this machine: its parts as processes, started a few at a time and watched, then the merge."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from launch import cluster, local, prepare_job, runs
from launch.converter import WRONG_USAGE
from launch.layout import count
from launch.prepare_job import PrepareJob
from launch.signals import Noted

ERROR, LEFT_OUT, INTERRUPTED = 1, 3, 130
"""Exit statuses of the converters."""


def run(job: PrepareJob, max_retries: int = 0) -> int:
    """Makes the parts, some at once, and merges them; returns the exit status, as a converter would.

    `max_retries`: how often a part that failed is started again. Raises LaunchError where something stands against the
    job, or where the folder is being prepared already.
    """
    prepare_job.refuse(prepare_job.problems(job))
    at_once, _ = shares(job)
    with runs.locked(job.folder) as lock:
        prepare_job.not_active(job)
        code = prepare_job.take_snapshot(job)
        logs = job.folder / "logs"
        logs.mkdir(exist_ok=True)
        local.say(f"{job.out}: {count(job.parts, 'part')}, {at_once} at once; logs in {logs}")
        noted = Noted().install()
        try:
            crew = Crew(lambda work: start_part(job, code, work, logs, lock), at_once, max_retries, noted, logs)
            failed = crew.work_off(f"part-{number}" for number in range(1, job.parts + 1))
            if not failed:
                failed = Crew(lambda _: start_merge(job, code, lock), 1, 0, noted).work_off(["merge"])
        finally:
            noted.restore()
    if noted.received:
        local.say("interrupted; the same command goes on: finished shards are kept")
        return INTERRUPTED
    if "merge" in failed and failed["merge"] > 0:
        return failed["merge"]
    return ERROR if failed else 0


def show(job: PrepareJob) -> str:
    """The commands that would be started, and what stands against it; writes nothing."""
    at_once, own = shares(job)
    code = job.folder / "code" / "DIGEST"
    lines = [
        prepare_job.described(job),
        f"I = 1 to {job.parts}, {at_once} at once:",
        f"    {shlex.join(command(job, code, *own, '--part', f'I/{job.parts}'))}",
        "then:",
        f"    {shlex.join(command(job, code, '--merge'))}",
    ]
    return "\n".join([*lines, *(f"problem: {problem}" for problem in prepare_job.problems(job))])


def shares(job: PrepareJob) -> tuple[int, list[str]]:
    """How many parts this machine makes at once, and the arguments that give each its share of the cores."""
    cores = cluster.cores()
    at_once = min(job.parts, max(1, cores // job.processes))
    return at_once, ["--jobs", str(max(1, cores // at_once))]


def command(job: PrepareJob, code: Path, *own: str) -> list[str]:
    """The converter of a snapshot; what was typed goes before `own` arguments such as --jobs."""
    converter, *typed = job.arguments
    return [sys.executable, str(code / "launch" / "converter.py"), converter, *own, *typed]


def start_part(job: PrepareJob, code: Path, work: str, logs: Path, lock: int) -> Popen[bytes]:
    """Starts a part, which holds the lock of the job's folder, too, in case this program is killed."""
    _, own = shares(job)
    words = command(job, code, *own, "--part", f"{work.removeprefix('part-')}/{job.parts}")
    with (logs / f"{work}.log").open("ab") as log:
        return Popen(words, stdin=DEVNULL, stdout=log, stderr=STDOUT, pass_fds=(lock,), start_new_session=True)


def start_merge(job: PrepareJob, code: Path, lock: int) -> Popen[bytes]:
    """Starts the merge, whose words belong on the console."""
    return Popen(command(job, code, "--merge"), stdin=DEVNULL, pass_fds=(lock,), start_new_session=True)


@dataclass
class Crew:
    """Processes that work something off."""

    start: Callable[[str], Popen[bytes]]
    """Starts the process for a work, by its name, in a session of its own: signals reach it through the crew alone."""
    at_once: int
    max_retries: int
    """How often a work that failed is started again."""
    noted: Noted
    logs: Path | None = None
    """Folder of the works' logs, NAME.log; None where their words are on the console."""
    running: dict[str, Popen[bytes]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    passed_on: int = 0
    """How many of the noted signals the processes have been told."""

    def work_off(self, works: Iterable[str]) -> dict[str, int]:
        """Runs the works to their end, or until a signal comes; returns the statuses of those that failed."""
        waiting, failed = deque(works), dict[str, int]()
        try:
            while self.running or (waiting and not self.noted.received):
                while waiting and len(self.running) < self.at_once and not self.noted.received:
                    work = waiting.popleft()
                    self.running[work] = self.start(work)
                for work in self.ended():
                    status = self.dismiss(work)
                    if status and self.is_to_be_repeated(work, status):
                        waiting.append(work)
                    elif status:
                        failed[work] = status
                self.pass_on_signals()
                time.sleep(local.POLL_SECONDS)
        finally:
            for process in self.running.values():
                local.kill(process)
        return failed

    def ended(self) -> list[str]:
        """The works whose processes have ended."""
        return [work for work, process in self.running.items() if process.poll() is not None]

    def dismiss(self, work: str) -> int:
        """Says how a process ended, and ends what it may have left behind; returns its status."""
        process = self.running.pop(work)
        local.kill(process)
        status = process.returncode
        if status == 0:
            local.say(f"{work} is done")
            return status
        self.failures[work] += 1
        local.say(f"{work} {'is done; some images are left out' if status == LEFT_OUT else local.ending(status)}")
        if self.logs is not None and not self.noted.received:
            log = self.logs / f"{work}.log"
            local.say(f"the end of {log}:")
            for line in log.read_text(errors="replace").splitlines()[-local.TAIL_LINES :]:
                print(f"    {line}", file=sys.stderr)
        return status

    def is_to_be_repeated(self, work: str, status: int) -> bool:
        """Whether a failed work is started again."""
        return self.failures[work] <= self.max_retries and status != WRONG_USAGE and not self.noted.received

    def pass_on_signals(self) -> None:
        """Tells the processes of the first signal as Ctrl-C, which converters know; later ones end them at once.

        That harms nothing: a shard appears when it is whole.
        """
        for _ in self.noted.received[self.passed_on :]:
            self.passed_on += 1
            for process in self.running.values():
                if self.passed_on == 1:
                    process.send_signal(signal.SIGINT)
                else:
                    local.kill(process)
