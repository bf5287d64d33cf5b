"""A real Slurm of four nodes on this machine: to try submissions out, for `make slurm-demo`, and for the tests.

    python -m launch.local_slurm        starts it, says what to type in another shell, and stops it on Ctrl-C

Nodes n1 to n4 have two cores and two GPUs each (plain files: scheduled for real, computed on by nobody). Partition
`high` preempts `low` by requeueing its jobs after 15 s of grace. Needs slurmctld, slurmd and Slurm's commands, on
Debian `apt-get install slurmctld slurmd slurm-client`.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.runs import LaunchError

NODES = ("n1", "n2", "n3", "n4")
PATIENCE = 60
"""Seconds after which a daemon or the queue will not do what is waited for."""

SLURM_CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
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
# a requeued job waits this long and a second (less than 5 s is read as the default, 120)
AuthInfo=cred_expire=5
SlurmdTimeout=10
# a node that does not answer is given up after three of these
MessageTimeout=5
KillWait=5
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL PriorityTier=10 GraceTime=15
"""


@dataclass
class LocalSlurm:
    """The cluster; its daemons are child processes of this one."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By name: `slurmctld`, and a slurmd under the name of each node."""

    def start(self, name: str) -> None:
        """Starts the controller or a node's daemon."""
        command = ["slurmctld", "-D"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        program = found(command[0])
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                command,
                executable=program,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C must not end it before the jobs, which would then go on without it
            )

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Ends a daemon, such as with SIGKILL; jobs under it are not asked."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait(timeout=PATIENCE)

    def ask(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def states(self) -> list[str]:
        """State of each node, such as idle; empty while the controller does not answer."""
        answer = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%T"], capture_output=True, text=True)
        return answer.stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.ask("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def running(folder: Path) -> Iterator[LocalSlurm]:
    """Starts the cluster in `folder` and points this process's Slurm commands at it; cancels all jobs and ends it.

    Raises LaunchError where Slurm is not installed or does not come up.
    """
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if found(name) is None]
    if missing:
        raise LaunchError(f"{', '.join(missing)} not found; apt-get install slurmctld slurmd slurm-client")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configure(folder))
    cluster = LocalSlurm(folder)
    try:
        for name in ("slurmctld", *NODES):
            cluster.start(name)
        wait_for(lambda: cluster.states() == ["idle"] * len(NODES), f"{len(NODES)} idle nodes, see {folder}/*.log")
        yield cluster
    finally:
        try:
            clear(cluster)
        finally:
            for name in reversed(list(cluster.daemons)):
                cluster.stop(name)
            os.environ.pop("SLURM_CONF")
            if before is not None:
                os.environ["SLURM_CONF"] = before


def found(program: str) -> str | None:
    """Path of one of Slurm's programs; Debian keeps the daemons where only root's PATH leads. None: not installed."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin")


def configure(folder: Path) -> Path:
    """Writes the cluster's configuration; returns the path of slurm.conf."""
    ports = free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    for name in ("state", *NODES):
        (folder / name).mkdir(parents=True)
    for gpu in ("gpu0", "gpu1"):
        (folder / gpu).touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu0\nName=gpu File={folder}/gpu1\n")
    path = folder / "slurm.conf"
    path.write_text(
        SLURM_CONF.format(
            host=socket.gethostname(), port=ports[0], user=getpass.getuser(), folder=folder, nodes="\n".join(nodes)
        )
    )
    return path


def clear(cluster: LocalSlurm) -> None:
    """Cancels all jobs and waits until they are gone."""
    if "slurmctld" not in cluster.daemons:
        return
    subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
    wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout, "an empty queue")


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Looks until `happened` is true. Raises LaunchError when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise LaunchError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.05)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C, so that no daemon is left behind."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the cluster until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, interrupt)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            with running(Path(folder)):
                print(f"four nodes are up; in another shell:\n  export SLURM_CONF={folder}/slurm.conf")
                print("Ctrl-C stops them", flush=True)
                signal.pause()
        except LaunchError as error:
            print(f"local_slurm: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
