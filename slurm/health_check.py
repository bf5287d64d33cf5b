"""Whether this node is fit to train: run it alone, or let the batch script run it on every node before the ranks start.

    python slurm/health_check.py --gpus 8 --free /scratch=100
    srun python slurm/health_check.py --shared RUN --token TOKEN --report RUN/jobs/health --matmul-tflops 500

Prints one line a check. With --report DIR it also leaves DIR/NODE.json, atomically:

    {"node": "n1", "ok": false, "checks": [{"name": "clock", "ok": false, "text": "...", "seconds": 0.01}, ...]}

Where srun starts several tasks on a node, the one with local id 0 checks the node and reports; the others take part
in the all-reduce and print only what failed. The check "all-reduce" is about all nodes at once: its failure stands in
every node's report and blames none of them.

GPUs are judged by what nvidia-smi and the kernel's messages say. A value that a GPU does not have, a query that a
driver is too old for and messages that may not be read are no errors, but are said. Where nvidia-smi is missing though
GPUs are demanded, the node passes only if /dev has no NVIDIA device either: its GPUs are another vendor's, or the plain
files of a test cluster, and nothing can be asked. A device without nvidia-smi is a driver half installed, and fails.

It needs no more than Python itself; slurm/speed.py, with torch, is imported only for
--matmul-tflops and --allreduce-gb-s.
Exit status: 0 if all is well, 1 if a check failed, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch.cluster import rank_variables
from launch.runs import LaunchError, write_atomically

DEVICES = Path("/dev")
ALL_REDUCE = "all-reduce"
MEASURING_LIMIT = 300
"""Seconds that a measurement with torch may take, its import and the wait for other nodes included."""

FATAL_XIDS = frozenset({48, 64, 74, 79, 95, 119, 120, 140})
"""XID errors after which a GPU or its links want a reset, a reboot or a repair: uncorrectable memory error (48), failed
row remapping (64), NVLink (74), fallen off the bus (79), uncontained memory error (95), no answer from the GPU's system
processor (119, 120), memory error that escaped (140). Source: NVIDIA's Xid catalog, "Resolution Bucket (Immediate
Action)", https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html. It says to ignore 63 and 92 and only to
restart the application after 94; what they may leave behind shows in the counters that are asked below."""
XID_MEMORY = 24 * 3600
"""Seconds for which an XID error counts: messages stay until the next boot, also where a reset has cured the GPU."""

HEALTHY = frozenset({"0", "no", "none"})
UNKNOWN = frozenset({"n/a", "not supported", "not available", "not found", "insufficient permissions"})
"""Words for a value that this GPU does not have, or that this user may not see."""
GPU_QUESTIONS = (  # what is asked; the query, the field with a GPU's identity and the field; what a bad value means
    ("ECC errors", "gpu", "uuid", "ecc.errors.uncorrected.volatile.total",
     "memory errors since the last reset; reset the GPU, and replace it when they come back"),
    ("retired pages", "gpu", "uuid", "retired_pages.pending", "bad memory pages wait for a reset of the GPU"),
    ("row remapping", "remapped-rows", "gpu_uuid", "remapped_rows.pending",
     "bad memory rows wait for a reset of the GPU"),
    ("row remapping failure", "remapped-rows", "gpu_uuid", "remapped_rows.failure",
     "there are no spare memory rows left; replace the GPU"),
    ("recovery action", "gpu", "uuid", "gpu_recovery_action", "the driver asks for this to be done"),
)  # fmt: skip


class Finding(NamedTuple):
    """What a check found: `text` has the value, what was wanted, and what to do where it is not `ok`."""

    ok: bool
    text: str


class Check(NamedTuple):
    """One question to the node."""

    name: str
    ask: Callable[[], Finding]
    limit: float | None
    """Seconds after which the answer is no longer waited for; None where `ask` limits itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all checks that the command line asks for; returns the exit status."""
    options = parse(argv)
    os.environ.update(rank_variables(os.environ))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    leads = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
    folder = options.report if leads else None
    results = []
    for check in node_checks(options, node) if leads else ():
        results.append(answer(check))
        say(node, results[-1])
    if options.allreduce_gb_s:
        # what stays of it where a library aborts this process
        unended = {"name": ALL_REDUCE, "ok": False, "text": "did not end; see what this step printed", "seconds": 0.0}
        write_report(folder, node, [*results, unended])
        results.append(answer(Check(ALL_REDUCE, lambda: all_reduce(options.allreduce_gb_s), MEASURING_LIMIT)))
        if leads or not results[-1]["ok"]:
            say(node, results[-1])
    reported = write_report(folder, node, results)
    return 0 if reported and all(result["ok"] for result in results) else 1


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
        help="space that must be free there, in 10^9 bytes; $VARIABLES in PATH are this node's; repeatable")
    add("--clock-skew", type=positive, default=5.0, metavar="S",
        help="most seconds between this node's clock and that of the file server of --shared (default 5)")
    add("--matmul-tflops", type=positive, metavar="X",
        help="a matrix product must reach X TFLOP/s on each GPU (bf16), or on the CPU without GPUs (fp32)")
    add("--allreduce-gb-s", type=positive, metavar="Y", help="an all-reduce over all tasks of the srun step must reach "
        "Y GB/s of bus bandwidth, which is 2(n-1)/n * bytes/s")
    add("--report", type=Path, metavar="DIR", help="also write the results to DIR/NODE.json")
    add("--timeout", type=positive, default=30.0, metavar="S",
        help="seconds that nvidia-smi, dmesg or a file system may take to answer (default 30)")
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
    return path, positive(size)


def node_checks(options: argparse.Namespace, node: str) -> Iterator[Check]:
    """The checks of this node, cheapest first."""
    limit = options.timeout
    if options.shared:
        yield Check("shared folder", lambda: shared_folder(options.shared, options.token, node), limit)
        yield Check("clock", lambda: clock(options.shared, node, options.clock_skew), limit)
    for path, size in options.free:
        yield Check(f"free space in {path}", functools.partial(free_space, os.path.expandvars(path), size), limit)
    if options.gpus != 0:
        yield from gpu_checks(options.gpus, limit)
    if options.matmul_tflops:
        yield Check("matrix product", lambda: matrix_product(options.matmul_tflops), MEASURING_LIMIT)


def gpu_checks(wanted: int | None, limit: float) -> Iterator[Check]:
    """First the list of GPUs, and only where it has some, what nvidia-smi says of each."""
    listed: list[list[str]] = []
    yield Check("GPUs", lambda: gpu_list(wanted, limit, listed), None)
    for name, kind, identity, field, meaning in GPU_QUESTIONS if listed else ():
        yield Check(name, functools.partial(gpu_state, kind, identity, field, meaning, limit), None)
    if shutil.which("nvidia-smi"):
        yield Check("XID errors", lambda: xid_errors(limit), None)


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
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(check.limit)
    ok, text = findings[0] if findings else (False, f"no answer within {check.limit:g} s; it may hang for good")
    return {"name": check.name, "ok": ok, "text": text, "seconds": round(time.monotonic() - began, 3)}


def say(node: str, result: Mapping[str, Any]) -> None:
    """One line on the console."""
    line = " ".join(result["text"].split())  # libraries put line ends into their messages
    print(f"{'ok  ' if result['ok'] else 'FAIL'}  {node}  {result['name']}: {line}", flush=True)


def write_report(folder: Path | None, node: str, results: Sequence[Mapping[str, Any]]) -> bool:
    """Replaces the node's report, if there is to be one; says so and returns False where that is not possible."""
    if folder is None:
        return True

    def write() -> Finding:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"node": node, "ok": all(result["ok"] for result in results), "checks": results}
        write_atomically(folder / f"{node}.json", json.dumps(content, indent=1) + "\n")
        return Finding(True, f"written to {folder}")

    result = answer(Check("report", write, MEASURING_LIMIT))
    if not result["ok"]:
        say(node, result)
    return result["ok"]


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


