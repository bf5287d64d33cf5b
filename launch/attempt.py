"""What a batch script does around its ranks; the script itself only calls it (see launch/batch_script.py).

    begin    before anything: is the run complete already, how did the last attempt end, which port and deadline
    nodes    after the health check: a node that failed it is excluded, and the job is requeued
    watch    beside the ranks: when the time limit is about to end everything, requeue rather than lose the job
    end      after the ranks: why did they leave; requeue the job, or end it

`begin` and `nodes` print lines for the shell on standard output. What happened goes into RUN/events.jsonl, and to the
batch log through standard error. It starts in a moment, because it needs no more than Python itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import cluster, events, health, requeue, runs, verdict
from launch.verdict import Ending, Tally

NOTICE_SECONDS = 60
"""Slurm may give its notice of the time limit 30 s early, and ranks with slow saves stop before it."""
WATCH_SECONDS = 60
"""How often the watch asks whether the time limit has been changed."""
LAST_MOMENT_SECONDS = 15
"""A requeue must be asked for this long before the time limit: a job that has met it never comes back."""
MOST_SICK = 8
"""Requeues because of the health check, after which it is the check that is doubted."""
CANCELLED = ("CANCELLED", "COMPLETING")
"""State of a job that was cancelled, and its state on the way there."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of one submission, as its batch script knows it."""

    run: Path
    token: str
    job: str
    number: int
    """0 for the first."""
    nodes: tuple[str, ...]
    partition: str
    lead: int
    """Seconds before the time limit at which Slurm gives notice."""
    max_retries: int

    @property
    def prefix(self) -> str:
        """Where its markers are, without their endings."""
        return f"{self.run}/jobs/{self.token}.{self.number}"

    @property
    def title(self) -> str:
        """The line in the batch log that it begins with."""
        return f"== attempt {self.number} of job {self.job} on {','.join(self.nodes)} =="

    @property
    def tally_file(self) -> Path:
        """Where the tally is kept."""
        return self.run / "jobs" / f"{self.token}.tally"

    def tally(self) -> Tally:
        """What the attempts before have left to count."""
        return Tally(**(runs.read_json(self.tally_file) or {}))

    def remember(self, tally: Tally) -> None:
        """Leaves it to those that follow."""
        leave(self.tally_file, json.dumps(asdict(tally)) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Does one of the four things; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dgt-attempt", description="Part of a Slurm batch script.")
    parser.add_argument("act", choices=("begin", "nodes", "watch", "end"))
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--token", required=True, help="names the submission")
    parser.add_argument("--lead", type=int, required=True, help="seconds between Slurm's notice and the time limit")
    parser.add_argument("--max-retries", type=int, required=True, help="fruitless attempts in a row that are retried")
    options = parser.parse_args(argv)
    environment = os.environ
    attempt = Attempt(
        options.run,
        options.token,
        environment["SLURM_JOB_ID"],
        int(environment.get("SLURM_RESTART_COUNT", 0)),
        tuple(cluster.hostnames(environment["SLURM_JOB_NODELIST"])),
        environment["SLURM_JOB_PARTITION"],
        options.lead,
        options.max_retries,
    )
    return {"begin": begin, "nodes": judge_nodes, "watch": watch, "end": end}[options.act](attempt)


def begin(attempt: Attempt) -> int:
    """Prints the variables of this attempt for the shell, or `exit` where nothing is left to do."""
    say(attempt.title)
    jobs = attempt.run / "jobs"
    if any(jobs.glob(f"{attempt.token}.*.finished")):
        say("training was complete before; nothing is left to do")
        print("exit 0")
        return 0
    record = runs.read_record(attempt.run)
    if record is None or record.token != attempt.token:
        other = record.name if record else "none"
        say(f"{attempt.run} belongs to another submission now ({other}); this one gives way")
        print("exit 2")
        return 0
    runs.claim(attempt.prefix)
    note_vanished(attempt)
    note_new_attempt(attempt)
    leave(jobs / f"{attempt.token}.shared", attempt.token)
    print(f"export MASTER_PORT={cluster.free_port()}")
    fields = cluster.job_fields(attempt.job)
    deadline = cluster.seconds(fields["EndTime"]) if fields else None
    if deadline is not None:
        print(f"export {runs.DEADLINE_VARIABLE}={deadline:.0f}")
    print("begun=yes")
    return 0


def note_new_attempt(attempt: Attempt) -> None:
    """Notes the start, with the newest checkpoint, which `end` compares with the newest then."""
    newest = runs.newest_checkpoint(attempt.run)
    leave(f"{attempt.prefix}.before", newest or "")
    where = f"attempt {attempt.number} of Slurm job {attempt.job} on {','.join(attempt.nodes)}"
    text = f"{where}, from {newest or 'the beginning'}"
    tell(attempt, "started", text, nodes=list(attempt.nodes), step=runs.step_of(newest))


def note_vanished(attempt: Attempt) -> None:
    """Where the last attempt had no chance to say how it ended, notes what can be known of it now.

    It can be one of an earlier submission, for a job that is cancelled does not come back to note it.
    """
    story = events.read(attempt.run)
    started = [event for event in story if event["event"] == "started" and "job" in event]
    ends = ("stopped", "finished", "cancelled")
    if not started or any(event["event"] in ends for event in story[story.index(started[-1]) :]):
        return
    last = started[-1]
    before = replace(
        attempt, token=last["token"], job=last["job"], number=last["attempt"], nodes=tuple(last.get("nodes", ()))
    )
    reason, text = why_vanished(before)
    newest = runs.newest_checkpoint(attempt.run)
    tell(before, "stopped", f"{text}; {going_on(newest)}", reason=reason, step=runs.step_of(newest))


def why_vanished(before: Attempt) -> tuple[str, str]:
    """Reason and text for an attempt that has left none, by what Slurm wrote into its log and what Slurm knows."""
    states = cluster.node_states(before.partition)
    said = said_in_attempt(before)
    # a node may be back in service by now, and a batch host's script heard nothing
    lost = verdict.lost_node_of(said) or ",".join(n for n in before.nodes if cluster.is_lost(states.get(n, "")))
    asked = runs.read_json(f"{before.prefix}.stopping")
    preempted = verdict.was_preempted(said)  # Slurm itself has forgotten
    if verdict.was_cancelled(said):
        return "cancelled", "cancelled, with no time to save"
    if lost:
        return "node failure", f"node {lost} failed"
    if asked:
        reason = "preempted" if preempted or asked.get("preempted") else "signal"
        return reason, f"ended while it saved, after {asked['signal']}; its time was too short for a save"
    if preempted:
        return "preempted", "preempted, with no time to save"
    return "unknown", "ended at once: preempted without grace, or killed, or its node failed"


def judge_nodes(attempt: Attempt) -> int:
    """Reads the reports of the health check; prints `exit` where the job cannot run on these nodes."""
    word = word_of_slurm(attempt, None, cluster.job_fields(attempt.job))
    if word:  # it was told to stop meanwhile, and so was the check
        print(f"exit {conclude(attempt, Ending(None, word, progressed=False))}")
        return 0
    found = health.judge(Path(f"{attempt.prefix}.health"), attempt.nodes)
    if found is None:
        say(f"the health check left no report, see {attempt.run}/logs/health.log; no node is judged")
        return 0
    if found.shared:
        tell(attempt, "warning", f"the nodes together fail their health check: {found.shared}")
    if found.bad:
        print(f"exit {leave_out(attempt, found)}")
    return 0


def leave_out(attempt: Attempt, found: health.Findings) -> int:
    """Has the job start again without the nodes that fail the check, or gives up; returns the exit status."""
    why = "; ".join(f"node {node} fails its health check: {text}" for node, text in found.bad.items())
    tally = attempt.tally()
    doubt = ""
    if found.alike:
        doubt = "; all fail alike, so it is hardly the nodes"
    elif tally.sick >= MOST_SICK:
        doubt = f"; that makes {tally.sick + 1} times, so it is hardly the nodes"
    elif not can_exclude(attempt, found.bad):
        doubt = "; too few others are left"
    tell(attempt, "stopped", why + doubt, reason="node failure")
    if doubt:
        tell(attempt, "gave-up", f"{why}{doubt}; see {attempt.run}/logs/health.log")
        return 1
    attempt.remember(replace(tally, sick=tally.sick + 1))
    return come_back(attempt, why, exclude=found.bad)


def watch(attempt: Attempt) -> int:
    """Waits until the job's time is all but over; a job that has met its limit would not come back.

    Reached only where the ranks did not leave after Slurm's notice, for instance because a save takes too long.
    """
    deadline = None
    while True:
        fields = cluster.job_fields(attempt.job)  # the limit can be changed meanwhile
        deadline = cluster.seconds(fields["EndTime"]) if fields else deadline
        left = float("inf") if deadline is None else deadline - LAST_MOMENT_SECONDS - time.time()
        if left <= 0:
            break
        time.sleep(min(left, WATCH_SECONDS if fields else requeue.RETRY_SECONDS))
    if fields and verdict.word_of_slurm(fields, attempt.number, near_end=True) != "time limit":
        return 0  # preempted or cancelled: Slurm knows what to do
    say(f"the ranks have not saved {LAST_MOMENT_SECONDS} s before the time limit: raise --signal-lead {attempt.lead}")
    return conclude(attempt, Ending(None, "time limit", has_progressed(attempt)))


def end(attempt: Attempt) -> int:
    """Finds out why the ranks have left, and concludes."""
    marker = runs.read_marker(attempt.prefix)
    word: verdict.Scheduler = ""
    if marker is None or marker[0] != "finished":
        word = word_of_slurm(attempt, marker, requeue.patiently(lambda: cluster.job_fields(attempt.job)))
    said = said_in_attempt(attempt)
    culprit, lost = verdict.culprit_of(said), verdict.lost_node_of(said)
    hung = runs.hang_of(attempt.prefix)
    return conclude(attempt, Ending(marker, word, has_progressed(attempt), culprit, lost, hung))


def has_progressed(attempt: Attempt) -> bool:
    """Whether there is a newer checkpoint than when the attempt began; an older one may have been set aside."""
    newest, before = runs.newest_checkpoint(attempt.run), runs.read_text(f"{attempt.prefix}.before")
    return (runs.step_of(newest) or 0) > (runs.step_of(before) or 0)


def conclude(attempt: Attempt, ending: Ending) -> int:
    """Decides what becomes of the job, notes it, and sees to it; returns the exit status of a job that ends here.

    The watch and the end of the ranks can both come to this; the second one leaves it to the first.
    """
    try:
        Path(f"{attempt.prefix}.concluded").touch(exist_ok=False)
    except FileExistsError:
        requeue.wait_to_be_ended()
        return 1
    except OSError as error:
        say(f"{attempt.prefix}.concluded cannot be made: {error.strerror or error}")
    found = verdict.decide(ending, attempt.tally(), attempt.max_retries)
    attempt.remember(found.tally)
    newest = runs.newest_checkpoint(attempt.run)
    if found.action == "done":
        tell(attempt, "finished", found.text, step=runs.step_of(newest))
        return found.status
    tell(attempt, "stopped", f"{found.text}; {going_on(newest)}", reason=found.reason, step=runs.step_of(newest))
    if found.action == "again":
        exclude = (found.exclude,) if found.exclude and can_exclude(attempt, [found.exclude]) else ()
        return come_back(attempt, found.text, exclude)
    if found.action == "stop" and not found.was_wanted:
        tell(attempt, "gave-up", f"{found.text}; see {attempt.run}/logs, and submit the run again to go on")
    return found.status


def word_of_slurm(
    attempt: Attempt, marker: tuple[runs.End, dict[str, Any]] | None, fields: dict[str, str] | None
) -> verdict.Scheduler:
    """What Slurm did to the job, by what it says of it; nothing where it says nothing."""
    if fields is None:
        return ""
    deadline = cluster.seconds(fields.get("EndTime", ""))
    near = deadline is not None and deadline - time.time() < 2 * attempt.lead + NOTICE_SECONDS
    obeyed = marker is not None and marker[1].get("signal") == "SIGUSR2"
    return verdict.word_of_slurm(fields, attempt.number, near_end=near and obeyed)


def can_exclude(attempt: Attempt, nodes: Iterable[str]) -> bool:
    """Whether enough nodes of the partition are left without these and those excluded before."""
    states = requeue.patiently(lambda: cluster.node_states(attempt.partition) or None) or {}
    return cluster.spare(states, {*nodes, *requeue.excluded(attempt.job)}) >= len(attempt.nodes)


def come_back(attempt: Attempt, why: str, exclude: Iterable[str] = ()) -> int:
    """Has Slurm start the job again, without some nodes, and waits to be ended; returns only where it does not."""
    # TERM follows a requeue at once, and nodes can be excluded only then; what is asked for here inherits the block
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    refusal = requeue.request(attempt.job, attempt.number)
    if refusal:
        state = (cluster.job_fields(attempt.job) or {}).get("JobState", "unknown")
        text = f"not requeued ({refusal}; job {attempt.job} is {state}); submit the run again to go on"
        tell(attempt, "cancelled" if state in CANCELLED else "gave-up", text)
        return 1
    tell(attempt, "requeued", f"Slurm job {attempt.job} is to start again: {why}")
    for node in exclude:
        refusal = requeue.exclude(attempt.job, node)
        if refusal:
            say(f"node {node} could not be excluded: {refusal}")
        else:
            tell(attempt, "node-excluded", f"node {node} is not used again: {why}", node=node)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    requeue.wait_to_be_ended()
    return 1


def said_in_attempt(attempt: Attempt) -> str:
    """What the batch log holds since this attempt began."""
    return runs.read_text(attempt.run / "logs" / "batch.log").rpartition(attempt.title)[2]


def going_on(newest: str | None) -> str:
    """Where the next attempt begins, in words."""
    return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"


def leave(path: str | Path, text: str) -> None:
    """Leaves a note to the attempts that follow; a full disk costs the note, not the requeue."""
    try:
        runs.write_atomically(Path(path), text)
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror or error}")


def tell(attempt: Attempt, event: events.Event, text: str, /, **facts: Any) -> None:
    """Notes an event of this attempt; a full disk costs the note, not the run."""
    say(text)
    facts = {"job": attempt.job, "token": attempt.token, "attempt": attempt.number, **facts}
    try:
        events.note(attempt.run, event, text, **facts)
    except OSError as error:
        say(f"this could not be noted in {events.FILE}: {error.strerror or error}")


def say(text: str) -> None:
    """A line of the batch log."""
    print(f"{time.strftime('%F %T')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
