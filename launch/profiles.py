"""Cluster profiles: what to ask a Slurm for and what its nodes are like, from a YAML file and the command line.

A profile is printed by --dry-run and stored in the run's folder, so it holds no secrets.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config_file import check_keys, validated
from launch.cluster import ask
from launch.runs import LaunchError
from launch.secret_words import is_secret, secret_in_line, secret_in_url, token_in

PROFILES = Path(__file__).resolve().parents[1] / "slurm" / "profiles"
DEFAULT = "generic"

LONGEST_LEAD = 65535
"""Seconds; the most that sbatch's --signal takes."""

DETECT_SECONDS = 5
"""How long Slurm may take to say its name; everybody who submits waits for it."""

THE_LAUNCHERS = (
    "array", "chdir", "clusters", "comment", "dependency", "error", "export", "export_file", "gpus_per_node",
    "job_name", "nodes", "no_requeue", "ntasks", "ntasks_per_node", "open_mode", "output", "parsable", "quiet",
    "requeue", "signal", "test_only", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch on which submitting, and coming back from interruptions, depends."""

KEEP_SECRETS = (
    "a profile is printed by --dry-run and stored in the run's folder. Export the variable in the shell before "
    "submitting: sbatch hands it on"
)


@dataclass(frozen=True)
class Health:
    """The check of every node before the ranks start; a node that fails is excluded and the job requeued."""

    enabled: bool = True
    clock_skew: float = 5.0
    """Seconds by which a node's clock may differ from that of the job's first node, as far as that can be told."""
    matmul_tflops: float | None = None
    """Least that each GPU must reach in a bfloat16 matrix product, 10^12 operations/s; None measures nothing."""
    allreduce_gb_s: float | None = None
    """Least bus bandwidth of an all-reduce over all GPUs of the job, 10^9 bytes/s; None measures nothing."""
    timeout: int = 120
    """Seconds for the whole check, in all of its nodes, with its measurements."""

    def __post_init__(self) -> None:
        _positive(self, "clock_skew", "matmul_tflops", "allreduce_gb_s", "timeout")


@dataclass(frozen=True)
class Detect:
    """Where a profile is taken if none is named: all that is given must hold, and at least one must be given."""

    cluster: str | None = None
    """Slurm's ClusterName."""
    hosts: str | None = None
    """Regular expression for the whole name, with or without its domain, of the machine that submits."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.hosts or "")
        except re.error as error:
            raise ValueError(f"hosts: {self.hosts!r} is no regular expression: {error}") from None

    def fits(self, cluster: str | None, host: str) -> bool:
        """Whether this is that cluster (None: unknown) and that machine."""
        if self.cluster and self.cluster.lower() != (cluster or "").lower():
            return False
        if self.hosts and not any(re.fullmatch(self.hosts, name) for name in (host, host.split(".")[0])):
            return False
        return bool(self.cluster or self.hosts)


@dataclass(frozen=True)
class Hardware:
    """What `launch/plan.py` needs to know of the nodes; None is unknown, and the plan says what it cannot tell then.

    Speeds are 10^9 bytes/s. Measured ones (slurm/health_check.py) are better than a data sheet's.
    """

    gpu: str | None = None
    """Such as H100: the peaks of dgt/training/flops.py are taken."""
    peak_tflops: float | None = None
    """Peak of one GPU in the run's precision, 10^12 dense operations/s, in place of the GPU's data sheet."""
    reached_share: float = 0.35
    """Share of the peak that training is assumed to reach, for the upper bound of a step's time; a run's speed/mfu
    tells yours."""
    intra_node_gb_s: float | None = None
    """What one GPU sends to others of its node (NVLink: half of the sheet's sum of both directions)."""
    inter_node_gb_s: float | None = None
    """What one GPU sends to other nodes, its share of the node's adapters."""
    host_copy_gb_s: float | None = None
    """From one GPU's memory to the host's, pinned; decides how long a checkpoint stops the training."""
    read_gb_s: float | None = None
    """What one node reads from the storage of the shards and checkpoints."""
    write_gb_s: float | None = None
    """What one node writes to it."""
    storage_gb_s: float | None = None
    """What the storage serves to all nodes together."""
    image_kb: float = 110.0
    """Mean size of an encoded image, 10^3 bytes; ImageNet-1K's training images are of 138 GB / 1.28 million."""
    node_mtbf_hours: float | None = None
    """Mean time between failures of one node that end a job."""
    restart_seconds: float | None = None
    """From a failure to the first step, without reading the checkpoint: requeueing, health check, imports, NCCL."""

    def __post_init__(self) -> None:
        _positive(self, *(f.name for f in dataclasses.fields(self) if f.name not in ("gpu", "restart_seconds")))
        if self.reached_share > 1:
            raise ValueError(f"reached_share: is a share, in (0, 1], got {self.reached_share:g}")
        if (self.restart_seconds or 0) < 0:
            raise ValueError(f"restart_seconds: must be 0 or more, got {self.restart_seconds:g}")

    def peak(self, precision: str) -> float | None:
        """Peak of one GPU in a precision of `EngineConfig`, 10^12 operations/s; None where unknown."""
        from dgt.training.flops import peak_flops

        if self.peak_tflops is not None or self.gpu is None:
            return self.peak_tflops
        found = peak_flops(self.gpu, precision)
        return found / 1e12 if found else None


@dataclass(frozen=True)
class Profile:
    """What sbatch is asked for and what surrounds the ranks; None leaves the cluster's own default."""

    gpus_per_node: int = 8
    """GPUs of a node that a run uses, one process each."""
    gpu_type: str | None = None
    """Which of the cluster's kinds of GPU, by Slurm's name for it."""
    gpu_memory_gb: float | None = None
    """Memory of one GPU, 10^9 bytes; a run that is estimated to need more is refused."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str | int | None = None
    """Limit of one attempt, in Slurm's notation or in minutes; the run goes on after it."""
    cpus_per_task: int | None = None
    """Cores of one process."""
    mem: str | int | None = None
    """Memory of a node in Slurm's notation."""
    exclude: str | None = None
    """Nodes that are not to be used."""
    exclusive: bool = True
    """Ask for whole nodes."""
    mail: str | None = None
    """Address that Slurm writes to when the job ends, fails or is requeued."""
    after: tuple[str, ...] = ()
    """Numbers of jobs that must have ended well before this one starts; from the command line only."""
    signal_lead: int | None = None
    """Seconds before the time limit at which the ranks are told to save and leave; None: twice the longest save that
    was measured, and a minute."""
    max_retries: int = 3
    """Crashes in a row without a new checkpoint that are followed by another attempt."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every rank."""
    modules: tuple[str, ...] = ()
    """Loaded with "module load" before anything else."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the ranks."""
    container: str | None = None
    """Image that the ranks run in."""
    container_command: str | None = None
    """What stands before a rank's python to run it in the container; {image} stands for the image."""
    container_python: str = "python3"
    """The container's Python."""
    srun: tuple[str, ...] = ()
    """Further arguments of the ranks' srun; {image} stands for the image."""
    scratch: Mapping[str, float] = field(default_factory=dict)
    """Path (the node's variables are filled in) -> GB, 10^9 bytes, that must be free there before the ranks start."""
    health: Health = field(default_factory=Health)
    hardware: Hardware = field(default_factory=Hardware)
    detect: Detect = field(default_factory=Detect)
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    """Any other options of sbatch, by their long names; true for one without a value."""

    def __post_init__(self) -> None:
        _positive(self, "gpus_per_node", "gpu_memory_gb", "cpus_per_task", "signal_lead")
        if (self.signal_lead or 0) > LONGEST_LEAD:
            raise ValueError(f"signal_lead: Slurm takes at most {LONGEST_LEAD} seconds, got {self.signal_lead}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries: must be 0 or more, got {self.max_retries}")
        for job in self.after:
            if not re.fullmatch(r"\d+(_\d+)?", job):
                raise ValueError(f"after: {job!r} is no job number, such as 1234, or 1234_5 in an array")
        for path, free in self.scratch.items():
            if not path.startswith(("/", "$")) or free < 0:
                raise ValueError(
                    f"scratch: expected an absolute path and the GB that must be free, got {path}: {free:g}"
                )
        if self.gpu_type and not re.fullmatch(r"[\w.-]+", self.gpu_type):
            raise ValueError(f"gpu_type: expected a name such as h100, got {self.gpu_type!r}")
        _check_container(self)
        _check_sbatch(self)
        _check_secrets(self)


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}: must be above 0, got {value}")


def _check_container(profile: Profile) -> None:
    uses = "{image}" in " ".join([profile.container_command or "", *profile.srun])
    if profile.container and not uses:
        raise ValueError(
            f"container: nothing says how to run {profile.container}; set container_command, such as 'apptainer exec "
            "--nv {image}', or srun: ['--container-image={image}'] where Slurm has pyxis"
        )
    if uses and not profile.container:
        raise ValueError("container: container_command or srun use {image}; name one under container or by --container")


def _check_sbatch(profile: Profile) -> None:
    ours = {f.name for f in dataclasses.fields(profile) if f.default is None}
    for option, value in profile.sbatch.items():
        name = option.replace("-", "_")
        if name == "gpus_per_node":
            raise ValueError(f"sbatch: {option} is made of gpus_per_node and gpu_type; set those")
        if name in THE_LAUNCHERS:
            raise ValueError(f"sbatch: {option} is set by the launcher, which depends on it; leave it out")
        if name in ours and getattr(profile, name) is not None:
            raise ValueError(f"sbatch: {option} is given twice, here and as {name}; leave it out here")
        if value is False or not isinstance(value, (str, int, float)):
            raise ValueError(f"sbatch: {option}: expected a text, a number or true, got {value!r}")


def _check_secrets(profile: Profile) -> None:
    for name, value in profile.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"environment: {name!r} is no name of a variable")
        if is_secret(name, value) or token_in(value):
            raise ValueError(f"environment: {name} looks like a secret, and {KEEP_SECRETS}")
        if secret_in_url(value):
            raise ValueError(f"environment: {name} carries a password in a URL, and {KEEP_SECRETS}")
    for key, text in _lines(profile):
        if secret_in_url(text):
            raise ValueError(f"{key}: there is a password in a URL, and {KEEP_SECRETS}")
        found = secret_in_line(text)
        if found:
            raise ValueError(f"{key}: {found} looks like a secret, and {KEEP_SECRETS}")