def clock(folder: Path, node: str, allowed: float) -> Finding:
    """Whether this node's clock agrees with that of the server which stamps files in `folder`."""
    off = clock_difference(*write_small_file(folder, node))
    text = f"differs by {abs(off):.1f} s from the file server's, at most {allowed:g} s wanted"
    if abs(off) <= allowed:
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
    """Whether `wanted` GB are free at `path` and can be written."""
    free = shutil.disk_usage(path).free / 1e9
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding(False, f"{path} cannot be written; a disk with errors is often mounted read-only")
    text = f"{free:.2f} GB, {wanted:g} GB wanted"
    return Finding(free >= wanted, text if free >= wanted else f"{text}; remove what old jobs left there")


def gpu_list(wanted: int | None, limit: float, listed: list[list[str]]) -> Finding:
    """Whether nvidia-smi shows as many GPUs as wanted, and adds its rows to `listed`.

    See the top of this file for a node without nvidia-smi.
    """
    needed = "" if wanted is None else f", {wanted} wanted"
    if shutil.which("nvidia-smi") is None:
        devices = sorted(device.name for device in DEVICES.glob("nvidia*"))
        if wanted and devices:
            return Finding(False, f"no nvidia-smi, but {DEVICES} has {', '.join(devices)}{needed}; install the driver")
        return Finding(True, f"no nvidia-smi{needed}: nothing could be asked")
    listed += query("gpu", ("index", "uuid", "name"), limit) or []
    text = ", ".join([f"{len(listed)} visible{needed}", *sorted({name for _, _, name in listed})])
    if len(listed) >= (wanted or 0):
        return Finding(True, text)
    return Finding(False, f"{text}; see the kernel's messages, and whether the job asks for so many")


