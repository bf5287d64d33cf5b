"""Nodes, ranks and the controller fail under a job on a real cluster; it comes back, or says why it does not."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_runs import Result, Run, assert_as_undisturbed, assert_nothing_left, kill_node

from launch.cluster import is_lost, node_states
from launch.local_slurm import LocalSlurm, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("empty_queue")]

OUTAGE_SECONDS = 15
NVIDIA_SMI = """#!/bin/sh
if [ "$SLURMD_NODENAME" = n2 ]; then
    echo 'Unable to determine the device handle for GPU 0000:01:00.0: Unknown Error'; exit 9
fi
case $1 in
--query-gpu=index,*) echo '0, GPU-0, Test' ;;
*) echo 'Field is not a valid field to query.'; exit 2 ;;
esac
"""


def nodes_of_attempts(run: Run) -> list[list[str]]:
    """Where each attempt ran."""
    return [event["nodes"] for event in run.story("started")]


def bring_back(cluster: LocalSlurm, node: str) -> None:
    """Has a node take jobs again."""
    if node not in cluster.daemons:
        cluster.start(node)
    # refused where it has come back by itself
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
    wait_for(lambda: not is_lost(node_states("low")[node]), f"node {node}")


def test_lost_nodes_are_replaced_and_named_and_ranks_that_live_on_there_leave_the_run_alone(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    run = Run(slurm, tmp_path).hold_at("step-3", "step-7", "step-11").start()
    lost = []
    try:
        run.wait_until_held(0)
        lost.append(run.node_of(1))
        slurm.ask("scontrol", "update", f"nodename={lost[0]}", "state=down", "reason=test")
        run.wait_until_held(1)
        lost.append(run.node_of(1))
        kill_node(slurm, lost[1])
        run.release(1)  # rank 0 fails without the other; its node is not to blame
        run.wait_until_held(2)
        lost.append(run.node_of(0))  # the first node of a job runs its batch script, too
        forgotten = Path("/proc", str(run.processes()[0]))
        slurm.stop(lost[2], signal.SIGKILL)  # the daemon alone: its rank lives on
        run.wait_for_event("started", 4)
        assert forgotten.exists()
        run.release(2)  # it finds its peer gone, or the run another attempt's
        wait_for(lambda: not forgotten.exists(), "the end of the forgotten rank")
        run.wait_for_end()
    finally:
        for node in lost:
            bring_back(slurm, node)
    assert run.reasons() == ["node failure"] * 3
    assert [event["text"].split(";")[0] for event in run.story("stopped")] == [f"node {node} failed" for node in lost]
    assert [event.get("step") for event in run.story("started")] == [None, None, 5, 10]
    assert lost[1] not in nodes_of_attempts(run)[2]
    assert lost[2] not in nodes_of_attempts(run)[3]
    assert_as_undisturbed(run, undisturbed)


def test_killed_rank_comes_back_although_the_controller_is_away_and_its_node_is_avoided_the_second_time(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    run = Run(slurm, tmp_path).hold_at("step-7 end", "step-11").start("--max-retries", "1")
    run.wait_until_held(0)
    bad = run.node_of(1)
    run.kill(1)
    run.release(0)
    run.wait_until_held(0, stop=1)  # the ranks have left, and a requeue is due
    slurm.stop("slurmctld")
    try:
        run.release(0, stop=1)
        time.sleep(OUTAGE_SECONDS)  # is what is tested
        assert run.story("stopped", "requeued") == []
    finally:
        slurm.start("slurmctld")
    run.wait_until_held(1)
    assert run.node_of(1) == bad
    run.kill(1)
    run.release(1)
    run.wait_for_end()
    assert run.reasons() == ["crash"] * 2
    text = f"crash 1 of at most 1 without progress on node {bad}"
    assert [event["text"].split(";")[0] for event in run.story("stopped")] == [text] * 2, "progress did not forgive"
    assert [event["node"] for event in run.story("node-excluded")] == [bad]
    assert slurm.job(run.job)["ExcNodeList"] == bad
    assert [bad in nodes for nodes in nodes_of_attempts(run)] == [True, True, False]
    assert_as_undisturbed(run, undisturbed)


def test_rank_that_always_raises_is_given_up(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = Run(slurm, tmp_path, environment={"DGT_TEST_RAISE": "2:1"}).start("--max-retries", "1")
    run.wait_for_end("FAILED")
    assert slurm.job(run.job)["ExitCode"] == "1:0"
    assert run.reasons() == ["crash", "crash"]
    assert len(run.story("started")) == 2
    last = run.story()[-1]
    said = "gave up after 2 crashes in a row without a new checkpoint"
    assert last["event"] == "gave-up"
    assert said in last["text"]
    assert str(run.folder / "logs") in last["text"]
    assert said in run.log()
    log = (run.folder / "logs" / "rank-1.log").read_text()
    assert log.count("RuntimeError: rank 1 was told to raise at step 2") == 2
    assert_nothing_left(run)


def test_node_that_fails_its_health_check_is_left_for_others_and_gpus_are_scheduled(
    slurm: LocalSlurm, undisturbed: Result, tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(NVIDIA_SMI)
    fake.chmod(0o755)
    run = Run(slurm, tmp_path, ("output_mode=750",), options=("--nodes", "2", "--partition", "low"))
    refused = run.submit("--gpus-per-node", "3", "steps.global_batch_size=24")
    assert refused.returncode == 2
    assert "lower --gpus-per-node (the most that one of its nodes has is 2)" in refused.stderr
    assert not run.folder.exists()
    run.prepend_path(fake.parent).hold_at("", "step-3").start("--gpus-per-node", "1")
    run.wait_until_held(1)
    assert slurm.job(run.job)["TresPerNode"] == "gres:gpu:1"
    assert [run.variables(rank)["SLURM_GPUS_ON_NODE"] for rank in (0, 1)] == ["1", "1"]
    assert "GRES=gpu:2(IDX:0-1)" in slurm.ask("scontrol", "show", "job", "--details", run.job), (
        "whole nodes are asked for"
    )
    run.release(1)
    run.wait_for_end()
    assert run.reasons() == ["node failure"]
    assert nodes_of_attempts(run)[0] == ["n1", "n2"]
    assert "n2" not in nodes_of_attempts(run)[1]
    excluded = run.story("node-excluded")[0]
    assert excluded["node"] == "n2"
    assert "GPUs: nvidia-smi ended with status 9: Unable to determine the device handle" in excluded["text"]
    assert run.folder.stat().st_mode & 0o777 == 0o750
    assert_as_undisturbed(run, undisturbed)
