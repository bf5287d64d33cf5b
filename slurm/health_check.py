"""Whether this node is fit to train: run it alone, or let the batch script run it on every node before the ranks start.

    python slurm/health_check.py --gpus 8 --free /scratch=100
    srun python slurm/health_check.py --shared RUN --token TOKEN --report RUN/jobs/health --matmul-tflops 500

Prints one line a check. With --report DIR it also leaves DIR/NODE.json, replaced atomically as the checks go on:

    {"node": "n1", "ok": false, "checks": [{"name": "clock", "ok": false, "text": "...", "seconds": 0.01}, ...]}

The check that is under way stands there as one that did not end, for the case that it is all that is ever heard. Where
srun starts several tasks on a node, the one with local id 0 checks the node and reports; the others take part
in the all-reduce and print only what failed. The check "all-reduce" is about all nodes at once: its failure stands in
every node's report and blames none of them.

The job's GPUs are judged by what nvidia-smi and the kernel's messages say, see slurm/gpus.py. A value that a GPU does
not have, a query that a driver is too old for and messages that may not be read are no errors, but are said. Where
nvidia-smi is missing though GPUs are demanded, the node passes only if /dev has no NVIDIA device either: its GPUs are
another vendor's, or the plain files of a test cluster, and nothing can be asked. A device without nvidia-smi is a
driver half installed, and fails.

It needs no more than Python itself; torch is imported only for --matmul-tflops and --allreduce-gb-s.
Exit status: 0 if all is well, 1 if a check failed, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch.cluster import rank_variables
from launch.runs import LaunchError, write_atomically
from slurm.gpus import QUESTIONS, Finding, Gpus, Time, run

ALL_REDUCE = "all-reduce"
SPEED = Path(__file__).resolve().parent / "speed.py"
SHARE_OF_LIMIT = 0.8
"""How much of --limit the checks may use; in the rest srun starts them and collects what they say."""
SHARE_OF_EXCHANGE = 0.8
"""How much of what then is left ranks wait for each other, so that their words about who is missing come through."""


class Check(NamedTuple):
    """One question to the node."""

    name: str
    ask: Callable[[], Finding]
    limit: Callable[[], float] | None
    """Seconds after which the answer is no longer waited for; None where `ask` limits itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all checks that the command line asks for; returns the exit status."""
    started = time.time()
    options = parse(argv)
    allowed = Time.of(options.timeout, SHARE_OF_LIMIT * options.limit)
    os.environ.update(rank_variables(os.environ))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    leads = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
    report = Report(options.report if leads else None, node, allowed)
    for check in node_checks(options, node, started, allowed) if leads else ():
        say(node, report.make(check))
    if options.allreduce_gb_s:
        check = Check(ALL_REDUCE, lambda: all_reduce(options.allreduce_gb_s, allowed), allowed.left)
        result = report.make(check)
        if leads or not result["ok"]:
            say(node, result)
    written = report.write()
    if not written["ok"]:
        say(node, written)
    return 0 if written["ok"] and all(result["ok"] for result in report.results) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. Leaves the program with status 2 where they make no sense."""
    parser = argparse.ArgumentParser(prog="health_check.py", description="Check whether this node is fit to train.")
    # fmt: off
    add = parser.add_argument
    add("--gpus", type=count, metavar="N",
        help="GPUs that this node must show (default: as many as it lists; 0: GPUs are not looked at)")
    add("--shared", type=Path, metavar="DIR", help="folder that every node must see and be able to write")
    add("--token", metavar="TEXT", help="with --shared: DIR/jobs/TEXT.shared must contain TEXT, as the batch script "
        "has just written it; a node that does not see it has another file system there")
    add("--free", type=demand, action="append", default=[], metavar="PATH=GB",
        help="space that must be free there, in 10^9 bytes, or 0 for a place that only must be there and writable; "
        "$VARIABLES in PATH are this node's; repeatable")
    add("--now", type=positive, metavar="SECONDS", help="the batch script's clock as it starts srun (`date +%%s.%%N`)")
    add("--clock-skew", type=positive, default=5.0, metavar="S", help="most seconds between this node's clock and that "
        "of the batch script; without --now, that which stamps the files in --shared (default 5)")
    add("--matmul-tflops", type=positive, metavar="X",
        help="a matrix product must reach X TFLOP/s on each GPU (bf16), or on the CPU without GPUs (fp32)")
    add("--allreduce-gb-s", type=positive, metavar="Y", help="an all-reduce over all tasks of the srun step must reach "
        "Y GB/s of bus bandwidth, which is 2(n-1)/n * bytes/s")
    add("--report", type=Path, metavar="DIR", help="also write the results to DIR/NODE.json")
    add("--timeout", type=positive, default=30.0, metavar="S",
        help="seconds that nvidia-smi, dmesg or a file system may take to answer (default 30)")
    add("--limit", type=positive, default=300.0, metavar="S", help="seconds after which whoever has started this ends "
        "it: the checks take four fifths of them at most, with the waiting for other nodes (default 300)")
    # fmt: on
    options = parser.parse_args(argv)
    if options.token and not options.shared:
        parser.error("--token needs --shared: it names a file in that folder")
    return options


