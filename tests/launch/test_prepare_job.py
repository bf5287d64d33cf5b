"""Data preparation as a job array: what is refused, what Slurm is asked for, what a script decides, and a whole one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, wait_for
from PIL import Image

from data_pipeline.prepare import main as prepare
from launch import cluster, converter, prepare_here, prepare_job, profiles
from launch.local_slurm import LocalSlurm
from launch.prepare_job import PrepareJob
from launch.profiles import Profile
from launch.runs import LaunchError
from launch.signals import Noted

SHARDS_OF_TWO = ("--shard-size", "2")
CONVERTER_PROGRAM = str(REPOSITORY / "launch" / "converter.py")


PARTITION = "PartitionName=cpu AllowQos=ALL Default=YES QoS=N/A MaxNodes=4 MaxTime=8:00:00 State=UP TotalNodes=1"


@pytest.fixture(autouse=True)
def partitions(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Slurm that knows one partition, with a node of eight cores, where a test does not use the real one."""
    if "slurm" in request.fixturenames:
        return
    folder = tmp_path / "partitions"
    folder.mkdir()
    for name, text in (("scontrol", PARTITION), ("sinfo", "n1|8|64000|(null)|(null)")):
        (folder / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_TIMELIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 images to train on and 4 held out: 6 and 2 shards of two."""
    noise = np.random.Generator(np.random.PCG64(0))
    for split, images in (("train", 6), ("val", 2)):
        for name in ("bird", "cat"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = noise.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "source"


def typed(source: Path, out: Path, *more: str) -> list[str]:
    """The converter's command line."""
    return ["imagefolder", "--src", str(source), "--out", str(out), *SHARDS_OF_TWO, *more]


def job(folder: Path, *more: str, parts: int = 16) -> PrepareJob:
    """What is asked for where nothing is executed."""
    (folder / "raw").mkdir(exist_ok=True)
    return prepare_job.parse(typed(folder / "raw", folder / "set", *more), parts)


def profile(**values: object) -> Profile:
    """The generic profile, with other values."""
    return profiles.load("generic", values)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_one_run(source: Path) -> dict[str, bytes]:
    """What one run of the converter makes."""
    out = source.parent / "whole"
    assert prepare(typed(source, out, "--jobs", "1")) in (0, 3)
    return contents(out)


def test_command_line_is_understood_as_the_converters_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = prepare_job.parse(["--", "imagenet", "--src", "raw", "--out", "data/../in1k", "--jobs", "3"], 4)
    assert found.arguments == ("imagenet", "--src", "raw", "--out", "data/../in1k", "--jobs", "3")
    assert (found.out, found.folder) == (tmp_path / "in1k", tmp_path / "in1k.prepare")
    assert (found.parts, found.source, found.processes) == (4, Path("raw"), 3)
    made = prepare_job.parse(["synthetic", "--out", "x", "--images", "8"], 1)
    assert (made.source, made.processes) == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "parts", "words"),
    [
        ([], 2, "prepare: the following arguments are required: CONVERTER"),
        (["imagenet", "--src", "a"], 2, "prepare imagenet: the following arguments are required: --out"),
        (["imagenet", "--src", "a", "--out", "b", "--qualty", "3"], 2, "unrecognized arguments: --qualty 3"),
        (["imagenet", "--src", "a", "--out", "b", "--quality", "3"], 2, "--quality is that of images made smaller by"),
        (["imagenet", "--src", "a", "--out", "b", "--part", "1/2"], 2, "--part and --merge are given to the jobs"),
        (["imagenet", "--src", "a", "--out", "b", "--merge"], 2, "--part and --merge are given to the jobs"),
        (["imagenet", "--src", "a", "--out", "b", "--format", "ffcv"], 2, "cannot be divided into parts: run `python"),
        (["imagenet", "--src", "a", "--out", "b"], 0, "--parts must be 1 to 999,999, got 0"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: list[str], parts: int, words: str) -> None:
    with pytest.raises(LaunchError) as refusal:
        prepare_job.parse(arguments, parts)
    assert words in str(refusal.value)


def test_help_of_a_converter_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        prepare_job.parse(["imagefolder", "--help"], 2)
    assert end.value.code == 0
    assert "usage: python -m data_pipeline.prepare imagefolder" in capsys.readouterr().out


def test_what_would_fail_in_every_part_is_found_before(tmp_path: Path) -> None:
    assert prepare_job.problems(job(tmp_path)) == []
    out = tmp_path / "set"
    (out / ".progress").mkdir(parents=True)
    (out / ".progress" / "parts.json").write_text('{"parts": 4}')
    (out / "prepare.json").write_text("{}")
    (divided,) = prepare_job.problems(job(tmp_path))
    assert divided.startswith(f"the work on {out} was divided into 4 parts, not 16: give --parts 4, or delete")
    assert prepare_job.problems(job(tmp_path, parts=4)) == []
    (out / "prepare.json").unlink()
    (foreign,) = prepare_job.problems(job(tmp_path, parts=4))
    assert foreign.startswith(f"--out {out} is not empty")


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("nowhere", "set", "nowhere: there is no such file or folder"),
        ("raw", "raw/set", "lies inside --src"),
        ("raw", "50%", "Slurm reads the % as a pattern"),
    ],
)
def test_places_that_cannot_be_used_are_named(tmp_path: Path, source: str, out: str, words: str) -> None:
    (tmp_path / "raw").mkdir()
    work = prepare_job.parse(typed(tmp_path / source, tmp_path / out), 2)
    (problem,) = prepare_job.problems(work)
    assert words in problem
    with pytest.raises(LaunchError, match=words):
        prepare_job.submit(work, profile())


