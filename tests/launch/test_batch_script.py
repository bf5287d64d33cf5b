"""The batch script: what is asked of Slurm, and what it does around the ranks, with bash and a Slurm of scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from launch import batch_script, events, profiles, runs
from launch.layout import Layout
from launch.runs import JobRecord, LaunchError

TOKEN = "slurm-20260102-000000-abcd"


def job(run: Path, use_gpus: bool = True, lead: int = 90, **profile: object) -> batch_script.SlurmJob:
    """Two nodes of four processes."""
    made = profiles.load(None, profile)
    layout = Layout("slurm", 2, 4, use_gpus)
    return batch_script.SlurmJob(run, TOKEN, REPOSITORY, ("rank", "--flag"), run, layout, made, lead)


def options(text: str) -> set[str]:
    """What follows #SBATCH."""
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def ranks_line(text: str) -> str:
    """The line that starts the ranks."""
    return next(line for line in text.splitlines() if line.startswith("srun "))


def test_script_asks_for_what_the_recipe_needs(tmp_path: Path) -> None:
    text = batch_script.text(job(tmp_path, cpus_per_task=12, partition="gpu", time="12:00:00"))
    assert options(text) == {
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=12", "--partition=gpu",
        "--time=12:00:00", "--exclusive", "--requeue", "--open-mode=append", "--signal=USR2@90", f"--comment={TOKEN}",
        f"--job-name={tmp_path.name}", f"--output={tmp_path}/logs/batch.log", f"--chdir={tmp_path}",
    }  # fmt: skip
    srun = ranks_line(text)
    for part in (
        "--kill-on-bad-exit=1",
        f"--output={tmp_path}/logs/rank-%t.log",
        "--open-mode=append",
        "--cpus-per-task=12",
    ):
        assert part in srun.split()
    assert srun.endswith(" rank --flag")


def test_options_of_the_command_line_reach_sbatch(tmp_path: Path) -> None:
    asked = options(batch_script.text(job(
        tmp_path, account="a", qos="q", constraint="h100", reservation="r", mem="64G", exclude="n1", mail="me@here.org",
        after=("7", "8"), sbatch={"nice": 5},
    )))  # fmt: skip
    assert asked >= {
        "--account=a", "--qos=q", "--constraint=h100", "--reservation=r", "--mem=64G", "--exclude=n1", "--nice=5",
        "--mail-user=me@here.org", "--mail-type=END,FAIL,REQUEUE", "--dependency=afterok:7:8",
        "--kill-on-invalid-dep=yes",
    }  # fmt: skip


def test_gpus_are_asked_for_by_their_type_where_the_profile_says_one(tmp_path: Path) -> None:
    assert "--gpus-per-node=h100:4" in options(batch_script.text(job(tmp_path, gpu_type="h100")))


def test_cpu_job_asks_for_no_gpus(tmp_path: Path) -> None:
    text = batch_script.text(job(tmp_path, use_gpus=False))
    assert not [option for option in options(text) if option.startswith("--gpus")]
    assert "--gpus 0" in text


def test_profile_adds_environment_modules_setup_and_srun_options(tmp_path: Path) -> None:
    more = {
        "environment": {"NCCL_SOCKET_IFNAME": "ib 0"},
        "modules": ["cuda/12.4"],
        "setup": ["ulimit -l unlimited"],
        "srun": ["--mpi=none"],
    }
    lines = batch_script.text(job(tmp_path, **more)).splitlines()
    wanted = [
        "export NCCL_SOCKET_IFNAME='ib 0'",
        "module load cuda/12.4",
        "ulimit -l unlimited",
        'eval "$("${attempt[@]}" begin)"',
    ]
    assert [line for line in lines if line in wanted] == wanted
    assert "--mpi=none" in ranks_line("\n".join(lines)).split()


