"""What asking Slurm and arithmetic find out before a submission: whether the request can start at all, and end."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import cluster
from launch.layout import Layout, count
from launch.profiles import Profile
from launch.runs import LaunchError

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config

BESIDE_THE_ESTIMATE = 2e9
"""Bytes on a GPU that launch.memory does not count: the CUDA context, NCCL's buffers, unused rests of the allocator."""
MARGIN = 60
"""Seconds by which a lead is longer than the save that it is for, and a time limit at least longer than its lead."""
UNMEASURED_LEAD = 120
"""Seconds of lead for a run that has not measured a save."""
SAVE_SECONDS = "speed/save_seconds"
"""Key of RUN/metrics.jsonl."""
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
"""Kinds of file systems that are gone with the node and that no other node sees."""


def seconds(time: str | int) -> float:
    """A duration in Slurm's notation, or in minutes, as seconds; infinite for UNLIMITED and, as in sbatch, for 0.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    Raises LaunchError for anything else.
    """
    text = str(time).strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if parts is None:
        raise LaunchError(f"time: {text!r} is no duration of Slurm's; write 90 (minutes), 12:00:00 or 2-12:00:00")
    days, first, second, third = (int(part or 0) for part in parts.groups())
    if parts[1] is None and parts[4] is None:
        return first * 60 + second or math.inf
    return days * 86400 + first * 3600 + second * 60 + third or math.inf