def scripts(work: PrepareJob, asked: Profile) -> list[str]:
    """The array's script and the merge's, as a dry run shows them."""
    shown = prepare_job.show(work, asked)
    assert f"==== prepare-{work.out.name} ====\n#!" in shown
    return ["#!" + text.rpartition("\n====")[0] for text in f"{shown}\n====".split("#!")[1:]]


def options(text: str) -> set[str]:
    """What follows #SBATCH."""
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def started(text: str) -> str:
    """The line that starts the converter."""
    return next(line for line in text.splitlines() if line.endswith(" &"))


def test_dry_run_shows_both_scripts_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work, logs = job(tmp_path, "--max-size", "300"), tmp_path / "set.prepare" / "logs"
    parts, merge = scripts(work, profile(partition="cpu", cpus_per_task=8, time="4:00:00", after=["7"]))
    both = {
        "--nodes=1", "--ntasks-per-node=1", "--partition=cpu", "--time=4:00:00", "--comment=TOKEN", "--requeue",
        "--open-mode=append", "--signal=B:USR2@60", f"--chdir={tmp_path}", "--kill-on-invalid-dep=yes",
    }  # fmt: skip
    assert options(parts) == both | {
        "--array=1-16", "--cpus-per-task=8", f"--output={logs}/part-%a.log", "--dependency=afterok:7",
        "--job-name=prepare-set",
    }  # fmt: skip
    assert options(merge) == both | {
        "--cpus-per-task=1", f"--output={logs}/merge.log", "--dependency=afterok:ARRAY", "--job-name=merge-set",
    }  # fmt: skip
    code = f"{work.folder}/code/DIGEST/launch/converter.py imagefolder"
    given = f"--src {tmp_path}/raw --out {tmp_path}/set --shard-size 2 --max-size 300 &"
    assert started(parts).endswith(f' {code} --jobs 8 --part "$SLURM_ARRAY_TASK_ID/16" {given}')
    assert started(merge).endswith(f" {code} --merge {given}")
    assert not work.folder.exists()
    assert not work.out.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partition": "gpu"}, "partition gpu does not exist in this Slurm; did you mean cpu?"),
        ({"time": "9:00:00"}, "partition cpu allows at most 8:00:00"),
        ({"cpus_per_task": 9}, "partition cpu: nodes that have 9 CPUs or more (1 process x 9): 0 of 1"),
    ],
)
def test_part_that_no_partition_would_run_is_refused(tmp_path: Path, values: dict[str, object], words: str) -> None:
    asked = profile(**values)
    assert f"problem: {words}" in prepare_job.show(job(tmp_path), asked)
    with pytest.raises(LaunchError, match=re.escape(words)):
        prepare_job.submit(job(tmp_path), asked)
    assert not (tmp_path / "set.prepare").exists()