def test_container_stands_before_the_python_of_the_ranks_alone(tmp_path: Path) -> None:
    profile = profiles.load(
        None,
        {
            "container": "dgt.sif",
            "container_command": "apptainer exec --nv {image}",
            "srun": ["--export=ALL,I={image}"],
        },
    )
    command = batch_script.rank_command(Path("/code"), profile)
    assert command == (
        "apptainer", "exec", "--nv", "dgt.sif", "python3", "/code/launch/train.py", "--config", "/code/config.yaml",
    )  # fmt: skip
    layout = Layout("slurm", 1, 1, True)
    text = batch_script.text(batch_script.SlurmJob(tmp_path, TOKEN, tmp_path, command, tmp_path, layout, profile, 60))
    assert "--export=ALL,I=dgt.sif apptainer exec" in ranks_line(text)
    assert f"python={sys.executable}" in text.splitlines()


def test_health_check_is_asked_for_as_the_profile_says(tmp_path: Path) -> None:
    def line(**profile: object) -> list[str]:
        text = batch_script.text(job(tmp_path, **profile)).replace("\\\n", " ")
        return next((line for line in text.splitlines() if "health_check.py" in line), "").split()

    plain = line(scratch={"/nvme": 500.0})
    assert [w for w in plain if "ntasks" in w or w in ("--gpus", "4")] == [
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--gpus",
        "4",
    ]
    assert plain[plain.index("--free") + 1] == "/nvme=500.0"
    assert plain[plain.index("--token") + 1] == TOKEN
    assert plain[plain.index("--limit") + 1] == '"$health_timeout"'
    measured = line(health={"matmul_tflops": 400, "allreduce_gb_s": 80.0})
    assert {"--ntasks=8", "--ntasks-per-node=4", "--matmul-tflops", "--allreduce-gb-s", "80.0"} <= set(measured)
    assert line(health={"enabled": False}) == []


def test_folder_that_slurm_would_read_as_a_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="pattern"):
        batch_script.text(job(tmp_path / "50%"))


SRUN = """#!/bin/bash
case "$*" in
*health_check.py*) {health} ;;
*) mkdir -p {run}/checkpoints; env | grep -E '^(MASTER_PORT|DGT_)' > {run}/environment; {act} ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo n1; echo n2 ;;
"show job") cat {run}/job.txt ;;
"requeue Incomplete")
  {refusal}
  echo "$*" >> {run}/asked
  sed -i 's/Restarts=[0-9]*/Restarts=99/' {run}/job.txt
  # as Slurm ends the script of a job that it requeues
  group=$(ps -o pgid= $$ | tr -d ' ')
  setsid bash -c "sleep 0.5; kill -KILL -- -$group" >/dev/null 2>&1 & ;;
*) echo "$*" >> {run}/asked ;;
esac
"""
JOB = (
    "JobId=7 JobState={state} Restarts={told} StartTime=2026-01-02T00:00:00 PreemptTime={preempted} "
    "ExcNodeList=n9 EndTime={end}"
)


@dataclass
class Done:
    """What the script did."""

    status: int
    asked: list[str]
    """Of scontrol."""
    said: str
    story: list[dict[str, Any]]
    """The events."""

    @property
    def last(self) -> tuple[str, str]:
        """Kind and text of the last event."""
        return self.story[-1]["event"], self.story[-1]["text"]


