"""Data preparation on a cluster: a converter of data_pipeline.prepare as a job array, and a merge after it.

    OUT.prepare/                   beside the folder OUT that is made, which holds what the converter writes and no more
        run.lock                   held (flock) during a submission, and while this machine makes the parts
        prepare_job.json           the last submission: its token, the numbers of its jobs, what was asked for
        code/DIGEST/               the code that the jobs run, see launch/snapshot.py
        jobs/NUMBER_submission.sh  what sbatch was given
        jobs/TOKEN.part-3.crashes  how often that part failed since it last finished a shard
        jobs/TOKEN.part-3.shards   a line for each shard that its present attempt has finished
        logs/part-3.log            appended by every attempt, as is logs/merge.log

Every element of the array makes one part. It may be ended at any moment: finished shards stay, and the next attempt
makes the others. An element that was preempted or met its time limit asks to be requeued; one that failed does so a
bounded number of times in a row without a finished shard of its own. The merge waits until all parts have ended well.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import batch_script, cluster, runs, slurm_queue, snapshot
from launch.layout import Layout, count
from launch.runs import LaunchError

if TYPE_CHECKING:
    from argparse import Namespace

    from launch.profiles import Profile

CONVERTERS = "python -m data_pipeline.prepare"
RECORD_FILE = "prepare_job.json"
SIGNAL_LEAD = 60
"""Seconds before the time limit at which an element stops to be requeued, which needs the controller, not a save."""
MOST_PARTS = 999_999
"""As of --part."""

BEFORE = r"""
say() { echo "$(date '+%F %T')  $*"; }
say "$work: attempt ${SLURM_RESTART_COUNT:-0} of job $number on $SLURM_JOB_NODELIST"
export DGT_FINISHED_SHARDS=$folder/jobs/$token.$work.shards
rm -f "$DGT_FINISHED_SHARDS"
converter= stopped=
trap 'stopped=yes; [ -z "$converter" ] || kill "$converter" 2>/dev/null' USR2  # the time limit is near
"""

AFTER = r"""
converter=$!
[ -z "$stopped" ] || kill "$converter" 2>/dev/null
wait "$converter"
status=$?
if [ "$status" -gt 128 ] && [ -n "$stopped" ]; then wait "$converter"; status=$?; fi  # it ended the waiting
crashes_file=$folder/jobs/$token.$work.crashes
field() { env -u SLURM_CLUSTERS SLURM_TIME_FORMAT=standard scontrol show job "$number" 2>/dev/null \
  | grep -oP "(?<=\b$1=)\S+"; }
requeue() {
  say "$work $1: asking for a requeue; finished shards are kept"
  "$python" "$code/launch/requeue.py" "$number"  # Slurm ends this script meanwhile
  exit 1
}
case $status in
  0) say "$work: done"; exit 0 ;;
  64) say "$work: the converter does not take these arguments, see above"; exit 2 ;;
  3) say "$work: done; some images could not be read and are left out, see $out/left_out.jsonl"; exit 0 ;;
esac
preempted=$(field PreemptTime)
if [[ "$preempted" == [0-9]* && ! "$preempted" < "$(field StartTime)" ]]; then requeue "was preempted"; fi
if [ -s "$DGT_FINISHED_SHARDS" ]; then
  rm -f "$crashes_file"
  if [ -n "$stopped" ]; then requeue "stopped before its time limit"; fi
fi
why="failed with status $status"
if [ -n "$stopped" ]; then why="stopped before its time limit, without a finished shard"; fi
crashes=$(($(cat "$crashes_file" 2>/dev/null || echo 0) + 1))
echo "$crashes" > "$crashes_file"
if [ "$crashes" -gt "$max_retries" ]; then
  say "$work $why; giving up after $crashes failures. Once the cause is mended, submit again: finished shards are kept"
  exit 1