def _lines(profile: Profile) -> Iterator[tuple[str, str]]:
    for key, texts in (("setup", profile.setup), ("srun", profile.srun)):
        yield from ((key, text) for text in texts)
    yield from (("sbatch", f"{name}={value}") for name, value in profile.sbatch.items())
    yield "container", profile.container or ""
    yield "container_command", profile.container_command or ""


def load(name: str | None, overrides: Mapping[str, Any], ask_slurm: bool = True) -> Profile:
    """The profile called `name` in slurm/profiles, or at the path `name`, with the `overrides` that are not None.

    Without a name it is the one that is `detected`, else the generic one, or what `Profile` says where the program was
    installed without that folder. Raises LaunchError for an unknown profile, ConfigError for what is wrong in it.
    """
    path = find(name, ask_slurm)
    values = read(path) if path else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    source = f"profile {path}" if path else "profile"
    return validated(Profile, values | given, f"{source} with the command line's options" if given else source)


def find(name: str | None, ask_slurm: bool = True) -> Path | None:
    """The file of the profile that `load` would take; None where there are no profiles and none was named."""
    if name is None:
        generic = PROFILES / f"{DEFAULT}.yaml"
        return detected(ask_slurm) or (generic if generic.exists() else None)
    return Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"


def detected(ask_slurm: bool = True) -> Path | None:
    """The file whose `detect` fits this machine and its Slurm; None where none does.

    Slurm is asked for its name only if a profile wants to know it, and not without `ask_slurm`: then only profiles fit
    that do not. Raises LaunchError naming two that fit.
    """
    wishes = {}
    for path in sorted(PROFILES.glob("*.yaml")):
        values = read(path)
        if "detect" in values:
            wishes[path] = validated(Detect, values["detect"], f"profile {path}: detect")
    cluster = cluster_name() if ask_slurm and any(wish.cluster for wish in wishes.values()) else None
    fitting = [path for path, wish in wishes.items() if wish.fits(cluster, socket.gethostname())]
    if len(fitting) > 1:
        names = " and ".join(path.stem for path in fitting)
        raise LaunchError(f"the profiles {names} both fit this machine by their detect; name one with --profile")
    return fitting[0] if fitting else None


