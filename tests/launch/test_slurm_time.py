"""Stopped by the time limit, and by signals from elsewhere, on a real cluster."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from slurm_runs import Result, Run, assert_as_undisturbed

from launch.local_slurm import LocalSlurm

pytestmark = pytest.mark.slurm


def test_run_that_meets_its_time_limit_goes_on_whether_or_not_its_ranks_obey_the_notice(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    """Two runs side by side, because Slurm's shortest limit is a minute: one obeys, one waits for good."""
    obeying, deaf = (with_limit_of_a_minute(slurm, tmp_path / name) for name in ("obeying", "deaf"))
    obeying.environment["DGT_TEST_AWAIT"] = "7:0"
    deaf.hold_at("step-7")
    for run in (obeying, deaf):
        run.start("--profile", str(tmp_path / run.base.name / "profile.yaml"))
    for run in (obeying, deaf):
        run.wait_for_event("requeued")
        slurm.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    for run in (obeying, deaf):
        run.wait_for_end()
        assert run.reasons() == ["time limit"]
        assert len(run.story("started")) == 2
        assert_as_undisturbed(run, undisturbed)
    assert [run.story("stopped")[0]["step"] for run in (obeying, deaf)] == [7, 5]
    assert "the time limit came before the ranks had saved" in deaf.story("stopped")[0]["text"]
    assert "raise --signal-lead 20" in deaf.log()


def with_limit_of_a_minute(slurm: LocalSlurm, base: Path) -> Run:
    """A run whose attempts have a minute, and get the notice 20 s (at most 30 s more) before its end."""
    base.mkdir()
    # past the check that refuses limits so short: it has no part in this
    (base / "profile.yaml").write_text(yaml.safe_dump({"signal_lead": 20, "sbatch": {"time": 1}}))
    return Run(slurm, base)


def test_signals_to_single_ranks_stop_all_of_them_once(slurm: LocalSlurm, undisturbed: Result, tmp_path: Path) -> None:
    """One to rank 1 alone; then, while the save after one to rank 0 is under way, further ones."""
    run = Run(slurm, tmp_path).hold_at("step-7", "step-10 save-10").start()
    run.wait_until_held(0)
    run.kill(1, signal.SIGUSR2)
    run.release(0)
    run.wait_until_held(1)
    run.kill(0, signal.SIGTERM)
    run.release(1)
    run.wait_until_held(1, stop=1)
    run.kill(0, signal.SIGUSR2)
    run.kill(1, signal.SIGUSR2)
    run.release(1, stop=1)
    run.wait_for_end()
    assert run.reasons() == ["signal"] * 2
    assert [event["step"] for event in run.story("stopped")] == [7, 10]
    assert [event["text"].split(";")[0] for event in run.story("stopped")] == [
        "stopped by SIGUSR2",
        "stopped by SIGTERM",
    ]
    assert (run.folder / "logs" / "rank-0.log").read_text().count("checkpoint of step 10 saved") == 1
    assert len(run.story("requeued")) == 2
    assert_as_undisturbed(run, undisturbed)
