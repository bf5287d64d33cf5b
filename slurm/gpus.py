"""What nvidia-smi and the kernel's messages say of the GPUs that a job has on this node; for slurm/health_check.py.

nvidia-smi takes seconds to answer where no process keeps the driver awake, so it is asked twice for everything, and
again only without the fields that it says it does not know. It needs no more than Python itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.runs import LaunchError

DEVICES = Path("/dev")

FATAL_XIDS = frozenset({48, 64, 74, 79, 95, 119, 120, 140})
"""XID errors after which a GPU or its links want a reset, a reboot or a repair: uncorrectable memory error (48), failed
row remapping (64), NVLink (74), fallen off the bus (79), uncontained memory error (95), no answer from the GPU's system
processor (119, 120), memory error that escaped (140). Source: NVIDIA's Xid catalog, "Resolution Bucket (Immediate
Action)", https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html. It says to ignore 63 and 92 and only to
restart the application after 94; what they may leave behind shows in the values that are asked below."""
XID_MEMORY = 24 * 3600
"""Seconds for which an XID error counts: messages stay until the next boot, also where a reset has cured the GPU."""

HEALTHY = frozenset({"0", "no", "none"})
UNKNOWN = frozenset({"n/a", "not supported", "not available", "not found", "insufficient permissions"})
"""Words for a value that this GPU does not have, or that this user may not see."""
BROKEN = frozenset({"gpu requires reset", "reset required", "gpu is lost", "unknown error"})
"""Words in brackets that tell of a GPU that is out of order; what else stands in brackets tells nothing of it."""


class Finding(NamedTuple):
    """What a check found: `text` has the value, what was wanted, and what to do where it is not `ok`."""

    ok: bool
    text: str


class NoAnswerError(LaunchError):
    """A program has said nothing for too long."""


@dataclass(frozen=True)
class Time:
    """How long answers may be waited for."""

    each: float
    """Seconds for one answer."""
    until: float
    """When all of them must be there, by `time.monotonic`."""

    @classmethod
    def of(cls, each: float, whole: float) -> Time:
        """`whole`: seconds for all answers, from now on."""
        return cls(each, time.monotonic() + whole)

    def left(self) -> float:
        """Seconds until the end."""
        return max(0.1, self.until - time.monotonic())

    def for_one(self) -> float:
        """Seconds for the next answer."""
        return min(self.each, self.left())


class Question(NamedTuple):
    """A field of nvidia-smi's, asked of every GPU."""

    name: str
    query: str
    """Goes on after --query-."""
    field: str
    meaning: str
    """Of a bad value."""
    judges: bool = True
    """Whether a value that is not one of HEALTHY is a bad one."""


IDENTITY = {"gpu": ("index", "uuid", "name", "pci.bus_id"), "remapped-rows": ("gpu_uuid",)}
"""The first fields of each query, which every driver knows."""
QUESTIONS = (
    # After a contained error "additional workloads can be launched on this GPU without requiring a GPU reset" (NVIDIA,
    # GPU Memory Error Management, "Response to Uncorrectable Contained ECC Errors",
    # https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt/). One that was not contained, or a GPU that contains none,
    # leaves a pending page or row, an XID error or a recovery action.
    Question("ECC errors", "gpu", "ecc.errors.uncorrected.volatile.total",
             "contained errors, as long as no other check fails", judges=False),
    Question("retired pages", "gpu", "retired_pages.pending", "bad memory pages wait for a reset of the GPU"),
    Question("row remapping", "remapped-rows", "remapped_rows.pending", "bad memory rows wait for a reset of the GPU"),
    Question("row remapping failure", "remapped-rows", "remapped_rows.failure",
             "there are no spare memory rows left; replace the GPU"),
    Question("recovery action", "gpu", "gpu_recovery_action", "the driver asks for this to be done"),
)  # fmt: skip


class Answer(NamedTuple):
    """What nvidia-smi says to one query."""

    fields: tuple[str, ...]
    """Those that the driver knows."""
    rows: list[dict[str, str]]
    """One of values by their fields for each GPU."""


