"""Preempted in every phase of a run, on a real cluster: the end is that of a run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_runs import Result, Run, assert_as_undisturbed, grace, preempt
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.local_slurm import LocalSlurm

pytestmark = pytest.mark.slurm

PHASES = {"start": 0, "step-3": 3, "save": 4, "step-7": 7, "evaluation": 8}
"""Where a run is preempted, attempt by attempt, and the step of the checkpoint that it goes on from: at start-up, while
the learning rate warms up, in a checkpoint, in the middle of an epoch, in an evaluation."""


def test_run_preempted_in_every_phase_ends_as_if_nothing_had_happened(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    run = Run(slurm, tmp_path).hold_at(*PHASES).start()
    for attempt in range(len(PHASES)):
        run.wait_until_held(attempt)
        preempt(run)
        run.wait_for_preemption()
        run.release(attempt)
        run.wait_for_event("requeued", attempt + 1)
    run.wait_for_end()
    assert run.reasons() == ["preempted"] * 5
    assert [event.get("step", 0) for event in run.story("stopped")] == list(PHASES.values())
    assert len(run.story("started")) == 6
    assert_as_undisturbed(run, undisturbed)
    assert_tensorboard_tells_the_preemptions(run)
    assert_logs_are_of_all_attempts(run)


def assert_tensorboard_tells_the_preemptions(run: Run) -> None:
    """The attempts are numbered where they begin; the last one's table of events says how the others ended."""
    board = str(run.folder / "tensorboard")
    marks = EventAccumulator(board).Reload().Scalars("run/attempt")
    assert sorted({(mark.step, mark.value) for mark in marks}) == [
        (step, attempt) for attempt, step in enumerate([0, *PHASES.values()], 1)
    ]
    texts = plugin_event_accumulator.EventAccumulator(board).Reload().Tensors("run/events/text_summary")
    last = texts[-1].tensor_proto.string_val[0].decode()
    rows = [row.strip(" |").split(" | ") for row in last.splitlines() if " | stopped | " in row]
    assert [text.split(";")[0] for _time, _event, text in rows] == ["preempted"] * 5
    assert last.endswith("This attempt finished the training after step 12.")


def assert_logs_are_of_all_attempts(run: Run) -> None:
    """Every attempt has one line in the log of each rank, and one in the batch log."""
    logs = run.folder / "logs"
    for rank in (0, 1):
        assert (logs / f"rank-{rank}.log").read_text().count(f"rank {rank} of 2 on ") == 6
    heads = [line for line in run.log().splitlines() if "== attempt" in line]
    assert [head.split("== attempt ")[1][0] for head in heads] == list("012345")


def test_run_preempted_before_it_has_ranks_and_without_time_to_save_ends_as_if_nothing_had_happened(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    """While the batch script begins; while the health check runs, which it ends on one node; at once; in the save."""
    run = Run(slurm, tmp_path).hold_at("begin", "health_check", "step-7", "step-8 save-8").start()
    for attempt in (0, 1):
        run.wait_until_held(attempt)
        preempt(run)
        run.wait_for_preemption()
        run.release(attempt)
        run.wait_for_event("requeued", attempt + 1)
    assert not (run.folder / "logs" / "rank-0.log").exists()
    assert run.story("node-excluded") == []
    run.wait_until_held(2)
    with grace(slurm, 0):
        preempt(run)
        run.wait_for_event("stopped", 3)
    run.wait_until_held(3)
    with grace(slurm, 2):
        preempt(run)
        run.wait_for_preemption()
        run.release(3)
        run.wait_until_held(3, stop=1)
        assert list((run.folder / "checkpoints").glob("step_00000008.*.saving"))
        run.wait_for_event("stopped", 4)
    run.wait_for_end()
    assert run.reasons() == ["preempted"] * 4
    assert [event.get("step") for event in run.story("stopped")] == [None, None, 5, 5]
    assert "ended while it saved, after SIGTERM" in run.story("stopped")[3]["text"]
    assert len(run.story("started")) == 5
    assert_as_undisturbed(run, undisturbed)
