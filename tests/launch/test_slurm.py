"""The whole way through a real Slurm of four nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import has_step, steps_logged, wait_for

from launch import submit
from launch.local_slurm import LocalSlurm

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes", "2", "--partition", "low")


def test_job_on_two_nodes_runs_the_snapshot_and_finishes(slurm: LocalSlurm, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    assert submit.main(["--config", str(config), *TWO_NODES, "--gpus-per-node", "1"]) == 0
    job = json.loads((run / "job.json").read_text())["job"]
    assert submit.main(["--config", str(config), *TWO_NODES, "--gpus-per-node", "1"]) == 2, (
        "an active run was submitted again"
    )
    assert slurm.job(job)["TresPerNode"] == "gres:gpu:1"
    wait_for(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the job's end")
    batch_log = (run / "logs" / "batch.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", batch_log
    assert steps_logged(run) == list(range(1, 9))
    assert json.loads(next((run / "jobs").glob("*.0.finished")).read_text())["step"] == 8
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (log := (run / "logs" / f"rank-{rank}.log").read_text())
        assert f"dgt from {run}/code/" in log


def test_preempted_job_saves_is_requeued_and_finishes(slurm: LocalSlurm, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    long = ["steps.epochs=5", "checkpoint.every_steps=1000"]
    assert submit.main(["--config", str(config), *TWO_NODES, "--processes-per-node", "1", *long]) == 0
    job = json.loads((run / "job.json").read_text())["job"]
    wait_for(lambda: has_step(run, 2), "the second step")
    slurm.ask("sbatch", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: list((run / "jobs").glob("*.0.interrupted")), "the marker of the interruption")
    stopped = json.loads(next((run / "jobs").glob("*.0.interrupted")).read_text())
    assert stopped["signal"] == "SIGTERM"
    assert (run / "checkpoints" / f"step_{stopped['step']:08d}").is_dir()
    wait_for(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the job's end")
    assert slurm.job(job)["JobState"] == "COMPLETED", (run / "logs" / "batch.log").read_text()
    assert slurm.job(job)["Restarts"] == "1"
    assert steps_logged(run) == list(range(1, 21))
    assert f"resuming after step {stopped['step']}" in (run / "logs" / "rank-0.log").read_text()