@dataclass
class Gpus:
    """The job's GPUs on this node: those that its variables name, which need not be all that this process sees."""

    time: Time
    wanted: int | None = None
    """How many there must be."""
    told: dict[str, Answer | LaunchError] = field(default_factory=dict)
    """What became of each query."""
    chosen: list[str] = field(default_factory=lambda: visible_devices(os.environ))
    """Numbers or names of the GPUs that are asked about; empty where all are."""
    of_step: list[str] = field(default_factory=lambda: gpus_of_step(os.environ))
    """The job's GPUs, if this process sees others too; one that is confined to its own sees them by other numbers."""

    def listed(self) -> Finding:
        """Whether there are as many as wanted. See slurm/health_check.py for a node without nvidia-smi."""
        needed = "" if self.wanted is None else f", {self.wanted} wanted"
        if shutil.which("nvidia-smi") is None:
            devices = sorted(device.name for device in DEVICES.glob("nvidia*"))
            if self.wanted and devices:
                found = f"no nvidia-smi, but {DEVICES} has {', '.join(devices)}"
                return Finding(False, f"{found}{needed}; install the driver")
            return Finding(True, f"no nvidia-smi{needed}: nothing could be asked")
        number, kind = self.count()
        text = ", ".join([f"{number}{kind} visible{needed}", *sorted({row.get("name", "") for row in self.rows()})])
        if number >= (self.wanted or 0):
            return Finding(True, text)
        return Finding(False, f"{text}; see the kernel's messages, and whether the job asks for so many")

    def count(self) -> tuple[int, str]:
        """How many devices there are for ranks, and what kind they are; MIG instances of a GPU are one each."""
        instances = [name for name in self.chosen if name.startswith("MIG-")]
        if instances:
            known = self.mig_instances()
            present = [name for name in instances if name in known]
            self.chosen = sorted({known[name] for name in present})
            return len(present), " MIG instances"
        number = len(self.rows())
        if number < (self.wanted or 0) and (visible := len(self.mig_instances())):
            return visible, " MIG instances"
        return number, ""

    def mig_instances(self) -> dict[str, str]:
        """Name of each MIG instance of this node -> name of its GPU."""
        found, gpu = dict[str, str](), ""
        for line in self.ask("-L")[1].splitlines():
            name = re.search(r"\(UUID: (\S+)\)", line)
            if name and line.startswith("GPU"):
                gpu = name[1]
            elif name and name[1].startswith("MIG-"):
                found[name[1]] = gpu
        return found

    def rows(self) -> list[dict[str, str]]:
        """One for each GPU that is asked about."""
        if not self.chosen and 0 < len(self.of_step) < len(self.answer("gpu").rows):
            self.chosen = self.of_step
            self.told.clear()
        return self.answer("gpu").rows

    def are_there(self) -> bool:
        """Whether any GPU was listed."""
        answer = self.told.get("gpu")
        return isinstance(answer, Answer) and bool(answer.rows)

    def state(self, question: Question) -> Finding:
        """Whether no GPU has a bad value."""
        answer, name = self.answer(question.query), question.field
        if name not in answer.fields:
            return Finding(True, f"not known: this driver is too old to be asked for {name}")
        identity = "uuid" if question.query == "gpu" else "gpu_uuid"
        told = {row[identity]: row[name] for row in answer.rows if is_told(row.get(name, "n/a"))}
        others = {gpu: value for gpu, value in told.items() if value.lower() not in HEALTHY}
        bad = {gpu: value for gpu, value in others.items() if question.judges or is_broken(value)}
        if bad:
            return Finding(False, f"{name} of {listing(bad)}; 0, No or None wanted: {question.meaning}")
        if others:
            return Finding(True, f"{name} of {listing(others)}: {question.meaning}")
        if not told:
            return Finding(True, f"not known: these GPUs do not tell {name}")
        return Finding(True, f"{name} is {' or '.join(sorted(set(told.values())))} on {len(told)} of "
                             f"{len(answer.rows)} GPUs")  # fmt: skip

    def answer(self, query: str) -> Answer:
        """What nvidia-smi says to a query, which is made once; raises LaunchError each time where it says nothing."""
        if query not in self.told:
            try:
                self.told[query] = self.asked(query)
            except LaunchError as error:
                self.told[query] = error
        told = self.told[query]
        if isinstance(told, LaunchError):
            raise told
        return told

    def asked(self, query: str) -> Answer:
        """Asks for all fields of a query that the driver knows."""
        identity, fields = IDENTITY[query], [question.field for question in QUESTIONS if question.query == query]
        while fields or query == "gpu":
            wanted = (*identity, *fields)
            chosen = ["-i", ",".join(self.chosen)] if self.chosen else []
            status, output = self.ask(f"--query-{query}={','.join(wanted)}", "--format=csv,noheader,nounits", *chosen)
            if status and fields and ("not a valid field" in output or "not recognized" in output):
                known = [name for name in fields if f'"{name}"' not in output]
                fields = known if len(known) < len(fields) else []  # where it names none of them, it knows none
                continue
            if status and "No devices were found" in output:
                return Answer(wanted, [])
            if status or "Unable to determine the device handle" in output or "GPU is lost" in output:
                said = "; ".join(line.strip() for line in output.splitlines() if line.strip())
                raise LaunchError(
                    f"nvidia-smi ended with status {status}: {said}. Look at the driver (dmesg), reboot the node"
                )
            return Answer(wanted, rows_in(output, wanted))
        return Answer((), [])

    def ask(self, *words: str) -> tuple[int, str]:
        """Status and output of nvidia-smi."""
        try:
            return run(["nvidia-smi", *words], self.time.for_one())
        except NoAnswerError as error:
            raise LaunchError(f"{error}; the driver hangs, reboot the node") from None

    def xid_errors(self) -> Finding:
        """Whether the kernel has told of hardware trouble with one of the GPUs of late."""
        try:
            status, output = run(["dmesg"], self.time.for_one()) if shutil.which("dmesg") else (1, "there is no dmesg")
        except NoAnswerError as error:  # which is not the GPUs' fault
            status, output = 1, str(error)
        if status:
            return Finding(True, f"not known: the kernel's messages cannot be read here ({output.strip()})")
        told = self.told.get("gpu")
        buses = {row["pci.bus_id"] for row in told.rows if "pci.bus_id" in row} if isinstance(told, Answer) else ()
        found = fatal_xids(output, float(Path("/proc/uptime").read_text().split()[0]), buses)
        text = f"{len(found)} that mean hardware trouble in {XID_MEMORY // 3600} h, none wanted"
        if not found:
            return Finding(True, text)
        return Finding(False, f"{text}; reset the GPU or reboot the node; newest: {' | '.join(found[:3])}")


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, which counts what this process sees, as nvidia-smi does; empty where nothing."""
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return names if all(re.fullmatch(r"\d+|(GPU|MIG)-\S+", name) for name in names) else []  # such as NoDevFiles


def gpus_of_step(environment: Mapping[str, str]) -> list[str]:
    """Numbers that Slurm gives the job's GPUs among all of this node; empty where it gives none."""
    numbers = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
    return [number for number in numbers.split(",") if number.isdecimal()]