def cluster_name() -> str | None:
    """Slurm's ClusterName; None where there is no Slurm, or where it does not answer, which is said."""
    if shutil.which("scontrol") is None:
        return None
    answer = ask("scontrol", "show", "config", timeout=DETECT_SECONDS)
    found = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout if answer else "", re.MULTILINE)
    if found is None:
        print("Slurm does not say its name, so no profile is chosen by it; --profile names one", file=sys.stderr)
    return found[1] if found else None


def read(path: Path) -> dict[str, Any]:
    """The content of a profile's file, whose keys are known; values are checked with the command line's.

    Raises LaunchError where the file cannot be read, ConfigError for an unknown key.
    """
    import yaml

    class AsWritten(yaml.SafeLoader):
        """Leaves 12:00:00 and dates as they are written, where YAML would make a number of seconds of them."""

    def whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else loader.construct_yaml_int(node)

    AsWritten.add_constructor("tag:yaml.org,2002:int", whole)
    AsWritten.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)
    try:
        text = path.read_text("utf-8")
        values = yaml.load(text, AsWritten)
        texts = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise LaunchError(f"profile {path}: {error.strerror}; there are {known or 'none'} in {PROFILES}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LaunchError(f"profile {path}: not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise LaunchError(f"profile {path}: expected keys and values, got {values!r}")
    check_keys(values, Profile, f"profile {path}")
    if "after" in values:
        raise LaunchError(f"profile {path}: after belongs to one submission; give it on the command line, --after JOB")
    if isinstance(values.get("environment"), dict):
        values["environment"] = texts["environment"]  # a shell sees no numbers and no booleans
    return values


def to_plain(profile: Profile) -> dict[str, Any]:
    """The profile as JSON can hold it; `from_plain` reads it back to an equal one."""
    return json.loads(json.dumps(dataclasses.asdict(profile)))


def from_plain(values: Mapping[str, Any]) -> Profile:
    """The profile that `to_plain` has written. Raises ConfigError where it is not one."""
    return validated(Profile, values, "the profile in job.json")
