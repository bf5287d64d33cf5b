"""Submitting to a real cluster: once or twice, with code that changes meanwhile, cancelling, waiting, going on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, steps_logged, wait_for
from slurm_runs import STEPS, Result, Run, assert_as_undisturbed, ended, preempt

from launch import runs, snapshot
from launch.local_slurm import LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("empty_queue")]

BROKEN = "raise ImportError('edited after the submission')\n"
DEADLY_SBATCH = """#!/bin/sh
{sbatch} "$@"
kill -KILL $PPID
"""


def copy_of_the_checkout(folder: Path) -> Path:
    """The program's files, as a checkout of git's."""
    for name in snapshot.code_files(REPOSITORY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def test_requeued_job_runs_the_code_of_its_submission(slurm: LocalSlurm, undisturbed: Result, tmp_path: Path) -> None:
    root = copy_of_the_checkout(tmp_path / "checkout")
    run = Run(slurm, tmp_path, root=root).hold_at("step-3").start()
    run.wait_until_held()
    trainer = root / "dgt" / "training" / "trainer.py"
    trainer.write_text(BROKEN + trainer.read_text())
    preempt(run)
    run.wait_for_preemption()
    run.release()
    run.wait_for_end()
    token = getattr(runs.read_record(run.folder), "token", "")
    stopped = json.loads((run.folder / "jobs" / f"{token}.0.interrupted").read_text())
    assert (stopped["signal"], stopped["step"]) == ("SIGTERM", 3)
    assert json.loads((run.folder / "jobs" / f"{token}.1.finished").read_text())["step"] == STEPS
    assert (run.reasons(), slurm.job(run.job)["Restarts"]) == (["preempted"], "1")
    code = next((run.folder / "code").iterdir())
    for rank in (0, 1):
        log = (run.folder / "logs" / f"rank-{rank}.log").read_text()
        told = re.findall(rf"rank {rank} of 2 on .*, dgt from (\S+)$", log, re.MULTILINE)
        assert told == [str(code / "dgt")] * 2
    assert "resuming after step 3" in (run.folder / "logs" / "rank-0.log").read_text()
    assert run.folder.stat().st_mode & 0o777 == 0o700
    assert_as_undisturbed(run, undisturbed)


def in_queue(cluster: LocalSlurm, token: str) -> list[str]:
    """Numbers of the jobs that a submission has made, and that wait or run."""
    rows = [line.split() for line in cluster.ask("squeue", "-h", "-o", "%i %k").splitlines()]
    return [number for number, comment in rows if comment == token]


def content(run: Path) -> dict[str, str]:
    """Digest of every file that training leaves."""
    kept = [run / "metrics.jsonl"]
    for name in ("tensorboard", "checkpoints", "samples"):
        kept += [path for path in (run / name).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_a_run_has_one_job_however_often_it_is_submitted(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    run = Run(slurm, tmp_path).hold_at("step-3")
    both = [run.begin_to_submit("steps.max_steps=8") for _ in range(2)]
    done = sorted((ended(process) for process in both), key=lambda process: process.returncode)
    assert [process.returncode for process in done] == [0, 2]
    assert "the run tiny is active" in done[1].stderr
    first = runs.read_record(run.folder)
    assert first is not None
    assert in_queue(slurm, first.token) == [first.job]
    assert len(slurm.ask("squeue", "-h").splitlines()) == 1
    run.wait_until_held()
    again = run.submit()
    assert (again.returncode, f"Slurm job {first.job} is RUNNING" in again.stderr) == (2, True)
    run.release()
    run.wait_for_end()
    assert run.steps() == list(range(1, 9))

    before = content(run.folder)
    slurm.ask("scontrol", "requeue", first.job)
    wait_for(lambda: slurm.job(first.job)["Restarts"] == "1", "the requeue")
    run.wait_for_end()
    assert "training was complete before; nothing is left to do" in run.log()
    assert content(run.folder) == before

    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(DEADLY_SBATCH.format(sbatch=shutil.which("sbatch")))
    sbatch.chmod(0o755)
    assert run.prepend_path(sbatch.parent).hold_at("step-10").submit().returncode == -signal.SIGKILL
    del run.environment["PATH"]
    second = runs.read_record(run.folder)
    assert second is not None
    assert (second.token != first.token, second.job) == (True, "")
    (number,) = in_queue(slurm, second.token)
    again = run.submit()
    assert (again.returncode, f"{second.token} is " in again.stderr) == (2, True)
    run.release()
    wait_for(lambda: slurm.job(number)["JobState"] == "COMPLETED", f"the end of the second job; {run.log()}")
    assert_as_undisturbed(run, undisturbed)


def state(run: Run) -> str:
    """Of the run, as launch/jobs.py tells it."""
    return json.loads(run.jobs("status", "tiny", "--json"))["state"].lower()


def test_cancelled_job_never_comes_back_and_its_run_goes_on_when_it_is_told(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    run = Run(slurm, tmp_path, environment={"DGT_TEST_AWAIT": "4:0"}).start()
    run.wait_for_step(3)
    jobs = [run.job]
    slurm.ask("scancel", run.job)  # before a save, for which there is time
    run.wait_for_end("CANCELLED")
    assert (run.reasons(), state(run)) == (["cancelled"], "cancelled")
    assert run.story("stopped")[0]["step"] == 4

    del run.environment["DGT_TEST_AWAIT"]
    run.hold_at("save").jobs("resume", "tiny")
    jobs.append(run.job)
    run.wait_until_held()
    slurm.ask("scancel", run.job)  # during a save, which takes longer than Slurm waits
    run.wait_for_end("CANCELLED")
    assert state(run) == "cancelled"

    run.hold_at("saved").jobs("resume", "tiny")
    jobs.append(run.job)
    run.wait_until_held()
    assert state(run) == "running"
    assert re.search(rf"^tiny +RUNNING +{run.job} +n\[1-2\] +5/{STEPS} ", run.jobs("list"), re.MULTILINE)
    assert re.search(r"^restarts +2$", run.jobs("status", "tiny"), re.MULTILINE)
    run.jobs("cancel", "tiny", "--yes")  # after a save
    run.release()
    run.wait_for_end("CANCELLED")
    assert state(run) == "cancelled"

    run.environment.clear()
    run.jobs("resume", "tiny")
    run.wait_for_end()
    assert state(run) == "finished"
    for job in jobs:
        assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    assert [event["job"] for event in run.story("started")] == [*jobs, run.job]
    assert run.story("requeued") == []
    assert run.reasons() == ["cancelled"] * 3
    assert_as_undisturbed(run, undisturbed)


def test_sweep_starts_after_another_job_and_is_followed_to_its_end(slurm: LocalSlurm, tmp_path: Path) -> None:
    other = slurm.ask("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    options = ("--nodes", "1", "--processes-per-node", "1", "--partition", "low")
    run = Run(slurm, tmp_path, ("steps.max_steps=2",), options=options)
    following = run.begin_to_submit("--after", other, "--wait", "--sweep", "seed=0,1")
    asked = ("squeue", "-h", "--name=tiny-seed-0,tiny-seed-1", "-o", "%T %r")
    wait_for(lambda: slurm.ask(*asked).splitlines() == ["PENDING Dependency"] * 2, "two jobs that wait for another")
    slurm.ask("scontrol", "release", other)
    done = ended(following)
    assert done.returncode == 0, done.stderr
    for name in ("tiny-seed-0", "tiny-seed-1"):
        assert steps_logged(tmp_path / "runs" / name) == [1, 2]
        told = re.findall(rf"^{name}: \S+  (\w+): ", done.stdout, re.MULTILINE)
        assert told[:2] == ["submitted", "started"]