def count(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def demand(text: str) -> tuple[str, float]:
    """A path and the free space that is wanted there, in GB."""
    path, _, size = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected PATH=GB, got {text!r}")
    return path, 0.0 if size in ("0", "0.0") else positive(size)


def node_checks(options: argparse.Namespace, node: str, started: float, allowed: Time) -> Iterator[Check]:
    """The checks of this node, cheapest first; `started` is when the program was, by this node's clock."""
    if options.shared:
        yield Check("shared folder", lambda: shared_folder(options.shared, options.token, node), allowed.for_one)
    if options.now:
        yield Check("clock", lambda: clock(options, node, started), allowed.for_one)
    elif options.shared:
        yield Check("clock", lambda: clock_of_files(options, node), allowed.for_one)
    for path, size in options.free:
        yield Check(f"free space in {path}", functools.partial(free_space, path, size), allowed.for_one)
    if options.gpus != 0:
        yield from gpu_checks(Gpus(allowed, options.gpus))
    if options.matmul_tflops:
        yield Check("matrix product", lambda: matrix_product(options.matmul_tflops, allowed.left()), None)


def gpu_checks(gpus: Gpus) -> Iterator[Check]:
    """First the list of GPUs, and only where it has some, what nvidia-smi says of each."""
    yield Check("GPUs", gpus.listed, None)
    for question in QUESTIONS if gpus.are_there() else ():
        yield Check(question.name, functools.partial(gpus.state, question), None)
    if shutil.which("nvidia-smi"):
        yield Check("XID errors", gpus.xid_errors, None)


@dataclass
class Report:
    """What is told of this node, step by step."""

    folder: Path | None
    """Where it is written; None where it is not."""
    node: str
    allowed: Time
    results: list[dict[str, Any]] = field(default_factory=list)
    content: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    hangs: bool = False
    """Whether the folder has not answered once; it then is tried again at the end alone."""

    def make(self, check: Check) -> dict[str, Any]:
        """Makes a check and adds its result, before which the report has it as one that did not end."""
        if not self.hangs:
            unended = result_of(check.name, Finding(False, "did not end; see what this step printed"), 0.0)
            self.hangs = not self.write(unended)["ok"]
        self.results.append(answer(check))
        return self.results[-1]

    def write(self, *more: dict[str, Any]) -> dict[str, Any]:
        """Replaces the report by the results and `more`; the result says whether that was possible."""
        checks = [*self.results, *more]
        content = {"node": self.node, "ok": all(result["ok"] for result in checks), "checks": checks}
        self.content = json.dumps(content, indent=1) + "\n"
        return answer(Check("report", self.put, self.allowed.for_one))

    def put(self) -> Finding:
        """Writes the newest content, also where an earlier call that hung goes on after a later one."""
        with self.lock:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / f"{self.node}.json", self.content)
        return Finding(True, f"written to {self.folder}")


def answer(check: Check) -> dict[str, Any]:
    """Makes one check; an exception is a failed check with its words.

    The check has a thread of its own, because a file system or a driver that hangs cannot be interrupted.
    """
    findings: list[Finding] = []

    def ask() -> None:
        try:
            findings.append(check.ask())
        except (LaunchError, OSError) as error:
            findings.append(Finding(False, str(error)))
        except Exception as error:
            findings.append(Finding(False, f"{type(error).__name__}: {error}"))

    began = time.monotonic()
    limit = check.limit() if check.limit else None
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit)
    found = findings[0] if findings else Finding(False, f"no answer within {limit:.3g} s; it may hang for good")
    return result_of(check.name, found, time.monotonic() - began)


def result_of(name: str, found: Finding, seconds: float) -> dict[str, Any]:
    """A check as it stands in the report."""
    return {"name": name, "ok": found.ok, "text": found.text, "seconds": round(seconds, 3)}


def say(node: str, result: Mapping[str, Any]) -> None:
    """One line on the console."""
    line = " ".join(result["text"].split())  # libraries put line ends into their messages
    print(f"{'ok  ' if result['ok'] else 'FAIL'}  {node}  {result['name']}: {line}", flush=True)


def shared_folder(folder: Path, token: str | None, node: str) -> Finding:
    """Whether this node sees what the batch script wrote, and can write itself."""
    proof = folder / "jobs" / f"{token}.shared"
    if token and read_anew(proof) != token:
        advice = "mount the right one, or put the run on storage that all nodes share"
        return Finding(False, f"{proof} is not as the batch script wrote it: another file system is mounted; {advice}")
    write_small_file(folder, node)
    return Finding(True, f"{folder} can be written" + (" and is that of the batch script" if token else ""))