def execute(
    run: Path, act: str, restarts: int = 0, setup: Sequence[str] = (), code: Path = REPOSITORY, **slurm: str
) -> Done:
    """Runs the script with an srun that does `act` as the ranks, and a Slurm that says what `slurm` has.

    `health`: what the health check's srun does; `nodes`: what sinfo says; `refusal`: what scontrol does before it
    requeues.
    """
    facts = {"state": "RUNNING", "preempted": "None", "told": str(restarts), "end": "Unknown", "health": ":"} | slurm
    programs = run / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (run / "jobs").mkdir(exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    (run / "job.txt").write_text(JOB.format(**facts) + "\n")
    nodes = facts.get("nodes", "n1 allocated\\nn2 allocated\\nn3 idle\\nn4 down*")
    scripts = {
        "srun": SRUN.format(run=run, act=act, health=facts["health"]),
        "scontrol": SCONTROL.format(run=run, refusal=facts.get("refusal", ":")),
        "sinfo": f"#!/bin/bash\nprintf '{nodes}\\n'\n",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    record = JobRecord("slurm", TOKEN, "7", 2, 4, False, ("rank",), str(run), {}, "", "here")
    if not (run / "job.json").exists():
        runs.write_record(run, record)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_PARTITION": "low",
    }  # fmt: skip
    if restarts:
        variables["SLURM_RESTART_COUNT"] = str(restarts)
    script = batch_script.text(replace(job(run, max_retries=1, setup=list(setup)), code=code))
    before = set(run.glob("asked"))
    earlier = len((run / "asked").read_text().splitlines()) if before else 0
    with (run / "logs" / "batch.log").open("a") as log:
        done = subprocess.run(
            ["bash", "-c", script],
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            timeout=60,
            start_new_session=True,
        )
    asked = (run / "asked").read_text().splitlines()[earlier:] if (run / "asked").exists() else []
    return Done(done.returncode, asked, (run / "logs" / "batch.log").read_text(), events.read(run))


REQUEUED = ["requeue Incomplete 7"]
DISABLED = "echo 'Requested operation is presently disabled' >&2; exit 1"
FIVE_NODES = "n1 idle\\nn2 idle\\nn3 idle\\nn4 idle\\nn5 idle"
KILLED = -9
"""Status of a script that Slurm has ended, as it does with every job that it requeues."""


def mark(end: str, **facts: object) -> str:
    """Shell that leaves a marker."""
    return f"echo '{json.dumps({'step': 8, **facts})}' > $DGT_MARKER.{end}"


def test_finished_run_ends_the_job_whatever_srun_says(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("finished") + "; exit 143")
    assert (done.status, done.asked, done.last) == (0, [], ("finished", "training is complete after step 8"))


def test_finished_run_that_is_requeued_ends_before_its_ranks_start(tmp_path: Path) -> None:
    execute(tmp_path, mark("finished"))
    done = execute(tmp_path, f"touch {tmp_path}/ranks_started", restarts=1)
    assert (done.status, done.asked) == (0, [])
    assert not (tmp_path / "ranks_started").exists()
    assert "training was complete before" in done.said


def test_ranks_get_a_marker_of_their_attempt_a_port_and_the_deadline(tmp_path: Path) -> None:
    execute(tmp_path, mark("finished"), restarts=2, end="2031-01-01T00:00:00")
    lines = (tmp_path / "environment").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    assert found["DGT_MARKER"] == f"{tmp_path}/jobs/{TOKEN}.2"
    assert found["DGT_RUN_LOCKED"] == "1"
    assert 1024 < int(found["MASTER_PORT"]) < 65536
    end = subprocess.run(["date", "-u", "-d", "2031-01-01T00:00:00", "+%s"], capture_output=True, text=True).stdout
    assert found["DGT_DEADLINE"] == end.strip()


def test_planned_stop_is_requeued_once(tmp_path: Path) -> None:
    done = execute(tmp_path, f"mkdir {tmp_path}/checkpoints/step_00000008; {mark('interrupted', signal='SIGTERM')}")
    assert (done.status, done.asked) == (KILLED, REQUEUED)
    assert [event["event"] for event in done.story] == ["started", "stopped", "requeued"]
    assert done.story[1]["text"] == "stopped by SIGTERM; saved at step 8; the newest checkpoint is step_00000008"
    assert (done.story[1]["reason"], done.story[1]["step"], done.story[1]["attempt"]) == ("signal", 8, 0)


def test_preempted_run_says_so(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("interrupted", signal="SIGTERM"), preempted="2026-01-02T01:00:00")
    assert (done.asked, done.story[1]["reason"]) == (REQUEUED, "preempted")


def test_notice_near_the_time_limit_is_told_from_one_from_elsewhere(tmp_path: Path) -> None:
    soon = subprocess.run(["date", "-u", "-d", "+100 seconds", "+%FT%T"], capture_output=True, text=True).stdout.strip()
    near = execute(tmp_path / "a", mark("interrupted", signal="SIGUSR2"), end=soon)
    assert (near.asked, near.story[1]["reason"]) == (REQUEUED, "time limit")
    far = execute(tmp_path / "b", mark("interrupted", signal="SIGUSR2"), end="2039-01-01T00:00:00")
    assert (far.asked, far.story[1]["reason"]) == (REQUEUED, "signal")


def test_sigint_is_not_requeued(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("interrupted", signal="SIGINT"))
    assert (done.status, done.asked) == (130, [])


def test_error_that_would_repeat_is_not_requeued(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("failed", reason="no such key") + "; exit 1")
    assert (done.status, done.asked) == (2, [])
    assert done.last[0] == "gave-up"
    assert "an error that would repeat: no such key" in done.last[1]


def test_cancelled_job_is_not_requeued_though_its_ranks_saved(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("interrupted", signal="SIGTERM"), state="CANCELLED")
    assert (done.status, done.asked, done.story[-1]["reason"]) == (1, [], "cancelled")


def test_job_that_slurm_has_requeued_already_is_left_to_it(tmp_path: Path) -> None:
    done = execute(
        tmp_path,
        f"sed -i 's/RUNNING/COMPLETING/; s/Restarts=0/Restarts=1/' {tmp_path}/job.txt; "
        "echo 'srun: error: Node failure on n2' >&2",
    )
    assert (done.status, done.asked) == (0, [])
    assert (done.story[-1]["reason"], done.story[-1]["text"]) == (
        "node failure", "node n2 failed; there is no checkpoint yet",
    )  # fmt: skip


def test_marker_of_another_attempt_or_submission_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in (f"{TOKEN}.0.interrupted", "slurm-20250101-000000-ffff.1.finished"):
        (tmp_path / "jobs" / name).write_text('{"step": 1, "signal": "SIGTERM"}')
    done = execute(tmp_path, "exit 1", restarts=1)
    assert (done.asked, done.story[-2]["reason"]) == (REQUEUED, "crash")


def test_job_gives_way_where_the_run_was_submitted_again(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    runs.write_record(tmp_path, JobRecord("slurm", "another", "8", 1, 1, False, ("rank",), "", {}, "", ""))
    done = execute(tmp_path, f"touch {tmp_path}/ranks_started")
    assert (done.status, done.asked) == (2, [])
    assert "belongs to another submission now (Slurm job 8)" in done.said
    assert not (tmp_path / "ranks_started").exists()


def test_crashes_without_progress_are_given_up(tmp_path: Path) -> None:
    assert execute(tmp_path, "exit 1").asked == REQUEUED
    done = execute(tmp_path, "exit 1", restarts=1)
    assert (done.status, done.asked) == (1, []), "the second crash was requeued too"
    assert done.last[0] == "gave-up"
    assert "gave up after 2 crashes in a row without a new checkpoint" in done.last[1]


def test_progress_forgives_crashes(tmp_path: Path) -> None:
    for attempt in range(3):
        act = f"mkdir {tmp_path}/checkpoints/step_0000000{attempt}; exit 1"
        assert execute(tmp_path, act, restarts=attempt).asked == REQUEUED


def test_node_on_which_ranks_died_twice_is_excluded(tmp_path: Path) -> None:
    for attempt in range(2):
        act = f"mkdir {tmp_path}/checkpoints/step_0000000{attempt}; echo 'srun: error: n2: task 1: Killed' >&2; exit 1"
        done = execute(tmp_path, act, restarts=attempt, nodes=FIVE_NODES)
    assert done.asked == [*REQUEUED, "update JobId=7 ExcNodeList=n1,n2"]
    assert (done.story[-1]["event"], done.story[-1]["node"]) == ("node-excluded", "n2")


def test_preemption_without_a_marker_is_no_crash(tmp_path: Path) -> None:
    done = execute(tmp_path, "exit 1", preempted="2026-01-02T01:00:00")
    assert done.asked == REQUEUED
    assert "preempted before it could save; there is no checkpoint yet" in done.story[1]["text"]
    assert json.loads((tmp_path / "jobs" / f"{TOKEN}.tally").read_text())["fruitless"] == 0


def test_preemption_of_an_earlier_attempt_excuses_no_crash(tmp_path: Path) -> None:
    execute(tmp_path, "exit 1", preempted="2026-01-01T23:00:00", restarts=1)
    assert json.loads((tmp_path / "jobs" / f"{TOKEN}.tally").read_text())["fruitless"] == 1


def test_health_check_whose_requeue_is_refused_starts_no_ranks(tmp_path: Path) -> None:
    health = reports(tmp_path, n1=None, n2="driver gone")
    done = execute(tmp_path, f"touch {tmp_path}/ranks_started", health=health, nodes=FIVE_NODES, refusal=DISABLED)
    assert (done.status, done.asked, done.last[0]) == (1, [], "gave-up")
    assert not (tmp_path / "ranks_started").exists()


def test_full_disk_costs_notes_but_not_the_requeue(small_disk: Path) -> None:
    done = execute(small_disk, f"head -c 60M /dev/zero > {small_disk}/fill; exit 1")
    assert done.status == KILLED, "the script was not ended by a requeue"
    assert not list((small_disk / "jobs").glob("*.tally")), "the disk was not full"


def test_controller_that_changes_over_is_asked_again(tmp_path: Path) -> None:
    once = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; echo 'Zero Bytes were transmitted' >&2; exit 1; }}"
    done = execute(tmp_path, mark("interrupted", signal="SIGTERM"), refusal=once)
    assert (done.status, done.asked, done.last[0]) == (KILLED, REQUEUED, "requeued")