fi
requeue "$why (failure $crashes, of which $max_retries are followed by another attempt)"
"""


@dataclass(frozen=True)
class PrepareJob:
    """A command line of the converters, divided into parts."""

    arguments: tuple[str, ...]
    """Of `python -m data_pipeline.prepare`; relative paths start in the present folder."""
    parts: int
    source: Path | None
    """What is read, where the converter reads anything."""
    out: Path
    """The folder that is made, absolute."""
    processes: int
    """Of one part on this machine: --jobs where it was given, else 1."""

    @property
    def folder(self) -> Path:
        """Where the jobs' code, scripts and logs are."""
        return self.out.parent / f"{self.out.name}.prepare"


@dataclass(frozen=True)
class Step:
    """One of the two Slurm jobs."""

    work: str
    """Its name in logs and files; as all texts here for the shell, which knows the array's element."""
    number: str
    """Slurm's number. For an element, one that does not stand for the whole array, as SLURM_JOB_ID can."""
    own: str
    """Arguments of the converter beside those that were typed."""
    log: str
    """File name, with Slurm's patterns."""
    name: str
    cpus: int | None
    options: dict[str, Any]
    """Further options of sbatch."""


def parse(arguments: Sequence[str], parts: int) -> PrepareJob:
    """The job for a command line of the converters. Raises LaunchError for one that they or the parts do not allow."""
    from data_pipeline.prepare import options

    words = [str(word) for word in arguments]
    if words[:1] == ["--"]:
        words = words[1:]
    parsed = understood(words)
    if parsed.part or parsed.merge:
        raise LaunchError("--part and --merge are given to the jobs by --prepare; leave them out")
    if not 1 <= parts <= MOST_PARTS:
        raise LaunchError(f"--parts must be 1 to {MOST_PARTS:,}, got {parts}")
    if parsed.format == "ffcv":
        raise LaunchError(
            "--format ffcv makes one file per split, and its work cannot be divided into parts: run "
            f"`{CONVERTERS} {words[0]} ...` itself, in one job"
        )
    try:
        options.from_arguments(parsed)
    except ValueError as error:
        raise LaunchError(f"{CONVERTERS}: {error}") from None
    source = getattr(parsed, "src", None)
    out = Path(os.path.abspath(parsed.out))
    return PrepareJob(tuple(words), parts, source, out, understood([words[0], "--jobs", "1", *words[1:]]).jobs)


def understood(words: list[str]) -> Namespace:
    """What the converters' own parser makes of the words. Raises LaunchError with its complaint."""
    from data_pipeline.prepare import cli

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return cli.parser().parse_args(words)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        program, _, reason = complaint.getvalue().rstrip("\n").rpartition("\n")[2].partition(": error: ")
        raise LaunchError(f"{program}: {reason}") from None