def gpu_state(kind: str, identity: str, field: str, meaning: str, limit: float) -> Finding:
    """Whether the value of this field is a healthy one on all GPUs; see GPU_QUESTIONS."""
    rows = query(kind, (identity, field), limit)
    if rows is None:
        return Finding(True, f"not known: this driver is too old to be asked for {field}")
    told = {gpu: value for gpu, value in rows if value.strip("[]").lower() not in UNKNOWN}
    bad = [f"{gpu}: {value}" for gpu, value in told.items() if value.lower() not in HEALTHY]
    if bad:
        return Finding(False, f"{field} of {', '.join(bad)}; 0, No or None wanted: {meaning}")
    if not told:
        return Finding(True, f"not known: these GPUs do not tell {field}")
    return Finding(True, f"{field} is {' or '.join(sorted(set(told.values())))} on {len(told)} of {len(rows)} GPUs")


def query(kind: str, fields: Sequence[str], limit: float) -> list[list[str]] | None:
    """nvidia-smi's answer, one row of values a GPU; None where the driver does not know the question.

    Raises LaunchError where nvidia-smi fails, gives no answer, or has lost a GPU.
    """
    status, output = run(["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"], limit)
    if status and ("not a valid field" in output or "not recognized" in output):
        return None
    if status and "No devices were found" in output:
        return []
    if status or "Unable to determine the device handle" in output or "GPU is lost" in output:
        said = "; ".join(line.strip() for line in output.splitlines() if line.strip())
        raise LaunchError(f"nvidia-smi ended with status {status}: {said}. Look at the driver (dmesg), reboot the node")
    rows = [[value.strip() for value in line.split(",")] for line in output.splitlines()]
    return [row for row in rows if len(row) == len(fields)]  # warnings stand between the rows


def run(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit status and output of a program. Raises LaunchError where it gives none within `limit` seconds."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # not waited for: a program that hangs in a driver does not even die
        os.killpg(process.pid, signal.SIGKILL)
        raise LaunchError(
            f"{command[0]} gave no answer within {limit:g} s; the driver hangs, reboot the node"
        ) from None
    return process.returncode, output.decode(errors="replace")


def xid_errors(limit: float) -> Finding:
    """Whether the kernel has told of a GPU's hardware trouble of late."""
    status, output = run(["dmesg"], limit) if shutil.which("dmesg") else (1, "there is no dmesg")
    if status:
        return Finding(True, f"not known: the kernel's messages cannot be read here ({output.strip()})")
    found = fatal_xids(output, float(Path("/proc/uptime").read_text().split()[0]))
    text = f"{len(found)} that mean hardware trouble in {XID_MEMORY // 3600} h, none wanted"
    if not found:
        return Finding(True, text)
    return Finding(False, f"{text}; reset the GPU or reboot the node; newest: {' | '.join(found[:3])}")


def fatal_xids(messages: str, uptime: float) -> list[str]:
    """The kernel's lines about fatal XID errors that are younger than XID_MEMORY or carry no time, newest first.

    `uptime` is the seconds since boot, which is what the lines' own times count.
    """
    found = []
    for line in messages.splitlines():
        xid = re.search(r"NVRM: Xid \([^)]*\): (\d+)", line)
        stamp = re.search(r"\[\s*(\d+\.\d+)\]", line)
        if xid and int(xid[1]) in FATAL_XIDS and not (stamp and uptime - float(stamp[1]) > XID_MEMORY):
            found.append(line.strip())
    return found[::-1]


def matrix_product(wanted: float) -> Finding:
    """Whether each GPU that torch sees, or else the CPU, multiplies at `wanted` TFLOP/s."""
    from slurm import speed

    measured = {device: operations / 1e12 for device, operations in speed.matrix_products().items()}
    text = ", ".join(f"{device} {value:.3g}" for device, value in measured.items()) + f" TFLOP/s, {wanted:g} wanted"
    if min(measured.values()) >= wanted:
        return Finding(True, text)
    return Finding(False, f"{text}; look for heat, a power cap or another program (nvidia-smi -q -d PERFORMANCE)")


def all_reduce(wanted: float) -> Finding:
    """Whether all ranks of this step exchange data at `wanted` GB/s of bus bandwidth."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return Finding(True, "there is only one rank, so nothing is exchanged")
    from slurm import speed

    measured = speed.all_reduce(MEASURING_LIMIT / 2)  # sooner, so that its own words of who is missing come through
    value = measured.bandwidth / 1e9
    text = f"{value:.3g} GB/s over {measured.ranks} ranks ({measured.backend}), {wanted:g} GB/s wanted"
    if value >= wanted:
        return Finding(True, text)
    return Finding(False, f"{text}; see with NCCL_DEBUG=INFO which network is used, and check its links")


if __name__ == "__main__":
    outcome = main()
    os._exit(outcome)  # not sys.exit: it would wait for what still hangs