def test_request_that_is_granted_without_effect_is_no_requeue(tmp_path: Path) -> None:
    ending = f"sed -i 's/JobState=[A-Z]*/JobState=COMPLETING/' {tmp_path}/job.txt; exit 0"
    done = execute(tmp_path, mark("interrupted", signal="SIGTERM"), refusal=ending)
    assert (done.status, done.asked, done.last[0]) == (1, [], "cancelled")
    assert "not requeued (it is ending; job 7 is COMPLETING)" in done.last[1]


def test_variables_of_another_launcher_or_job_do_not_reach_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DGT_LAUNCHER_PID"):
        monkeypatch.setenv(name, "7")
    execute(tmp_path, f"env > {tmp_path}/ranks; {mark('finished')}")
    found = dict(line.split("=", 1) for line in (tmp_path / "ranks").read_text().splitlines() if "=" in line)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DGT_LAUNCHER_PID"} & found.keys()
    assert found["MASTER_PORT"] != "7"


def test_lines_of_a_profile_cannot_keep_the_script_from_its_end(tmp_path: Path) -> None:
    done = execute(tmp_path, "exit 3", setup=["set -euo pipefail"])
    assert (done.status, done.asked, done.story[-2]["reason"]) == (KILLED, REQUEUED, "crash")


def test_node_that_cannot_run_the_launcher_gives_the_job_back(tmp_path: Path) -> None:
    done = execute(tmp_path, f"touch {tmp_path}/ranks_started", code=tmp_path / "nowhere")
    assert (done.status, done.asked) == (KILLED, REQUEUED)
    assert not (tmp_path / "ranks_started").exists()
    tired = execute(tmp_path, ":", restarts=10, code=tmp_path / "nowhere")
    assert (tired.status, tired.asked) == (1, [])


