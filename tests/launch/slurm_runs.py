"""Runs on the real cluster, disturbed in every way, and what must be true of them in the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PATIENCE, REPOSITORY, steps_logged, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgt.training import checkpoint
from dgt.training.sample_log import surviving_samples
from launch import events, runs, submit
from launch.local_slurm import LocalSlurm

CONFIG = """
name: tiny
model: {name: dgt_nano, drop_path_rate: 0.1}
data: {backend: synthetic, num_classes: 4, image_size: 32, num_threads: 0}
steps: {epochs: 3, global_batch_size: 8, micro_batch_size: 4, evaluate_every_epochs: 1}
schedule: {warmup_epochs: 1}
engine: {name: fsdp, precision: fp32, threads: 1}
checkpoint: {every_steps: 5, keep_last: 2, asynchronous: false}  # so that all of rank 0 can be held in a save
monitor: {log_every: 1, log_samples: true}
"""
TRAIN_SAMPLES, STEPS, STEPS_PER_EPOCH = 32, 12, 4
INJECT = Path(__file__).parent / "inject"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass
class Run:
    """One run in a folder of its own, submitted as a person does it: by the command line."""

    cluster: LocalSlurm
    base: Path
    changes: tuple[str, ...] = ()
    """Overrides of the configuration."""
    root: Path = REPOSITORY
    """The checkout whose launch/submit.py is called."""
    options: tuple[str, ...] = ("--nodes", "2", "--processes-per-node", "1", "--partition", "low")
    environment: dict[str, str] = field(default_factory=dict)
    """What the ranks are told by inject/sitecustomize.py."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.base / "runs" / "tiny"

    def begin_to_submit(self, *more: str) -> subprocess.Popen[str]:
        """Calls launch/submit.py as a program."""
        return self.call("submit.py", *self.words(*more))

    def words(self, *more: str) -> list[str]:
        """Its command line; the configuration is written on the way."""
        config = self.base / "tiny.yaml"
        values = yaml.safe_load(CONFIG) | {"output_dir": str(self.base / "runs")}
        values["data"]["synthetic"] = {"train_samples": TRAIN_SAMPLES, "val_samples": 9}
        if not config.exists():  # another one may be reading it
            config.write_text(yaml.safe_dump(values))
        return ["--config", str(config), *self.options, *more, *self.changes]

    def call(self, program: str, *words: str) -> subprocess.Popen[str]:
        """Calls a program of launch/."""
        variables = os.environ | self.variables_of_ranks()
        command = [sys.executable, str(self.root / "launch" / program), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.base, env=variables, stdout=pipe, stderr=pipe, text=True)

    def variables_of_ranks(self) -> dict[str, str]:
        """What a submission hands on to the ranks."""
        return self.environment | {"PYTHONPATH": str(INJECT)} if self.environment else {}

    def submit(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Submits, and waits for what becomes of that."""
        return ended(self.begin_to_submit(*more))

    def jobs(self, *words: str) -> str:
        """What launch/jobs.py prints, which must succeed."""
        done = ended(self.call("jobs.py", *words))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *more: str) -> Run:
        """Submits, which must succeed; from this process, which has imported everything already."""
        if self.root != REPOSITORY:
            done = self.submit(*more)
            assert done.returncode == 0, done.stderr
            return self
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            patch.chdir(self.base)
            for name, value in self.variables_of_ranks().items():
                patch.setenv(name, value)
            status = submit.main(self.words(*more))
        assert status == 0, said.getvalue()
        return self

    @property
    def job(self) -> str:
        """Slurm's number of the last job."""
        record = runs.read_record(self.folder)
        assert record is not None
        return record.job

    def hold_at(self, *places: str) -> Run:
        """Has rank 0 stop at a place (see inject/sitecustomize.py): at the first in attempt 0, and so on.

        In place of one there can be several, with spaces between them, and "" is none.
        """
        for left in self.base.glob("held-*"):
            left.unlink()
        told = [
            f"{place}:{self.held(attempt, stop)}:{attempt}"
            for attempt, several in enumerate(places)
            for stop, place in enumerate(several.split())
        ]
        self.environment["DGT_TEST_HOLD"] = ",".join(told)
        return self

    def held(self, attempt: int, stop: int) -> Path:
        """What rank 0 makes at an attempt's first place (stop 0), its second, and so on."""
        return self.base / f"held-{attempt}-{stop}"

    def prepend_path(self, folder: Path) -> Run:
        """Has the submission and the job find the programs of this folder first."""
        self.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
        return self

    def wait_until_held(self, attempt: int = 0, stop: int = 0) -> None:
        """Waits until rank 0 is at the place."""
        wait_for(self.held(attempt, stop).exists, f"rank 0 at its place; {self.log()}")

    def release(self, attempt: int = 0, stop: int = 0) -> None:
        """Lets rank 0 go on."""
        self.held(attempt, stop).with_suffix(".go").touch()

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is logged."""
        wait_for(lambda: step in self.steps(), f"step {step}; {self.log()}")

    def steps(self) -> list[int]:
        """Training steps in metrics.jsonl."""
        return steps_logged(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    def story(self, *kinds: str) -> list[dict[str, Any]]:
        """The events, or those of some kinds."""
        return [event for event in events.read(self.folder) if not kinds or event["event"] in kinds]

    def reasons(self) -> list[str]:
        """Why each attempt stopped."""
        return [event["reason"] for event in self.story("stopped")]

    def wait_for_event(self, kind: str, count: int = 1) -> None:
        """Waits until so many events of a kind are noted."""
        wait_for(lambda: len(self.story(kind)) >= count, f"event {count} of {kind}; {self.log()}")

    def wait_for_preemption(self) -> None:
        """Waits until Slurm has told the ranks; it does so at once when it decides."""
        wait_for(lambda: self.cluster.job(self.job).get("PreemptTime", "None") != "None", "a preemption")

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        """Waits until Slurm has ended the job."""
        wait_for(lambda: self.cluster.job(self.job)["JobState"] in ENDED, f"the job's end; {self.log()}")
        assert self.cluster.job(self.job)["JobState"] == state, self.log()

    def log(self) -> str:
        """The batch log, for messages."""
        return runs.read_text(self.folder / "logs" / "batch.log")

    def processes(self) -> dict[int, int]:
        """Rank -> process, of the ranks that run."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.startswith(str(self.folder / "code").encode()) and b"train.py" in word for word in words):
                    found[int(variables(int(entry.name))["SLURM_PROCID"])] = int(entry.name)
            except (OSError, KeyError):  # it has just ended, or just begun
                continue
        return found

    def variables(self, rank: int) -> dict[str, str]:
        """Environment of a rank that runs."""
        return variables(self.processes()[rank])

    def node_of(self, rank: int) -> str:
        """Where a rank runs."""
        return self.variables(rank)["SLURMD_NODENAME"]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends one rank a signal."""
        os.kill(self.processes()[rank], number)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for a program; kills one that does not end."""
    with process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def variables(process: int) -> dict[str, str]:
    """Environment of a process. Raises OSError where there is none."""
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def kill_node(cluster: LocalSlurm, node: str) -> None:
    """Has a node's daemon and all that it has started die at once, as by a power cut."""
    cluster.stop(node, signal.SIGKILL)
    configuration, victims = str(cluster.folder / "slurm.conf"), set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = variables(int(entry.name))
            if (told.get("SLURMD_NODENAME"), told.get("SLURM_CONF")) == (node, configuration):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                is_step = (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd")
                victims |= {int(entry.name), *([parent] if is_step else [])}
        except (OSError, ValueError):  # it has just ended, or is another user's
            continue
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another die
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)


def preempt(run: Run, seconds: float = 1) -> str:
    """Has a job of the high partition take all nodes, as soon as it can, for a moment; returns its number."""
    asked = ("--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null")
    return run.cluster.ask("sbatch", "--parsable", *asked, f"--wrap=sleep {seconds}").strip()


@contextmanager
def grace(cluster: LocalSlurm, seconds: int) -> Iterator[None]:
    """Leaves jobs of the partition `low` so long after they are preempted; then as long as before."""
    before = cluster.ask("scontrol", "show", "partition", "low").partition("GraceTime=")[2].split()[0]
    cluster.ask("scontrol", "update", "PartitionName=low", f"GraceTime={seconds}")
    try:
        yield
    finally:
        cluster.ask("scontrol", "update", "PartitionName=low", f"GraceTime={before}")


@dataclass(frozen=True)
class Result:
    """What a run has come to."""

    tensors: dict[str, torch.Tensor]
    """Of the last checkpoint."""
    progress: dict[str, Any]
    samples: dict[int, list[int]]
    """Step -> sample ids, of the history that survived."""
    curve: list[tuple[int, float]]
    """(step, loss) as TensorBoard shows it."""


def result(run: Path) -> Result:
    """Reads it from the run's folder."""
    last = max((run / "checkpoints").glob("step_????????"))
    stored = checkpoint.tensors_in(checkpoint.verify(last))
    state = {name: stored.whole(name) for name in stored.tensors}
    progress = json.loads((last / "manifest.json").read_text())["progress"]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curve = [(point.step, point.value) for point in board.Scalars("train/loss")]
    return Result(state, progress, surviving_samples(run), curve)


def assert_as_undisturbed(run: Run, expected: Result) -> None:
    """Each sample exactly once an epoch, weights equal bit for bit, one continuous curve, and nothing left behind."""
    found = result(run.folder)
    for epoch in range(STEPS // STEPS_PER_EPOCH):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sorted(sample for step in steps for sample in found.samples[step]) == list(range(TRAIN_SAMPLES))
    assert found.samples == expected.samples
    assert found.curve == expected.curve
    assert [step for step, _ in found.curve] == list(range(1, STEPS + 1))
    assert run.steps() == list(range(1, STEPS + 1))
    assert found.progress == expected.progress
    assert found.tensors.keys() == expected.tensors.keys()
    assert not [name for name in found.tensors if not torch.equal(found.tensors[name], expected.tensors[name])]
    assert_nothing_left(run)


def assert_nothing_left(run: Run) -> None:
    """No process, no lock, no temporary file."""
    wait_for(lambda: not run.processes(), "the end of all ranks")
    with runs.locked(run.folder):
        pass
    left = [path for pattern in ("*.saving", "*.new", ".*.new") for path in run.folder.rglob(pattern)]
    assert left == []