def megabytes(mem: str | int) -> float:
    """Memory in Slurm's notation, whose unit is MB where none is given. Raises LaunchError for anything else."""
    parts = re.fullmatch(r"(\d+)([KMGTP]?)B?", str(mem).strip().upper())
    if parts is None:
        raise LaunchError(f"mem: {mem!r} is no amount of memory; write 64000 (MB), 64G, or 0 for all of a node's")
    return int(parts[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}[parts[2]]


@dataclass(frozen=True)
class Node:
    """What Slurm's configuration says of a node, whatever state it is in."""

    name: str
    cpus: int
    memory: int
    """MB."""
    gres: str
    """Generic resources such as "gpu:h100:8(S:0-1),nvme:1"."""
    features: frozenset[str]


@dataclass(frozen=True)
class Need:
    """Something that each of the job's nodes must have."""

    met: Callable[[Node], bool]
    words: str
    """Goes on after "nodes that ..."."""
    advice: str


def partition(layout: Layout, profile: Profile, lead: int | None = None) -> None:
    """Raises LaunchError where the partition does not exist or would never start such a job, or Slurm does not answer.

    Of several partitions, as in --partition=a,b, one must do. Nodes that are down count: they may come back. `lead`:
    seconds before its time limit at which an attempt is told to stop, for where the limit is the partition's own.
    """
    known = partitions()
    named = asked(profile, "partition", "SBATCH_PARTITION")
    wanted = chosen_partitions(named, known)
    complaints = [next(obstacles(known[name], layout, profile, lead), None) for name in wanted]
    if wanted and all(complaints) and (named or not is_routed()):
        raise LaunchError(str(complaints[0]))


def preemption(profile: Profile) -> Iterator[str]:
    """A warning for each partition asked for that ends preempted jobs, instead of requeueing them."""
    known = partitions()
    for name in chosen_partitions(asked(profile, "partition", "SBATCH_PARTITION"), known):
        mode, grace = known[name].get("PreemptMode", ""), known[name].get("GraceTime", "0")
        if "CANCEL" in mode.split(","):
            yield (
                f"partition {name} preempts by PreemptMode=CANCEL: a run that has not saved within {grace} s of grace "
                "stays away until `launch/jobs.py resume`"
            )


def asked(profile: Profile, option: str, variable: str) -> Any:
    """What sbatch is asked for under this option, by the profile or by the shell's variable; None where it is not."""
    value = getattr(profile, option)
    return value if value is not None else profile.sbatch.get(option) or os.environ.get(variable) or None


def is_routed() -> bool:
    """Whether this Slurm has plugins that may choose another partition than the default one for a job."""
    plugins = re.search(r"^JobSubmitPlugins\s*=\s*(\S+)", answer("scontrol", "show", "config"), re.MULTILINE)
    return plugins is not None and plugins[1] not in ("(null)", "none")


def partitions() -> dict[str, dict[str, str]]:
    """All partitions by name, each with the fields of `scontrol show partition`."""
    rows = answer("scontrol", "show", "partition", "--all", "--oneliner").splitlines()
    fields = [dict(word.split("=", 1) for word in row.split() if "=" in word) for row in rows]
    return {row["PartitionName"]: row for row in fields if "PartitionName" in row}


def answer(*command: str) -> str:
    """What one of Slurm's commands prints. Raises LaunchError where there is none, or it fails or hangs."""
    done = cluster.ask(*command)
    if done is None:
        raise LaunchError(
            f"`{' '.join(command)}` gave no answer within {cluster.SLURM_TIMEOUT} s, or is not installed here; submit "
            "from a machine of the cluster, or try again when Slurm answers"
        )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise LaunchError(f"Slurm does not answer `{' '.join(command)}`: {said}; try again when it does")
    return done.stdout


def chosen_partitions(named: str | None, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The partitions that sbatch would choose among; none where it must know itself, as there is no default.

    Raises LaunchError for one that there is not.
    """
    names = str(named).split(",") if named else [n for n, fields in known.items() if fields.get("Default") == "YES"]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"
            raise LaunchError(f"partition {name} does not exist in this Slurm; {hint}")
    return names


def obstacles(fields: Mapping[str, str], layout: Layout, profile: Profile, lead: int | None) -> Iterator[str]:
    """Why the partition with these fields would not run the job, one sentence each."""
    name = fields["PartitionName"]
    yield from refused_by_rules(fields, layout, profile)
    if lead is not None:
        yield from too_short(fields, profile, lead)
    nodes = nodes_of(name)
    total, words = len(nodes), []
    if total < number(fields.get("TotalNodes", "0")):
        return  # sinfo hides nodes of a cloud that are powered down
    for need in needs(layout, profile, nodes):
        meeting = [node for node in nodes if need.met(node)]
        if len(meeting) < len(nodes):
            words.append(need.words)
        nodes = meeting
        if len(nodes) < layout.nodes:
            yield (
                f"partition {name}: nodes that {' and '.join(words)}: {len(nodes)} of {total}, and {layout.nodes} "
                f"wanted; {need.advice}"
            )
            return


def refused_by_rules(fields: Mapping[str, str], layout: Layout, profile: Profile) -> Iterator[str]:
    """What the partition's own settings forbid. Accounts are left to Slurm: an account's parent may be admitted."""
    name, qos = fields["PartitionName"], asked(profile, "qos", "SBATCH_QOS")
    if fields.get("State") in ("DRAIN", "INACTIVE"):  # one that is DOWN takes jobs, and starts them when it is up
        yield f"partition {name} is {fields['State']}: it takes no jobs; choose another with --partition, or wait"
    allowed = fields.get("AllowQos", "ALL")
    if qos and allowed != "ALL" and qos.lower() not in allowed.lower().split(","):
        yield f"partition {name} does not admit --qos {qos}; it admits {allowed}"
    total = number(fields.get("TotalNodes", "UNLIMITED"))
    if layout.nodes > total:
        yield f"partition {name} has {count(int(total), 'node')}, and {layout.nodes} are wanted; lower --nodes"
    if qos or fields.get("QoS", "N/A") != "N/A":
        return  # a QOS may have been given the right to exceed the rest (PartitionMaxNodes, PartitionTimeLimit)
    least, most = number(fields.get("MinNodes", "0")), number(fields.get("MaxNodes", "UNLIMITED"))
    if layout.nodes > most:
        yield f"partition {name} gives a job at most {count(int(most), 'node')}, not {layout.nodes}; lower --nodes"
    if layout.nodes < least:
        yield f"partition {name} gives a job at least {count(int(least), 'node')}, not {layout.nodes}; raise --nodes"
    time, longest = asked(profile, "time", "SBATCH_TIMELIMIT"), fields.get("MaxTime", "UNLIMITED")
    if time is not None and seconds(time) > seconds(longest):
        yield (
            f"partition {name} allows at most {longest}, and the time limit asked for is {time}; lower --time: "
            "the run goes on by itself after it"
        )


def too_short(fields: Mapping[str, str], profile: Profile, lead: int) -> Iterator[str]:
    """Whether the limit that the partition sets where no --time is given leaves an attempt any time before the lead."""
    limit = fields.get("DefaultTime", "NONE")
    if limit == "NONE":
        limit = fields.get("MaxTime", "UNLIMITED")
    if asked(profile, "time", "SBATCH_TIMELIMIT") is None and seconds(limit) <= lead + MARGIN:
        yield (
            f"partition {fields['PartitionName']} gives a job {limit} where no --time is asked for, and it would be "
            f"told to stop {lead} s before its end, as soon as it starts; ask for more than {lead + MARGIN} s by --time"
        )


def number(text: str) -> float:
    """A limit as Slurm prints it."""
    return float(text) if text.isdigit() else math.inf


def nodes_of(partition: str) -> list[Node]:
    """The partition's nodes."""
    rows = answer("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G|%f").splitlines()
    found = []
    for row in rows:
        name, cpus, memory, gres, features = row.split("|")
        listed = frozenset() if features == "(null)" else frozenset(features.split(","))
        found.append(Node(name.strip(), leading_number(cpus), leading_number(memory), gres, listed))
    return found


def leading_number(text: str) -> int:
    """The number that a text such as "64+" begins with."""
    digits = re.match(r"\s*(\d+)", text)
    return int(digits[1]) if digits else 0


def gpus_in(gres: str, model: str | None = None) -> int:
    """GPUs, of this model where one is given, in a list of generic resources such as "gpu:h100:8(S:0-1),nvme:1"."""
    total = 0
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = entry.strip().split(":")
        if kind == "gpu" and (model is None or model.lower() in (word.lower() for word in rest[:1])):
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def needs(layout: Layout, profile: Profile, nodes: list[Node]) -> Iterator[Need]:
    """What every node of the job must have; `nodes` are those of the partition, for advice."""
    if profile.exclude and "/" not in profile.exclude:  # with a slash it names a file
        excluded = set(cluster.hostnames(profile.exclude))
        yield Need(
            lambda node: node.name not in excluded, "are not excluded", f"--exclude {profile.exclude} leaves too few"
        )
    if layout.use_gpus:
        gpus, model = layout.processes_per_node, profile.gpu_type
        most = max((gpus_in(node.gres, model) for node in nodes), default=0)
        yield Need(
            lambda node: gpus_in(node.gres, model) >= gpus,
            f"have {count(gpus, f'{model} GPU' if model else 'GPU')} or more",
            f"lower --gpus-per-node (the most that one of its nodes has is {most})",
        )
    each, most_cpus = profile.cpus_per_task or 1, max((node.cpus for node in nodes), default=0)
    cpus = layout.processes_per_node * each
    yield Need(
        lambda node: node.cpus >= cpus,
        f"have {count(cpus, 'CPU')} or more ({count(layout.processes_per_node, 'process')} x {each})",
        f"lower --cpus-per-task (the most that one of its nodes has is {most_cpus} for all its processes)",
    )
    if profile.mem is not None and megabytes(profile.mem):
        asked, most_mem = megabytes(profile.mem), max((node.memory for node in nodes), default=0)
        yield Need(
            lambda node: node.memory >= asked,
            f"have {asked:.0f} MB of memory or more",
            f"lower --mem (the most that one of its nodes has is {most_mem} MB); 0 asks for all of a node's",
        )
    yield from feature_needs(profile.constraint, frozenset().union(*(node.features for node in nodes)))


def feature_needs(constraint: str | None, known: frozenset[str]) -> Iterator[Need]:
    """The need for features, where the constraint is a list of names joined by & (or a comma) alone, or by | alone.

    Slurm understands more than that, such as counts and brackets; those are left to it.
    """
    if not constraint or not re.fullmatch(r"[\w.+-]+(?:[&,][\w.+-]+)*|[\w.+-]+(?:\|[\w.+-]+)*", constraint):
        return
    names = set(re.split(r"[&,|]", constraint))
    enough = any if "|" in constraint else all
    listed = ", ".join(sorted(known)) or "none"
    yield Need(
        lambda node: enough(name in node.features for name in names),
        f"have the features of --constraint {constraint}",
        f"features of its nodes: {listed}",
    )


def time_allows_lead(profile: Profile, lead: int) -> None:
    """Raises LaunchError where the time limit is so short that an attempt is told to stop as soon as it starts.

    `lead`: seconds before the limit at which it is told.
    """
    if profile.time is not None and seconds(profile.time) <= lead + MARGIN:
        raise LaunchError(
            f"time: an attempt of {profile.time} ({seconds(profile.time):.0f} s) would be told to stop {lead} s before "
            f"its end, as soon as it starts; ask for more than {lead + MARGIN} s, or lower --signal-lead"
        )


def memory(config: Config, layout: Layout, network: nn.Module, profile: Profile) -> None:
    """Raises LaunchError where a rank is estimated to need more than the profile's GPU has."""
    from launch.memory import UnplannedError, estimate

    if profile.gpu_memory_gb is None or not layout.use_gpus:
        return
    try:
        needed = (estimate(config, network, layout.ranks).total + BESIDE_THE_ESTIMATE) / 1e9
    except UnplannedError:
        return  # it may fit
    if needed > profile.gpu_memory_gb:
        ways = ["lower steps.micro_batch_size"]
        ways += ["set engine.activation_checkpointing"] if config.engine.activation_checkpointing == "none" else []
        ways += ["set engine.name=fsdp"] if config.engine.name != "fsdp" and layout.ranks > 1 else []
        raise LaunchError(
            f"a rank is estimated to need {needed:.1f} GB ({BESIDE_THE_ESTIMATE / 1e9:g} of them for CUDA, NCCL and "
            f"the allocator), and the profile's GPU has {profile.gpu_memory_gb:g} GB; {', or '.join(ways)}"
        )


def signal_lead(profile: Profile, run: Path) -> int:
    """Seconds before the time limit at which the ranks are told to save: the profile's, else from what was measured.

    That is twice the longest save in the run's metrics.jsonl, because one may be under way, and a minute.
    """
    if profile.signal_lead is not None:
        return profile.signal_lead
    longest = max(measured_saves(run / "metrics.jsonl"), default=None)
    return UNMEASURED_LEAD if longest is None else math.ceil(2 * longest) + MARGIN


def measured_saves(metrics: Path) -> Iterator[float]:
    """Seconds of every save that a run has logged; lines that a stopped writer left unfinished are skipped."""
    try:
        lines = metrics.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        if SAVE_SECONDS not in line:
            continue
        try:
            value = json.loads(line)[SAVE_SECONDS]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield value


def shared_folder(run: Path, nodes: int) -> str | None:
    """A warning where several nodes would hardly see the same folder of the run; None where nothing says so."""
    from data_pipeline.shards.cache import file_system_kind

    if nodes == 1:
        return None
    kind = file_system_kind(run.absolute())
    if kind in IN_MEMORY:
        where = f"in the memory of this machine ({kind})"
    elif run.resolve().is_relative_to(Path("/tmp").resolve()):
        where = "under /tmp, which is each machine's own as a rule"
    else:
        return None
    return f"output_dir: {run} is {where}; the {nodes} nodes need a folder on a file system that all of them see"