def test_attempt_claims_the_run(tmp_path: Path) -> None:
    execute(tmp_path, mark("finished"), restarts=3)
    assert runs.is_claimed_by(f"{tmp_path}/jobs/{TOKEN}.3")
    assert not runs.is_claimed_by(f"{tmp_path}/jobs/{TOKEN}.2")


def test_preemption_during_the_health_check_blames_no_node(tmp_path: Path) -> None:
    health = (
        f"{reports(tmp_path, n1=None)}; sed -i s/PreemptTime=None/PreemptTime=2026-01-02T01:00:00/ {tmp_path}/job.txt"
    )
    done = execute(tmp_path, f"touch {tmp_path}/ranks_started", health=health, nodes=FIVE_NODES)
    assert (done.status, done.asked, done.story[-2]["reason"]) == (KILLED, REQUEUED, "preempted")
    assert not (tmp_path / "ranks_started").exists()


def test_refused_requeue_is_said_and_fails(tmp_path: Path) -> None:
    done = execute(tmp_path, "exit 1", refusal=DISABLED)
    assert (done.status, done.asked) == (1, [])
    assert done.last[0] == "gave-up"
    assert "Requested operation is presently disabled" in done.last[1]


def test_attempt_that_vanished_is_noted_by_the_next_one(tmp_path: Path) -> None:
    events.note(tmp_path, "started", "attempt 0", job="7", token=TOKEN, attempt=0, nodes=["n1", "n2"])
    done = execute(tmp_path, mark("finished"), restarts=1)
    assert [(e["event"], e["attempt"]) for e in done.story[1:]] == [("stopped", 0), ("started", 1), ("finished", 1)]
    assert "preempted without grace, or killed, or its node failed" in done.story[1]["text"]


