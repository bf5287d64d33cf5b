"""The batch script: what is asked of Slurm, and what it decides after the ranks have left, tried with bash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch import batch_script, profiles
from launch.layout import Layout
from launch.runs import LaunchError


def job(run: Path, use_gpus: bool = True, **profile: object) -> batch_script.SlurmJob:
    """Two nodes of four processes."""
    layout = Layout("slurm", 2, 4, use_gpus)
    return batch_script.SlurmJob(run, ("srun-me", "--flag"), run, layout, profiles.load(None, profile))


def options(text: str) -> set[str]:
    """What follows #SBATCH."""
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def test_script_asks_for_what_the_recipe_needs(tmp_path: Path) -> None:
    text = batch_script.text(job(tmp_path, cpus_per_task=12, partition="gpu", time="12:00:00", signal_lead=90))
    assert options(text) == {
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=12", "--partition=gpu",
        "--time=12:00:00", "--exclusive", "--requeue", "--open-mode=append", "--signal=USR2@90",
        f"--job-name={tmp_path.name}", f"--output={tmp_path}/logs/batch.log", f"--chdir={tmp_path}",
    }  # fmt: skip
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    for part in (
        "--kill-on-bad-exit=1",
        f"--output={tmp_path}/logs/rank-%t.log",
        "--open-mode=append",
        "--cpus-per-task=12",
    ):
        assert part in srun.split()
    assert srun.endswith(" srun-me --flag")


def test_cpu_job_asks_for_no_gpus(tmp_path: Path) -> None:
    asked = options(batch_script.text(job(tmp_path, use_gpus=False)))
    assert not [option for option in asked if option.startswith("--gpus")]


def test_profile_adds_environment_setup_and_other_options(tmp_path: Path) -> None:
    more = {
        "environment": {"NCCL_SOCKET_IFNAME": "ib 0"},
        "setup": ["module load cuda"],
        "sbatch": {"reservation": "r"},
    }
    text = batch_script.text(job(tmp_path, **more))
    lines = text.splitlines()
    assert lines.index("export NCCL_SOCKET_IFNAME='ib 0'") < lines.index("module load cuda")
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert "--reservation=r" in options(text)


def test_folder_that_slurm_would_read_as_a_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="pattern"):
        batch_script.text(job(tmp_path / "50%"))


SRUN = """#!/bin/bash
mkdir -p {run}/jobs {run}/checkpoints
{act}
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo "JobId=7 StartTime=2026-01-02T00:00:00 PreemptTime={preempted} EndTime=x"; exit; fi
echo "$*" >> {run}/requeues
kill -TERM $PPID  # as Slurm ends the script of a job that it requeues
"""


def execute(run: Path, act: str, restarts: int = 0, preempted: str = "None") -> tuple[int, list[str], str]:
    """Runs the script with an srun that does `act` and a Slurm that says `preempted`.

    Returns its status, what was asked of `scontrol`, and what it printed.
    """
    programs = run / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("srun", SRUN.format(run=run, act=act)),
        ("scontrol", SCONTROL.format(run=run, preempted=preempted)),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    if restarts:
        variables["SLURM_RESTART_COUNT"] = str(restarts)
    script = batch_script.text(job(run, max_retries=1))
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    asked = (run / "requeues").read_text().splitlines() if (run / "requeues").exists() else []
    return done.returncode, asked, done.stdout


REQUEUED = ["requeue Incomplete 7"]
MARK = "echo '{}' > $DGT_MARKER."


def test_finished_run_ends_the_job_whatever_srun_says(tmp_path: Path) -> None:
    status, asked, _ = execute(tmp_path, MARK.format('{"step": 8}') + "finished; exit 143")
    assert (status, asked) == (0, [])


def test_planned_stop_is_requeued_once(tmp_path: Path) -> None:
    status, asked, said = execute(tmp_path, MARK.format('{"signal": "SIGTERM"}') + "interrupted")
    assert (status, asked) == (-15, REQUEUED)
    assert 'stopped as planned, {"signal": "SIGTERM"}' in said


def test_sigint_is_not_requeued(tmp_path: Path) -> None:
    status, asked, _ = execute(tmp_path, MARK.format('{"signal": "SIGINT"}') + "interrupted")
    assert (status, asked) == (130, [])


def test_error_that_would_repeat_is_not_requeued(tmp_path: Path) -> None:
    status, asked, _ = execute(tmp_path, MARK.format("{}") + "failed; exit 1")
    assert (status, asked) == (2, [])


def test_marker_of_another_attempt_or_an_older_job_of_the_same_number_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("7.0.finished", "7.1.finished"):
        (tmp_path / "jobs" / name).write_text("{}")
    _, asked, said = execute(tmp_path, "exit 1", restarts=1)
    assert asked == REQUEUED
    assert "crash 1 of at most 1" in said


def test_crashes_without_progress_are_given_up(tmp_path: Path) -> None:
    assert execute(tmp_path, "exit 1")[1] == REQUEUED
    status, asked, said = execute(tmp_path, "exit 1", restarts=1)
    assert (status, asked) == (1, REQUEUED), "the second crash was requeued too"
    assert "giving up after 2 crashes in a row without a new checkpoint (srun: 1)" in said


def test_progress_forgives_crashes(tmp_path: Path) -> None:
    for attempt in range(3):
        act = f"mkdir {tmp_path}/checkpoints/step_0000000{attempt}; exit 1"
        assert execute(tmp_path, act, restarts=attempt)[1] == REQUEUED * (attempt + 1)


def test_preemption_without_a_marker_is_no_crash(tmp_path: Path) -> None:
    _, asked, said = execute(tmp_path, "exit 1", preempted="2026-01-02T01:00:00")
    assert asked == REQUEUED
    assert "preempted before a save" in said
    assert not (tmp_path / "jobs" / "7.crashes").exists()


def test_preemption_of_an_earlier_attempt_excuses_no_crash(tmp_path: Path) -> None:
    execute(tmp_path, "exit 1", preempted="2026-01-01T23:00:00", restarts=1)
    assert (tmp_path / "jobs" / "7.crashes").read_text() == "1\n"