def problems(job: PrepareJob) -> list[str]:
    """What stands against starting the job, one sentence each; the parts would fail for it one by one."""
    from data_pipeline.prepare import parts

    found = []
    if job.source is not None and not job.source.exists():
        found.append(f"--src {job.source}: there is no such file or folder")
    elif job.source is not None and job.source.resolve() in (job.out.resolve(), *job.out.resolve().parents):
        found.append(f"--out {job.out} lies inside --src {job.source}; choose a folder outside of it")
    if "%" in str(job.out):
        found.append(f"--out {job.out}: Slurm reads the % as a pattern; choose another folder")
    if job.out.is_dir() and any(job.out.iterdir()) and not (job.out / "prepare.json").exists():
        found.append(f"--out {job.out} is not empty, and no converter made what it holds; choose a new folder")
    there = next(path for path in (job.folder, *job.folder.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        found.append(f"{there} cannot be written; --out and {job.folder.name} beside it are made there")
    divided = parts.number_of_parts(job.out)
    if divided not in (None, job.parts):
        found.append(
            f"the work on {job.out} was divided into {divided} parts, not {job.parts}: give --parts {divided}, or "
            f"delete {job.out / '.progress'} to divide it anew (shards that are there are looked at again)"
        )
    return found


def for_parts(profile: Profile, typed: Mapping[str, Any]) -> Profile:
    """The profile as parts want it: its `mem` and `constraint` are meant for GPU nodes, and only those `typed` count.

    `typed`: options of the command line by their names in the profile, None where they were not given.
    """
    return replace(profile, mem=typed.get("mem"), constraint=typed.get("constraint"))


def refused_by_slurm(profile: Profile) -> list[str]:
    """Why no partition would run a part, one sentence; empty where one would, or where there is no Slurm to ask."""
    from launch import limits

    if shutil.which("scontrol") is None:  # a dry run needs no Slurm
        return []
    try:
        limits.partition(Layout("slurm", 1, 1, use_gpus=False), profile)
    except LaunchError as error:
        return [str(error)]
    return []


def show(job: PrepareJob, profile: Profile) -> str:
    """Both batch scripts as they would be submitted, and what stands against it; needs no Slurm, and writes nothing."""
    code = job.folder / "code" / "DIGEST"
    shown = [described(job)]
    for step in (array_step(job, profile), merge_step(job, "ARRAY")):
        executor = batch_script.executor(job.folder, asked(job, profile, step, code, "TOKEN"))
        text = executor._make_submission_file_text(command(job, profile, step, code), "")
        shown.append(f"==== {step.name} ====\n{text}\n")
    return "\n".join([*shown, *(f"problem: {problem}" for problem in problems(job) + refused_by_slurm(profile))])


def described(job: PrepareJob) -> str:
    """The job in a sentence."""
    return f"{job.out}: {count(job.parts, 'part')}, then a merge; code, scripts and logs in {job.folder}"


def submit(job: PrepareJob, profile: Profile) -> tuple[str, str]:
    """Submits the array and the merge, and says where to look; returns both jobs' numbers.

    The token is noted before Slurm hears of it: where this program dies in between, the next one finds the jobs in the
    queue by their comment. Raises LaunchError where an earlier submission is active, or where Slurm refuses.
    """
    refuse(problems(job) + refused_by_slurm(profile))
    token = runs.new_token("slurm")
    with runs.locked(job.folder):
        not_active(job)
        code = take_snapshot(job)
        note(job, token)
        array = send(job, profile, array_step(job, profile), code, token)
        try:
            merge = send(job, profile, merge_step(job, array), code, token)
        except LaunchError as error:
            cluster.ask("scancel", array)
            raise LaunchError(f"the merge was refused, so the parts (job {array}) are cancelled: {error}") from None
        note(job, token, array, merge)
    print(f"{job.out}: Slurm job array {array} makes {count(job.parts, 'part')}, job {merge} merges them")
    print(f"  logs    {job.folder / 'logs'} (part-*.log, merge.log)")
    print(f"  state   squeue --jobs={array},{merge}")
    print(f"  stop    scancel {array} {merge}; the same command goes on: finished shards are kept")
    print(f"  train   python launch/submit.py --config FILE data.path={shlex.quote(str(job.out))} --after {merge}")
    return array, merge


def send(job: PrepareJob, profile: Profile, step: Step, code: Path, token: str) -> str:
    """Submits one of the two jobs; returns its number."""
    return batch_script.sbatch(
        job.folder, asked(job, profile, step, code, token), command(job, profile, step, code)
    )  # fmt: skip


def refuse(found: list[str]) -> None:
    """Raises LaunchError where something stands against the job."""
    if found:
        raise LaunchError("; ".join(found))


def not_active(job: PrepareJob) -> None:
    """Raises LaunchError where a job of the last submission waits or runs, or where that cannot be known."""
    path = job.folder / RECORD_FILE
    record = runs.read_json(path) or {}
    if "token" not in record:
        return
    queue = slurm_queue.ask([path.stat().st_uid])
    if queue.problem:
        raise LaunchError(
            f"{queue.problem}, and {path} names jobs that may be preparing {job.out}. Remove it if you know that they "
            "have ended"
        )
    active = [entry.number for entry in queue.entries if entry.is_active and is_job_of(record, entry)]
    if active:
        more = f" and {len(active) - 1} more" if len(active) > 1 else ""
        raise LaunchError(f"{job.out} is being prepared: Slurm job {active[0]}{more}. Wait for the end, or scancel it")


def is_job_of(record: Mapping[str, Any], entry: slurm_queue.Entry) -> bool:
    """Whether a job in the queue is of a recorded submission, or may be: a cluster can put its own comment on jobs."""
    number = entry.number.split("_")[0]
    is_recorded = bool(number) and number in (record.get("array"), record.get("merge"))
    return entry.comment == record["token"] or (is_recorded and not entry.comment.startswith("slurm-"))


def take_snapshot(job: PrepareJob) -> Path:
    """The copy of the code that the jobs run; beside it stands what was asked for."""
    return snapshot.take(job.folder, json.dumps({"prepare": job.arguments, "parts": job.parts}) + "\n")


def note(job: PrepareJob, token: str, array: str = "", merge: str = "") -> None:
    """Records the submission."""
    record = {
        "token": token, "array": array, "merge": merge, "parts": job.parts, "arguments": job.arguments,
        "workdir": os.getcwd(), "submitted": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    runs.write_atomically(job.folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def array_step(job: PrepareJob, profile: Profile) -> Step:
    """The array: an element per part."""
    return Step(
        work="part-$SLURM_ARRAY_TASK_ID",
        number="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
        own=f'--jobs {profile.cpus_per_task or "${SLURM_CPUS_ON_NODE:-1}"} --part "$SLURM_ARRAY_TASK_ID/{job.parts}"',
        log="part-%a.log",
        name=f"prepare-{job.out.name}",
        cpus=profile.cpus_per_task,
        options={"array": f"1-{job.parts}"},
    )


def merge_step(job: PrepareJob, array: str) -> Step:
    """The merge; Slurm drops it where a part has failed for good."""
    return Step(
        work="merge",
        number="$SLURM_JOB_ID",
        own="--merge",
        log="merge.log",
        name=f"merge-{job.out.name}",
        cpus=1,
        options={"dependency": f"afterok:{array}", "kill-on-invalid-dep": "yes"},
    )


def asked(job: PrepareJob, profile: Profile, step: Step, code: Path, token: str) -> dict[str, Any]:
    """What submitit is told. Of the profile, whole nodes and GPUs are left out: parts need neither.

    There is no srun, unless a container needs it: where Slurm preempts with a time of grace, a batch script is not
    signalled and may use that time to finish shards.
    """
    facts = {
        "folder": job.folder, "out": job.out, "token": token, "max_retries": profile.max_retries,
        "python": sys.executable, "code": code,
    }  # fmt: skip
    return batch_script.requested(profile) | {
        "job_name": step.name,
        "comment": token,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": step.cpus,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": {
            **batch_script.options(profile),
            "chdir": os.getcwd(),
            "output": str(job.folder / "logs" / step.log),
            "requeue": True,
            "signal": f"B:USR2@{SIGNAL_LEAD}",
            **step.options,
            **profile.sbatch,
        },
        "setup": [
            *batch_script.environment(profile),
            *(f"{name}={shlex.quote(str(value))}" for name, value in facts.items()),
            f"work={step.work} number={step.number}",
            "export PYTHONUNBUFFERED=1",
            *BEFORE.strip().splitlines(),
        ],
        "teardown": AFTER.strip().splitlines(),
    }


def command(job: PrepareJob, profile: Profile, step: Step, code: Path) -> str:
    """The line of shell that starts the converter in the background, where a signal can reach the script meanwhile."""
    python = [sys.executable]
    if profile.container:
        step_of_its_own = ["srun", "--ntasks=1", *profile.srun] if profile.srun else []
        prefix = [*step_of_its_own, *shlex.split(profile.container_command or "")]
        python = [*batch_script.in_container(prefix, profile), profile.container_python]
    converter, *typed = job.arguments
    started = shlex.join([*python, str(code / "launch" / "converter.py"), converter])
    return f"{started} {step.own} {shlex.join(typed)} &"
