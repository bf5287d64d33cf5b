"""Whether a run goes on after an attempt has ended: one decision, for Slurm's batch scripts and for this machine.

What is known of the end comes from the markers that ranks leave (launch/runs.py), from the scheduler, and from whether
there is a newer checkpoint than before. The exit status of srun is not among it: with --kill-on-bad-exit it is 143 or
137 for many reasons. Everything here is a function of its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from launch.runs import End

Scheduler = Literal["", "preempted", "cancelled", "requeued", "time limit"]
"""What the scheduler did to the job, where it did anything; "requeued": it starts the job again without being asked."""

SIGINT_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""
FAILURES_TO_EXCLUDE = 2
"""So many crashes that began on one node exclude it."""


@dataclass(frozen=True)
class Tally:
    """What is counted from attempt to attempt of one submission."""

    fruitless: int = 0
    """Attempts in a row that ended by their own fault, the ones after the last that made a new checkpoint."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """How many crashes began on each node."""
    sick: int = 0
    """Requeues because of the health check."""


@dataclass(frozen=True)
class Ending:
    """All that is known of how an attempt ended."""

    marker: tuple[End, dict[str, Any]] | None
    """What its rank 0 left; None: nothing, it did not come to that."""
    scheduler: Scheduler
    progressed: bool
    """Whether there is a newer checkpoint than when it began."""
    culprit: str | None = None
    """Node on which the first rank died."""
    lost_node: str | None = None
    """Node that the scheduler has given up."""
    hung: str = ""
    """What a rank has said of a hang; empty where there was none."""


@dataclass(frozen=True)
class Verdict:
    """What follows."""

    action: Literal["done", "again", "wait", "stop"]
    """"again": the scheduler is to start the job once more; "wait": it does so by itself; "stop": a person must act."""
    reason: str
    """For the log: preempted, time limit, node failure, requeued, cancelled, crash, hang, signal or error; finished."""
    text: str
    """One sentence for people."""
    status: int
    """Exit status of a job that ends here."""
    tally: Tally
    exclude: str | None = None
    """Node that has failed too often."""

    @property
    def was_wanted(self) -> bool:
        """Whether a job that stops does so because a person asked for it."""
        return self.reason == "cancelled" or self.status == SIGINT_STATUS


def decide(ending: Ending, tally: Tally, max_retries: int) -> Verdict:
    """The verdict on an attempt, given what earlier ones left in the tally."""
    end, facts = ending.marker or (None, {})
    if end == "finished":
        return Verdict("done", "finished", f"training is complete after step {facts['step']}", 0, tally)
    if end == "failed":
        return Verdict("stop", "error", f"an error that would repeat: {facts['reason']}", 2, tally)
    if ending.scheduler == "cancelled":
        return Verdict("stop", "cancelled", f"cancelled{saved(facts)}", 1, tally)
    if end == "interrupted" and facts["signal"] == "SIGINT":
        return Verdict("stop", "signal", f"stopped by SIGINT{saved(facts)}", SIGINT_STATUS, tally)
    if ending.scheduler == "requeued":
        what = f"node {ending.lost_node} failed" if ending.lost_node else "requeued by Slurm or an administrator"
        return Verdict("wait", "node failure" if ending.lost_node else "requeued", what + saved(facts), 0, tally)
    if ending.scheduler == "preempted":
        text = f"preempted{saved(facts)}" if end else "preempted before it could save"
        return Verdict("again", "preempted", text, 0, tally)
    if end == "interrupted" or ending.scheduler == "time limit":
        return stopped_in_time(ending, facts, tally, max_retries)
    return crashed(ending, tally, max_retries)


def saved(facts: Mapping[str, Any]) -> str:
    """What a planned stop has saved, in words."""
    return f"; saved at step {facts['step']}" if facts.get("step") else ""


def stopped_in_time(ending: Ending, facts: dict[str, Any], tally: Tally, max_retries: int) -> Verdict:
    """After a notice of the time limit, or a signal from elsewhere; again and again at once is no way to finish."""
    reason = ending.scheduler or "signal"
    what = f"stopped by {facts['signal']}" if reason == "signal" else "the time limit came near"
    if ending.marker is None:
        what = "the time limit came before the ranks had saved"
    fruitless = 0 if ending.progressed else tally.fruitless + 1
    tally = replace(tally, fruitless=fruitless)
    if fruitless > max_retries:
        text = f"{what}, and {fruitless} attempts in a row have made no checkpoint: allow them more time"
        return Verdict("stop", reason, text, 1, tally)
    return Verdict("again", reason, what + saved(facts), 0, tally)


def crashed(ending: Ending, tally: Tally, max_retries: int) -> Verdict:
    """A crash is worth another try as long as some of the last ones got further."""
    fruitless = 1 if ending.progressed else tally.fruitless + 1
    failures = dict(tally.failures)
    if ending.culprit:
        failures[ending.culprit] = failures.get(ending.culprit, 0) + 1
    what = "hang" if ending.hung else "crash"
    on = (f" on node {ending.culprit}" if ending.culprit else "") + (f" ({ending.hung})" if ending.hung else "")
    tally = replace(tally, fruitless=fruitless, failures=failures)
    if fruitless > max_retries and ending.progressed:
        return Verdict("stop", what, f"gave up after a {what}{on}", 1, tally)
    if fruitless > max_retries:
        crashes = f"a {what}" if fruitless == 1 else f"{fruitless} crashes in a row"
        return Verdict(
            "stop", what, f"gave up after {crashes} without a new checkpoint{on and f', the last{on}'}", 1, tally
        )
    bad = ending.culprit if failures.get(ending.culprit or "", 0) >= FAILURES_TO_EXCLUDE else None
    return Verdict("again", what, f"{what} {fruitless} of at most {max_retries} without progress{on}", 0, tally, bad)


def word_of_slurm(fields: Mapping[str, str], attempt: int, near_end: bool) -> Scheduler:
    """What `scontrol show job` tells of an attempt that has just ended; `near_end`: its time was about to be over."""
    if fields["JobState"] == "CANCELLED":
        return "cancelled"
    if int(fields.get("Restarts", 0)) > attempt:
        return "requeued"
    preempted = fields.get("PreemptTime", "None")
    if preempted[:1].isdigit() and preempted >= fields["StartTime"]:  # of this attempt, not of an earlier one
        return "preempted"
    if fields["JobState"] == "COMPLETING":  # ended without a requeue: by scancel, or because its time was over
        return "time limit" if fields.get("Reason") == "TimeLimit" else "cancelled"
    return "time limit" if near_end else ""


DEATH = re.compile(r"^srun: error: (?P<node>[^\s:,\[]+): tasks? [\d,-]+: (?P<how>.+)$", re.MULTILINE)
LOST = re.compile(r"^srun: error: Node failure on (?P<node>\S+)$", re.MULTILINE)
PREEMPTED = re.compile(r"^slurmstepd\S*: error: \*\*\* JOB .* DUE TO PREEMPTION \*\*\*$", re.MULTILINE)
CANCELLED = re.compile(r"^slurmstepd\S*: error: \*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*$", re.MULTILINE)


def culprit_of(said: str) -> str | None:
    """Node on which the first rank died, by what srun said; None where that is not clear.

    A kill is the cause of others' errors. Where ranks on several nodes end with an error, all may have lost one that
    says nothing any more.
    """
    deaths = [match for match in DEATH.finditer(said) if "Terminated" not in match["how"]]
    killed = {match["node"] for match in deaths if not match["how"].startswith("Exited")}
    nodes = killed or {match["node"] for match in deaths}
    return nodes.pop() if len(nodes) == 1 else None


def lost_node_of(said: str) -> str | None:
    """Node that failed under the job, by what srun said."""
    found = LOST.search(said)
    return found["node"] if found else None


def was_preempted(said: str) -> bool:
    """Whether Slurm has ended the job's batch script in order to preempt the job, by what it wrote into its log."""
    return PREEMPTED.search(said) is not None


def was_cancelled(said: str) -> bool:
    """Whether somebody has cancelled the job, by the same."""
    return CANCELLED.search(said) is not None
