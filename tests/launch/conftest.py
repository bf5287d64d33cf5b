"""A tiny run on synthetic images, and a real Slurm of four nodes on this machine."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
name: tiny
output_dir: {folder}
model: {{name: dgt_nano, drop_path_rate: 0.1}}
data: {{backend: synthetic, num_classes: 4, image_size: 32, num_threads: 0}}
steps: {{epochs: 2, global_batch_size: 8, micro_batch_size: 4, evaluate_every_epochs: 0}}
engine: {{name: fsdp, precision: fp32, threads: 1}}
checkpoint: {{every_steps: 3, keep_last: 2}}
monitor: {{log_every: 1, tensorboard: false}}
"""
PATIENCE = 120
"""Seconds after which something that a test waits for will not come."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Eight steps of four samples for each of two ranks; the run is `tmp_path`/runs/tiny."""
    return write_config(tmp_path)


def write_config(folder: Path) -> Path:
    """The configuration, for runs in `folder`/runs."""
    values = yaml.safe_load(CONFIG.format(folder=folder / "runs"))
    values["data"]["synthetic"] = {"train_samples": 32, "val_samples": 9}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Looks until `happened` is true."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.05)


def steps_logged(run: Path) -> list[int]:
    """The training steps in metrics.jsonl, in order."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row["step"] for row in rows if "train/loss" in row]


def has_step(run: Path, step: int) -> bool:
    """Whether the run has logged this step."""
    return (run / "metrics.jsonl").exists() and step in steps_logged(run)


@dataclass(frozen=True)
class Slurm:
    """The cluster: partition low is preempted by high, with 15 s of grace."""

    folder: Path

    def ask(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def state(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmdTimeout=10
KillWait=5
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL PriorityTier=10 GraceTime=15
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Starts the cluster; skips where Slurm is not installed, but not under CI."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        sentence = f"{', '.join(missing)} not found; apt-get install slurmctld slurmd slurm-client"
        pytest.fail(sentence) if os.environ.get("CI") == "true" else pytest.skip(sentence)
    folder = tmp_path_factory.mktemp("slurm")
    names = [f"n{i}" for i in range(1, 5)]
    ports = free_ports(1 + len(names))
    lines = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2"
        for name, port in zip(names, ports[1:], strict=True)
    ]
    for gpu in ("gpu0", "gpu1"):
        (folder / gpu).touch()
    (folder / "state").mkdir()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu0\nName=gpu File={folder}/gpu1\n")
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            host=socket.gethostname(), ports=ports, user=getpass.getuser(), folder=folder, nodes="\n".join(lines)
        )
    )
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = Slurm(folder)
    daemons = [subprocess.Popen(["slurmctld", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    try:
        for name in names:
            (folder / name).mkdir()
            daemons.append(
                subprocess.Popen(["slurmd", "-D", "-N", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        wait_for(lambda: all_idle(len(names)), "four idle nodes")
        yield cluster
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
        wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout, "an empty queue")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def all_idle(nodes: int) -> bool:
    """Whether every node waits for work."""
    answer = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%T"], capture_output=True, text=True)
    return answer.stdout.split() == ["idle"] * nodes