def test_attempt_that_was_preempted_without_grace_is_told_by_what_slurm_wrote_in_its_log(tmp_path: Path) -> None:
    title = "== attempt 0 of job 7 on n1,n2 ==\n"
    end = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-02T00:30:00 DUE TO PREEMPTION ***\n"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "batch.log").write_text(title + end)
    events.note(tmp_path, "started", "attempt 0", job="7", token=TOKEN, attempt=0, nodes=["n1", "n2"])
    done = execute(tmp_path, mark("finished"), restarts=1)
    assert (done.story[1]["reason"], done.story[1]["text"]) == (
        "preempted", "preempted, with no time to save; there is no checkpoint yet",
    )  # fmt: skip


def test_job_that_was_cancelled_before_it_could_say_so_is_noted_by_the_next_submission(tmp_path: Path) -> None:
    title = "== attempt 2 of job 6 on n1,n2 ==\n"
    end = "slurmstepd-n1: error: *** JOB 6 ON n1 CANCELLED AT 2026-01-01T00:30:00 ***\n"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "batch.log").write_text(title + end)
    before = {"token": "slurm-20260101-000000-ffff", "job": "6", "attempt": 2}
    events.note(tmp_path, "started", "attempt 2", nodes=["n1", "n2"], **before)
    events.note(tmp_path, "submitted", "again", job="7", token=TOKEN)
    done = execute(tmp_path, mark("finished"))
    assert [e["event"] for e in done.story[1:]] == ["submitted", "stopped", "started", "finished"]
    noted = done.story[2]
    assert {name: noted[name] for name in before} == before
    assert (noted["reason"], noted["text"]) == (
        "cancelled", "cancelled, with no time to save; there is no checkpoint yet",
    )  # fmt: skip
    assert len(execute(tmp_path, mark("finished"), restarts=1).story) == len(done.story), "it was noted twice"


def test_lost_node_of_an_attempt_that_vanished_is_named(tmp_path: Path) -> None:
    events.note(tmp_path, "started", "attempt 0", job="7", token=TOKEN, attempt=0, nodes=["n3", "n4"])
    done = execute(tmp_path, mark("finished"), restarts=1)
    assert (done.story[1]["reason"], done.story[1]["text"]) == (
        "node failure", "node n4 failed; there is no checkpoint yet",
    )  # fmt: skip


def test_save_that_was_cut_off_is_noted_by_the_next_attempt(tmp_path: Path) -> None:
    events.note(tmp_path, "started", "attempt 0", job="7", token=TOKEN, attempt=0, nodes=["n1", "n2"])
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / f"{TOKEN}.0.stopping").write_text('{"signal": "SIGTERM", "preempted": true}')
    done = execute(tmp_path, mark("finished"), restarts=1)
    assert done.story[1]["reason"] == "preempted"
    assert "ended while it saved, after SIGTERM; its time was too short for a save" in done.story[1]["text"]


def test_requeue_is_noted_and_starts_nothing_though_its_term_reaches_all_that_runs(tmp_path: Path) -> None:
    late, early = tmp_path / "late", tmp_path / "early"
    when, told = "2026-01-02T01:00:00", ["started", "stopped", "requeued"]
    done = execute(late, "exit 1", preempted=when, refusal="kill -TERM 0")
    assert (done.asked, [event["event"] for event in done.story]) == (REQUEUED, told)
    in_check = f"sed -i s/PreemptTime=None/PreemptTime={when}/ {early}/job.txt"
    done = execute(early, f"touch {early}/ranks_started", health=in_check, refusal="kill -TERM 0")
    assert (done.asked, [event["event"] for event in done.story]) == (REQUEUED, told)
    assert not (early / "ranks_started").exists()