def test_array_is_asked_for_a_node_a_part_however_many_parts_there_are(tmp_path: Path) -> None:
    assert "problem" not in prepare_job.show(job(tmp_path, parts=500), profile(cpus_per_task=8)), "there is one node"


def test_what_a_profile_asks_of_gpu_nodes_is_not_asked_for_parts(tmp_path: Path) -> None:
    of_cluster = profile(mem="1T", constraint="h100", partition="cpu", account="a")
    asked = prepare_job.for_parts(of_cluster, {"mem": None, "constraint": None, "partition": None, "config": "x"})
    assert (asked.mem, asked.constraint, asked.partition, asked.account) == (None, None, "cpu", "a")
    assert not {word for word in options(scripts(job(tmp_path), asked)[0]) if "mem" in word or "constraint" in word}
    typed_too = prepare_job.for_parts(profile(mem="16G", constraint="fast"), {"mem": "16G", "constraint": "fast"})
    assert (typed_too.mem, typed_too.constraint) == ("16G", "fast")


def test_number_of_processes_is_typed_or_of_the_profile_or_what_slurm_gives(tmp_path: Path) -> None:
    parts = scripts(job(tmp_path, "--jobs", "3"), profile())[0]
    words = shlex.split(started(parts).replace("${SLURM_CPUS_ON_NODE:-1}", "5").replace("$SLURM_ARRAY_TASK_ID", "2"))
    understood = prepare_job.understood(words[2:-1])
    assert (understood.jobs, str(understood.part)) == (3, "2/16")
    assert words[2:5] == ["imagefolder", "--jobs", "5"]


def test_profile_adds_environment_container_and_other_options(tmp_path: Path) -> None:
    asked = profile(
        environment={"TMPDIR": "/a b"}, modules=["jpeg"], setup=["ulimit -n 4096"], sbatch={"licenses": "x"},
        container="img.sif", container_command="apptainer exec {image}", reservation="r",
    )  # fmt: skip
    for text in scripts(job(tmp_path), asked):
        lines = text.splitlines()
        first = lines.index("export TMPDIR='/a b'")
        assert lines[first : first + 3] == ["export TMPDIR='/a b'", "module load jpeg", "ulimit -n 4096"]
        assert started(text).startswith(f"apptainer exec img.sif python3 {tmp_path}/set.prepare/code/")
        assert {"--licenses=x", "--reservation=r"} <= options(text)
    pyxis = profile(container="img", srun=["--container-image={image}"], container_python="py")
    assert started(scripts(job(tmp_path), pyxis)[0]).startswith("srun --ntasks=1 --container-image=img py ")


def test_dry_run_on_this_machine_shows_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "cores", lambda: 8)
    shown = prepare_here.show(job(tmp_path, parts=3))
    assert "I = 1 to 3, 3 at once:" in shown
    assert "imagefolder --jobs 2 --part I/3 --src" in shown
    assert "imagefolder --merge --src" in shown
    assert "I = 1 to 16, 2 at once:" in prepare_here.show(job(tmp_path, "--jobs", "4"))


