"""What becomes of a run after an attempt: every ending, and what is counted from attempt to attempt."""

from __future__ import annotations

from typing import Any

import pytest

from launch import verdict
from launch.verdict import Ending, Tally, decide


def ending(end: str | None = None, scheduler: str = "", progressed: bool = False, **more: Any) -> Ending:
    """An ending with the marker that rank 0 leaves."""
    facts = {"finished": {"step": 9}, "interrupted": {"step": 4, "signal": "SIGTERM"}, "failed": {"reason": "bad key"}}
    facts["interrupted"] |= {"signal": more.pop("signal", "SIGTERM")}
    marker = (end, facts[end]) if end else None
    return Ending(marker, scheduler, progressed, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "action", "reason", "status", "text"),
    [
        (ending("finished"), "done", "finished", 0, "training is complete after step 9"),
        (ending("finished", "preempted"), "done", "finished", 0, "training is complete after step 9"),
        (ending("failed"), "stop", "error", 2, "an error that would repeat: bad key"),
        (ending("interrupted", "cancelled"), "stop", "cancelled", 1, "cancelled; saved at step 4"),
        (ending(None, "cancelled"), "stop", "cancelled", 1, "cancelled"),
        (ending("interrupted", signal="SIGINT"), "stop", "signal", 130, "stopped by SIGINT; saved at step 4"),
        (ending("interrupted", "preempted"), "again", "preempted", 0, "preempted; saved at step 4"),
        (ending(None, "preempted"), "again", "preempted", 0, "preempted before it could save"),
        (ending("interrupted", "time limit"), "again", "time limit", 0, "the time limit came near; saved at step 4"),
        (ending(None, "time limit"), "again", "time limit", 0, "the time limit came before the ranks had saved"),
        (ending("interrupted", progressed=True), "again", "signal", 0, "stopped by SIGTERM; saved at step 4"),
        (ending(None, "requeued", lost_node="n3"), "wait", "node failure", 0, "node n3 failed"),
        (ending(None, "requeued"), "wait", "requeued", 0, "requeued by Slurm or an administrator"),
        (ending(None), "again", "crash", 0, "crash 1 of at most 2 without progress"),
        (ending(None, culprit="n2"), "again", "crash", 0, "crash 1 of at most 2 without progress on node n2"),
        (ending(None, hung="rank 1"), "again", "hang", 0, "hang 1 of at most 2 without progress (rank 1)"),
    ],
)  # fmt: skip
def test_each_ending_has_its_consequence(found: Ending, action: str, reason: str, status: int, text: str) -> None:
    made = decide(found, Tally(), max_retries=2)
    assert (made.action, made.reason, made.status, made.text) == (action, reason, status, text)


def test_crashes_without_progress_are_given_up_and_progress_forgives_them() -> None:
    tally = Tally()
    for count in (1, 2):
        made = decide(ending(), tally, max_retries=2)
        assert (made.action, made.tally.fruitless) == ("again", count)
        tally = made.tally
    made = decide(ending(), tally, max_retries=2)
    assert (made.action, made.status) == ("stop", 1)
    assert made.text == "gave up after 3 crashes in a row without a new checkpoint"
    forgiven = decide(ending(progressed=True), tally, max_retries=2)
    assert (forgiven.action, forgiven.tally.fruitless) == ("again", 1)


def test_preemptions_are_never_given_up_and_count_nothing() -> None:
    for found in (ending(None, "preempted"), ending("interrupted", "preempted")):
        made = decide(found, Tally(fruitless=2), max_retries=2)
        assert (made.action, made.tally) == ("again", Tally(fruitless=2))


def test_time_limits_that_allow_no_progress_are_given_up() -> None:
    made = decide(ending("interrupted", "time limit", signal="SIGUSR2"), Tally(fruitless=2), max_retries=2)
    assert (made.action, made.reason, made.status) == ("stop", "time limit", 1)
    assert "3 attempts in a row have made no checkpoint: allow them more time" in made.text
    killed = decide(ending(None, "time limit"), Tally(fruitless=2), max_retries=2)
    assert (killed.action, killed.status) == ("stop", 1)
    with_progress = decide(ending("interrupted", "time limit", progressed=True), Tally(fruitless=2), max_retries=2)
    assert (with_progress.action, with_progress.tally.fruitless) == ("again", 0)


def test_node_on_which_crashes_begin_twice_is_excluded_even_with_progress_between() -> None:
    first = decide(ending(progressed=True, culprit="n2"), Tally(), max_retries=5)
    assert first.exclude is None
    other = decide(ending(progressed=True, culprit="n1"), first.tally, max_retries=5)
    assert other.exclude is None
    second = decide(ending(progressed=True, culprit="n2"), other.tally, max_retries=5)
    assert second.exclude == "n2"
    assert second.tally.failures == {"n1": 1, "n2": 2}


FIELDS = {"JobState": "RUNNING", "Restarts": "1", "StartTime": "2026-01-02T00:00:00", "PreemptTime": "None"}


@pytest.mark.parametrize(
    ("changes", "near_end", "word"),
    [
        ({}, False, ""),
        ({}, True, "time limit"),
        ({"JobState": "CANCELLED"}, True, "cancelled"),
        ({"JobState": "COMPLETING", "Reason": "None"}, True, "cancelled"),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, False, "time limit"),
        ({"Restarts": "2", "JobState": "COMPLETING"}, True, "requeued"),
        ({"PreemptTime": "2026-01-02T01:00:00"}, True, "preempted"),
        ({"PreemptTime": "2026-01-02T01:00:00", "JobState": "COMPLETING"}, True, "preempted"),
        ({"PreemptTime": "2026-01-01T23:00:00"}, False, ""),
    ],
    ids=[
        "nothing",
        "limit near",
        "cancelled",
        "being cancelled",
        "limit met",
        "requeued",
        "preempted",
        "preempted, grace over",
        "an earlier attempt was",
    ],
)
def test_slurm_is_understood(changes: dict[str, str], near_end: bool, word: str) -> None:
    assert verdict.word_of_slurm(FIELDS | changes, attempt=1, near_end=near_end) == word


SRUN = """\
2026-01-01 00:00:00  == attempt 0 ==
srun: error: n1: task 0: Exited with exit code 1
srun: error: n2: task 1: Killed
srun: error: n3: tasks 2-3: Terminated
slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-01-01T00:00:09 ***
"""


def test_node_of_the_first_death_is_found_in_what_srun_says() -> None:
    assert verdict.culprit_of(SRUN) == "n2"
    assert verdict.culprit_of(SRUN.replace("Killed", "Terminated")) == "n1"
    assert verdict.culprit_of("srun: error: n4: task 3: Segmentation fault (core dumped)\n") == "n4"
    assert verdict.culprit_of("nothing of the kind") is None
    both = "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n3: task 2: Exited with exit code 1\n"
    assert verdict.culprit_of(both) is None, "each may have lost a third"
    assert verdict.lost_node_of("srun: error: Node failure on n3\n") == "n3"
    assert verdict.lost_node_of(SRUN) is None
