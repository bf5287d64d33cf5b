"""Preempted in every phase of a run, on a real cluster: the end is that of a run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_runs import Result, Run, assert_as_undisturbed, preempt

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