CONVERTER = """\
import os, sys
os.environ["ARGUMENTS"] = " ".join(sys.argv[1:])
os.execvp("bash", ["bash", "-c", {act!r}])
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then
  echo "JobId=12 JobState=$([ -e {folder}/refuse ] && echo COMPLETING || echo RUNNING) Restarts=0" \
    "StartTime=2026-01-02T00:00:00 PreemptTime=$([ "$SLURM_TIME_FORMAT" = standard ] && echo {preempted}) EndTime=x"
  exit
fi
echo "$*" >> {folder}/requeues
if [ -e {folder}/refuse ]; then echo "Job is being cancelled" >&2; exit 1; fi
kill -TERM -- -$(ps -o pgid= $$ | tr -d ' ')  # as Slurm ends the script of a job that it requeues, and its children
"""


def execute(folder: Path, act: str, preempted: str = "None", merge: bool = False) -> tuple[int, list[str], str]:
    """Runs a script with a converter that does `act`, at most one retry, and a Slurm that says `preempted`.

    Returns its status, what was asked of `scontrol`, and what it printed.
    """
    work, asked = job(folder), profile(max_retries=1)
    step = prepare_job.merge_step(work, "12") if merge else prepare_job.array_step(work, asked)
    for name, text in (
        ("code/launch/converter.py", CONVERTER.format(act=act)),
        ("bin/scontrol", SCONTROL.format(folder=folder, preempted=preempted)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin" / "scontrol").chmod(0o755)
    for name in ("requeue", "cluster", "runs", "__init__"):  # what the script calls is real
        shutil.copy(REPOSITORY / "launch" / f"{name}.py", folder / "code" / "launch")
    (work.folder / "jobs").mkdir(parents=True, exist_ok=True)
    parameters = prepare_job.asked(work, asked, step, folder / "code", "TOKEN")
    executor = prepare_job.batch_script.executor(work.folder, parameters)
    script = executor._make_submission_file_text(prepare_job.command(work, asked, step, folder / "code"), "")
    variables = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1"}
    # the last element of an array has the array's own number as its SLURM_JOB_ID
    variables |= {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | variables, capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    requeues = folder / "requeues"
    return done.returncode, requeues.read_text().splitlines() if requeues.exists() else [], done.stdout


REQUEUED = ["requeue Incomplete 12_3"]
FINISH_A_SHARD = "echo shard-000002.idx >> $DGT_FINISHED_SHARDS; "
SHARD_OF_ANOTHER_PART = "mkdir -p {folder}/set/train; touch {folder}/set/train/shard-000000.idx; "
TIME_LIMIT = "kill -USR2 $PPID; exec sleep 60"


def test_element_makes_its_part_and_ends_well(tmp_path: Path) -> None:
    status, requeues, said = execute(tmp_path, 'echo "converter $ARGUMENTS"')
    assert (status, requeues) == (0, [])
    assert "converter imagefolder --jobs 1 --part 3/16 --src" in said
    assert "part-3: attempt 0 of job 12_3 on n1" in said
    assert "part-3: done" in said


def test_merge_that_leaves_images_out_has_not_failed(tmp_path: Path) -> None:
    status, requeues, said = execute(tmp_path, "exit 3", merge=True)
    assert (status, requeues) == (0, [])
    assert f"merge: done; some images could not be read and are left out, see {tmp_path}/set/left_out.jsonl" in said


def test_arguments_that_the_converter_refuses_are_not_tried_again(tmp_path: Path) -> None:
    assert execute(tmp_path, f"exit {converter.WRONG_USAGE}")[:2] == (2, [])


def test_program_that_python_cannot_open_is_tried_again(tmp_path: Path) -> None:
    assert execute(tmp_path, f"exec {sys.executable} /nowhere/converter.py")[1] == REQUEUED, "its status is 2, too"


def test_program_ends_otherwise_than_python_where_the_converter_refuses_its_arguments(source: Path) -> None:
    def status(*words: str) -> int:
        return subprocess.run([sys.executable, CONVERTER_PROGRAM, *words], capture_output=True).returncode

    assert status("imagefolder", "--nonsense") == converter.WRONG_USAGE
    assert status("imagefolder", "--help") == 0
    assert status(*typed(source / "nowhere", source.parent / "set")) == 1


def test_killed_element_alone_is_requeued_a_bounded_number_of_times(tmp_path: Path) -> None:
    status, requeues, said = execute(tmp_path, "kill -9 $$")
    assert (status, requeues) == (-15, REQUEUED)
    assert "part-3 failed with status 137 (failure 1, of which 1 are followed by another attempt)" in said
    status, requeues, said = execute(tmp_path, "exit 1")
    assert (status, requeues) == (1, REQUEUED), "the second failure was requeued too"
    assert "part-3 failed with status 1; giving up after 2 failures" in said


def test_failed_merge_is_requeued_under_its_own_number(tmp_path: Path) -> None:
    assert execute(tmp_path, "exit 1", merge=True)[:2] == (-15, ["requeue Incomplete 12"])


def test_preemption_is_no_failure(tmp_path: Path) -> None:
    _, requeues, said = execute(tmp_path, "exit 143", preempted="2026-01-02T01:00:00")
    assert requeues == REQUEUED
    assert "part-3 was preempted: asking for a requeue" in said
    assert not list((tmp_path / "set.prepare" / "jobs").iterdir())


def test_preemption_of_an_earlier_attempt_excuses_no_failure(tmp_path: Path) -> None:
    execute(tmp_path, "exit 1", preempted="2026-01-01T23:00:00")
    assert (tmp_path / "set.prepare" / "jobs" / "TOKEN.part-3.crashes").read_text() == "1\n"


def crashes(folder: Path) -> str | None:
    """What is remembered of the failures of part 3."""
    path = folder / "set.prepare" / "jobs" / "TOKEN.part-3.crashes"
    return path.read_text() if path.exists() else None


def test_time_limit_stops_the_converter_and_is_no_failure_where_a_shard_was_finished(tmp_path: Path) -> None:
    execute(tmp_path, "exit 1")
    assert crashes(tmp_path) == "1\n"
    status, requeues, said = execute(tmp_path, FINISH_A_SHARD + TIME_LIMIT)
    assert (status, requeues) == (-15, REQUEUED * 2)
    assert "part-3 stopped before its time limit: asking for a requeue" in said
    assert crashes(tmp_path) is None, "the failure before counts no more"


def test_failures_count_from_the_last_shard_on(tmp_path: Path) -> None:
    for attempt in range(3):
        status, requeues, said = execute(tmp_path, FINISH_A_SHARD + "exit 1")
        assert (status, len(requeues)) == (-15, attempt + 1)
        assert "part-3 failed with status 1 (failure 1, of which 1" in said
    assert execute(tmp_path, "exit 1")[0] == 1, "the second in a row without a shard"


def test_time_limit_too_short_for_a_shard_is_given_up(tmp_path: Path) -> None:
    act = SHARD_OF_ANOTHER_PART.format(folder=tmp_path) + TIME_LIMIT
    assert execute(tmp_path, act)[1] == REQUEUED
    status, requeues, said = execute(tmp_path, act)
    assert (status, requeues) == (1, REQUEUED)
    assert "stopped before its time limit, without a finished shard; giving up after 2 failures" in said


@pytest.mark.parametrize("processes", ["1", "2"])
def test_converter_notes_the_shards_of_its_own_part_as_it_finishes_them(source: Path, processes: str) -> None:
    noted, out = source.parent / "noted", source.parent / "set"
    command = [sys.executable, CONVERTER_PROGRAM, *typed(source, out, "--jobs", processes, "--part", "2/3")]
    environment = os.environ | {converter.FINISHED_VARIABLE: str(noted)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    finished = sorted(Path(line) for line in noted.read_text().splitlines())
    assert finished == sorted(out.glob("*/*.idx"))
    assert len(finished) == 3
    noted.unlink()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert not noted.exists(), "all shards were kept"


def test_converter_that_ends_well_after_the_signal_is_done(tmp_path: Path) -> None:
    assert execute(tmp_path, "trap 'exit 0' TERM; kill -USR2 $PPID; while :; do sleep 0.01; done")[:2] == (0, [])


def test_refused_requeue_ends_the_element_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    status, requeues, said = execute(tmp_path, "exit 1")
    assert (status, requeues) == (1, REQUEUED)
    assert "not requeued: Job is being cancelled; submit again to go on" in said


SBATCH = """#!/bin/bash
echo sbatch "$(grep -oP '(?<=--job-name=).*' "$1")" "$(grep -oP '(?<="token": ")[^"]*' {record})" >> {calls}
if [ -e {folder}/refuse-merge ] && grep -q job-name=merge "$1"; then echo "QOS limit" >&2; exit 1; fi
echo "Submitted batch job $((40 + $(wc -l < {calls})))"
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as scripts that write what they are asked to `calls`; squeue shows the file `queue`."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    record = tmp_path / "set.prepare" / prepare_job.RECORD_FILE
    for name, text in (
        ("sbatch", SBATCH.format(folder=tmp_path, calls=calls, record=record)),
        ("scancel", f'#!/bin/bash\necho scancel "$@" >> {calls}\n'),
        ("squeue", f"#!/bin/bash\ncat {tmp_path}/queue 2>/dev/null || true\n"),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return calls


def test_submission_records_itself_first_and_says_what_can_follow(
    fake_slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job(tmp_path)
    assert prepare_job.submit(work, profile()) == ("41", "42")
    record = json.loads((work.folder / prepare_job.RECORD_FILE).read_text())
    assert (record["array"], record["merge"], record["parts"]) == ("41", "42", 16)
    calls = fake_slurm.read_text()
    assert [line.split()[1] for line in calls.splitlines() if line.startswith("sbatch")] == ["prepare-set", "merge-set"]
    assert calls.count(record["token"]) == 2, "sbatch was called before the token was recorded"
    (code,) = (work.folder / "code").iterdir()
    assert f"--comment={record['token']}" in (text := (work.folder / "jobs" / "42_submission.sh").read_text())
    assert str(code / "launch" / "converter.py") in text
    assert "--dependency=afterok:41" in text
    printed = capsys.readouterr().out
    assert "job array 41 makes 16 parts, job 42 merges them" in printed
    assert f"{work.folder}/logs (part-*.log, merge.log)" in printed
    assert f"launch/submit.py --config FILE data.path={work.out} --after 42" in printed


def test_active_preparation_is_not_submitted_again_but_an_ended_one_is(fake_slurm: Path, tmp_path: Path) -> None:
    work = job(tmp_path)
    prepare_job.submit(work, profile())
    token = json.loads((work.folder / prepare_job.RECORD_FILE).read_text())["token"]
    entries = [
        ("41_1", "COMPLETED", token),
        ("41_2", "RUNNING", token),
        ("42", "PENDING", token),
        ("9", "RUNNING", "x"),
    ]
    (tmp_path / "queue").write_text("".join(f"{n}|{state}|None|n1|N/A|{comment}\n" for n, state, comment in entries))
    for start in (lambda: prepare_job.submit(work, profile()), lambda: prepare_here.run(work)):
        with pytest.raises(LaunchError, match="is being prepared: Slurm job 41_2 and 1 more"):
            start()
    (tmp_path / "queue").write_text("")
    assert prepare_job.submit(work, profile()) == ("43", "44")


@pytest.mark.parametrize(
    ("number", "comment", "active"),
    [
        ("41_[2-16]", "project:vision", True),
        ("42", "", True),
        ("43", "project:vision", False),
        ("42", "slurm-20260101-000000-abcd", False),
    ],
)
def test_job_is_known_by_its_number_where_the_cluster_has_a_comment_of_its_own(
    fake_slurm: Path, tmp_path: Path, number: str, comment: str, active: bool
) -> None:
    work = job(tmp_path)
    prepare_job.submit(work, profile())
    (tmp_path / "queue").write_text(f"{number}|PENDING|None||N/A|{comment}\n")
    if active:
        with pytest.raises(LaunchError, match=re.escape(f"is being prepared: Slurm job {number}. Wait")):
            prepare_job.submit(work, profile())
    else:
        assert prepare_job.submit(work, profile()) == ("43", "44")


def test_refused_merge_takes_the_parts_with_it(fake_slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "refuse-merge").touch()
    with pytest.raises(LaunchError, match=r"merge was refused, so the parts \(job 41\) are cancelled: .*QOS limit"):
        prepare_job.submit(job(tmp_path), profile())
    assert fake_slurm.read_text().splitlines()[-1] == "scancel 41"


def test_this_machine_makes_the_bytes_of_one_run(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (source / "train" / "cat" / "1.jpg").write_bytes(b"no image")
    whole = in_one_run(source)
    work = prepare_job.parse(typed(source, source.parent / "set"), 3)
    assert prepare_here.run(work) == 3, "an image was left out"
    assert contents(work.out) == whole
    shown = capfd.readouterr()
    assert [f"part-{number} is done" in shown.err for number in (1, 2, 3)] == [True] * 3
    assert "merge is done; some images are left out" in shown.err
    assert "train: 11 images" in shown.out, "the merge's summary was not shown"
    assert "part 2/3: " in (work.folder / "logs" / "part-2.log").read_text()


def test_failed_part_on_this_machine_is_retried_as_often_as_allowed_and_never_merged(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (source / "val" / "cat" / "1.jpg").write_bytes(b"no image")
    work = prepare_job.parse(typed(source, source.parent / "set", "--on-error", "stop"), 2)
    assert prepare_here.run(work, max_retries=1) == 1
    assert not (work.out / "index.json").exists()
    printed = capfd.readouterr()
    assert printed.err.count("ended with status 1") == 2
    assert "1.jpg" in printed.err, "the end of the log was not shown"
    assert "merge" not in printed.err


def test_signal_ends_the_processes_and_starts_no_more(capfd: pytest.CaptureFixture[str]) -> None:
    noted, begun = Noted(), list[str]()

    def start(work: str) -> subprocess.Popen[bytes]:
        begun.append(work)
        process = subprocess.Popen(["sleep", "60"], start_new_session=True)
        if work == "b":
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    noted.install()
    try:
        failed = prepare_here.Crew(start, 2, 5, noted).work_off("abcd")
    finally:
        noted.restore()
    assert begun == ["a", "b"]
    assert failed == {"a": -signal.SIGINT, "b": -signal.SIGINT}
    assert "a was ended by SIGINT" in capfd.readouterr().err


KILLED_ONCE = """\
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("shard-000004.idx"):
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("SLURM_ARRAY_TASK_ID") == "2" and "SLURM_RESTART_COUNT" not in os.environ:
    sys.addaudithook(hook)
"""


@pytest.mark.slurm
def test_slurm_makes_the_bytes_of_one_run_though_an_element_is_killed(slurm: LocalSlurm, source: Path) -> None:
    (source.parent / "hook").mkdir()
    (source.parent / "hook" / "sitecustomize.py").write_text(KILLED_ONCE)
    work = prepare_job.parse(typed(source, source.parent / "set"), 3)
    asked = profile(partition="low", cpus_per_task=1, environment={"PYTHONPATH": str(source.parent / "hook")})
    array, merge = prepare_job.submit(work, asked)
    with pytest.raises(LaunchError, match="is being prepared"):
        prepare_job.submit(work, asked)
    wait_for(lambda: slurm.job(merge)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the merge's end")
    logs = {path.stem: path.read_text() for path in (work.folder / "logs").iterdir()}
    assert slurm.job(merge)["JobState"] == "COMPLETED", logs
    assert [slurm.job(f"{array}_{part}").get("Restarts") for part in (1, 2, 3)] == ["0", "1", "0"]
    assert "part-2 failed with status 137 (failure 1" in logs["part-2"]
    assert "2 shards written, 1 kept" in logs["part-2"]
    assert contents(work.out) == in_one_run(source)