def read_anew(path: Path) -> str | None:
    """A file's text without the spaces around it; None where there is no such file."""
    try:
        os.listdir(path.parent)  # makes an NFS client ask its server instead of its cache
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def clock(options: argparse.Namespace, node: str, started: float) -> Finding:
    """Whether this node's clock agrees with the batch script's, as far as can be told.

    This program has `started` after --now, and before the limit of its step; that finds a clock that is behind. The one
    that stamps files in --shared is the same for both, if it is a file server's: that finds a clock that is ahead.
    """
    passed = started - options.now
    ahead = passed - options.limit
    proof = options.shared / "jobs" / f"{options.token}.shared" if options.token else None
    if proof is not None and read_anew(proof) is not None:
        # the batch script's clock is ahead of the stamps by no more than this, as it has written the proof before --now
        batch = options.now - proof.stat().st_mtime
        ahead = max(ahead, clock_difference(*write_small_file(options.shared, node)) - batch)
    for off, word in ((ahead, "ahead of"), (-passed, "behind")):
        if off > options.clock_skew:
            text = f"at least {off:.1f} s {word} the batch script's, at most {options.clock_skew:g} s wanted"
            return Finding(False, f"{text}; check the time service of both nodes (chronyc)")
    return Finding(True, f"within {options.clock_skew:g} s of the batch script's, as far as can be told")


def clock_of_files(options: argparse.Namespace, node: str) -> Finding:
    """Whether this node's clock agrees with the one that stamps files in --shared, which can be this node's itself."""
    off = clock_difference(*write_small_file(options.shared, node))
    text = f"differs by {abs(off):.1f} s from the one that stamps files there, at most {options.clock_skew:g} s wanted"
    if abs(off) <= options.clock_skew:
        return Finding(True, text)
    return Finding(False, f"{text}: it is {'ahead' if off > 0 else 'behind'}; check the time service of both (chronyc)")


def clock_difference(before: float, stamp: float, after: float) -> float:
    """Seconds by which a clock is ahead (positive) of one that stamped a file between `before` and `after`.

    A stamp within that time says nothing, however long the write took. A server may stamp in whole seconds.
    """
    earliest = math.floor(before)
    if stamp < earliest:
        return earliest - stamp
    return min(0.0, after - stamp)


def write_small_file(folder: Path, node: str) -> tuple[float, float, float]:
    """Writes and removes a file; the time before, the file's own time, and the time after.

    Raises LaunchError where that is not possible.
    """
    path = folder / f".health-{node}-{threading.get_native_id()}"
    before = time.time()
    try:
        with path.open("w") as file:
            file.write(f"{node}\n")
            file.flush()
            os.fsync(file.fileno())
        times = before, path.stat().st_mtime, time.time()
        path.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise LaunchError(f"{folder} cannot be written on this node: {error.strerror}") from None
    return times


def free_space(path: str, wanted: float) -> Finding:
    """Whether `wanted` GB are free at `path`, in which variables are filled in, and can be written."""
    place = os.path.expandvars(path)
    if "$" in path and ("$" in place or not os.path.isabs(place)):
        return Finding(False, f"{path} is {place!r} on this node: a variable is not set, or names no absolute path")
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(False, f"{place} cannot be written; a disk with errors is often mounted read-only")
    text = f"{free:.2f} GB, {wanted:g} GB wanted"
    return Finding(free >= wanted, text if free >= wanted else f"{text}; remove what old jobs left there")


def matrix_product(wanted: float, limit: float) -> Finding:
    """Whether each GPU that torch sees, or else the CPU, multiplies at `wanted` TFLOP/s.

    A process of its own measures, so that this one holds no GPU that another rank needs for the all-reduce.
    """
    status, output = run([sys.executable, str(SPEED)], limit)
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if status or line is None:
        said = (output.strip().splitlines() or ["nothing"])[-1]
        return Finding(False, f"{SPEED} ended with status {status}, and said: {said}")
    measured = {device: operations / 1e12 for device, operations in json.loads(line).items()}
    text = ", ".join(f"{device} {value:.3g}" for device, value in measured.items()) + f" TFLOP/s, {wanted:g} wanted"
    if min(measured.values()) >= wanted:
        return Finding(True, text)
    return Finding(False, f"{text}; look for heat, a power cap or another program (nvidia-smi -q -d PERFORMANCE)")


def all_reduce(wanted: float, allowed: Time) -> Finding:
    """Whether all ranks of this step exchange data at `wanted` GB/s of bus bandwidth."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return Finding(True, "there is only one rank, so nothing is exchanged")
    from slurm import speed

    measured = speed.all_reduce(SHARE_OF_EXCHANGE * allowed.left())
    value = measured.bandwidth / 1e9
    text = f"{value:.3g} GB/s over {measured.ranks} ranks ({measured.backend}), {wanted:g} GB/s wanted"
    if value >= wanted:
        return Finding(True, text)
    return Finding(False, f"{text}; see with NCCL_DEBUG=INFO which network is used, and check its links")


if __name__ == "__main__":
    outcome = main()
    os._exit(outcome)  # not sys.exit: it would wait for what still hangs