def reports(run: Path, **why: str | None) -> str:
    """Shell that leaves reports of the health check: None is a healthy node, a text what is wrong."""
    lines = []
    for node, text in why.items():
        checks = [{"name": "gpu", "ok": text is None, "text": text or "fine", "seconds": 0.1}]
        report = json.dumps({"node": node, "ok": text is None, "checks": checks})
        lines.append(f"echo '{report}' > {run}/jobs/{TOKEN}.$SLURM_RESTART_COUNT.health/{node}.json")
    folder = f"mkdir -p {run}/jobs/{TOKEN}.${{SLURM_RESTART_COUNT:=0}}.health"
    return "; ".join([folder, *lines])


def test_healthy_nodes_start_the_ranks(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("finished"), health=reports(tmp_path, n1=None, n2=None))
    assert (done.status, done.last[0]) == (0, "finished")


def test_failing_and_silent_nodes_are_excluded_before_the_ranks_start(tmp_path: Path) -> None:
    failing = execute(
        tmp_path / "a",
        "touch $DGT_MARKER.ranks",
        health=reports(tmp_path / "a", n1=None, n2="driver gone"),
        nodes=FIVE_NODES,
    )
    assert failing.asked == [*REQUEUED, "update JobId=7 ExcNodeList=n1,n2"]
    assert failing.story[-1]["text"] == "node n2 is not used again: node n2 fails its health check: gpu: driver gone"
    assert not list((tmp_path / "a" / "jobs").glob("*.ranks"))
    silent = execute(tmp_path / "b", ":", health=reports(tmp_path / "b", n1=None), nodes=FIVE_NODES)
    assert "node n2 fails its health check: report: there is none: no answer" in silent.story[-1]["text"]


def test_health_check_that_fails_everywhere_alike_is_nobodys_nodes_fault(tmp_path: Path) -> None:
    done = execute(tmp_path, ":", health=reports(tmp_path, n1="8 GB free", n2="9 GB free"))
    assert (done.status, done.asked, done.last[0]) == (1, [], "gave-up")
    assert "all fail alike, so it is hardly the nodes" in done.last[1]


def test_node_is_not_excluded_where_too_few_are_left(tmp_path: Path) -> None:
    done = execute(tmp_path, ":", health=reports(tmp_path, n1=None, n2="sick"), nodes="n1 allocated\\nn2 allocated")
    assert (done.status, done.asked, done.last[0]) == (1, [], "gave-up")
    assert "too few others are left" in done.last[1]


def test_health_check_that_never_ends_finding_faults_is_doubted(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / f"{TOKEN}.tally").write_text('{"sick": 8}')
    done = execute(tmp_path, ":", health=reports(tmp_path, n1=None, n2="sick"), nodes=FIVE_NODES)
    assert (done.status, done.asked, done.last[0]) == (1, [], "gave-up")
    assert "that makes 9 times, so it is hardly the nodes" in done.last[1]


def test_health_check_without_any_report_judges_nobody(tmp_path: Path) -> None:
    done = execute(tmp_path, mark("finished"), health="exit 1")
    assert (done.status, done.last[0]) == (0, "finished")
    assert "left no report" in done.said


def test_watch_requeues_a_job_whose_time_is_all_but_over(tmp_path: Path) -> None:
    soon = subprocess.run(["date", "-u", "-d", "+16 seconds", "+%FT%T"], capture_output=True, text=True).stdout.strip()
    done = execute(tmp_path, "sleep 50", end=soon)
    assert (done.status, done.asked) == (KILLED, REQUEUED)
    assert done.story[-2]["reason"] == "time limit"
    assert done.story[-2]["text"] == "the time limit came before the ranks had saved; there is no checkpoint yet"
    assert "raise --signal-lead 90" in done.said