def rows_in(output: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of an answer, between which warnings may stand."""
    rows = [[value.strip() for value in line.split(",")] for line in output.splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows if re.match(r"\d+$|GPU-", row[0]) and len(row) > 1]


def is_told(value: str) -> bool:
    """Whether a value says anything about a GPU."""
    return is_broken(value) or not (value.startswith("[") or value.lower() in UNKNOWN)


def is_broken(value: str) -> bool:
    """Whether words in place of a value say that a GPU is out of order."""
    return value.strip("[]").lower() in BROKEN


def listing(values: Mapping[str, str]) -> str:
    """GPUs and their values."""
    return ", ".join(f"{gpu}: {value}" for gpu, value in values.items())


def fatal_xids(messages: str, uptime: float, buses: Collection[str] = ()) -> list[str]:
    """The kernel's lines about fatal XID errors that are younger than XID_MEMORY or carry no time, newest first.

    `uptime` is the seconds since boot, which is what the lines' own times count; `buses`: PCI addresses of the GPUs
    that it is about, all where none is given.
    """
    ours = {pci_address(bus) for bus in buses}
    found = []
    for line in messages.splitlines():
        xid = re.search(r"NVRM: Xid \(([^)]*)\): (\d+)", line)
        stamp = re.search(r"\[\s*(\d+\.\d+)\]", line)
        if not xid or int(xid[2]) not in FATAL_XIDS or (stamp and uptime - float(stamp[1]) > XID_MEMORY):
            continue
        if not ours or pci_address(xid[1]) in ours:
            found.append(line.strip())
    return found[::-1]


def pci_address(text: str) -> str:
    """Domain, bus and device in "00000000:3B:00.0" of nvidia-smi, or in "PCI:0000:3b:00" of the kernel."""
    found = re.search(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\b", text.lower())
    return found[0] if found else text


def run(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit status and output of a program. Raises NoAnswerError where it has not ended within `limit` seconds."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # not waited for: a program that hangs in a driver does not even die
        os.killpg(process.pid, signal.SIGKILL)
        raise NoAnswerError(f"{command[0]} gave no answer within {limit:.3g} s") from None
    return process.returncode, output.decode(errors="replace")
