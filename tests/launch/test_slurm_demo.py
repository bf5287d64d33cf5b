"""`make slurm-demo`: it runs to its end, cleans up when it is stopped, and would notice a run that lost something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, has_step, wait_for, write_slurm_record
from torch.utils.tensorboard import SummaryWriter

from launch import events, local_slurm, runs, slurm_demo
from launch.slurm_demo import BATCH, EPOCHS, STEPS, STEPS_PER_EPOCH


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder in which the demo's commands can be typed, as in a checkout, with what an earlier demo has left."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    run = tmp_path / slurm_demo.RUN
    run.mkdir(parents=True)
    write_slurm_record(run, "1")
    (run / "metrics.jsonl").write_text(json.dumps({"step": STEPS, "train/loss": 1.0}) + "\n")
    events.note(run, "finished", "an earlier one")
    return tmp_path


def start_demo(place: Path) -> subprocess.Popen[str]:
    """Starts it as a terminal does: Ctrl-C reaches all of its processes."""
    needed = [name for name in ("slurmctld", "slurmd", "sbatch") if local_slurm.found(name) is None]
    if needed and os.environ.get("CI") != "true":
        pytest.skip(f"{', '.join(needed)} not found")
    return subprocess.Popen(
        [sys.executable, "-m", "launch.slurm_demo"], cwd=place, env=os.environ | {"TMPDIR": str(place)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def processes_of(place: Path) -> list[int]:
    """Processes whose arguments or variables name the folder: daemons, batch scripts, ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if str(place).encode() in said and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@pytest.mark.slurm
@pytest.mark.slow
def test_demo_is_preempted_and_loses_a_rank_and_finishes_where_an_earlier_one_has_been(place: Path) -> None:
    demo = start_demo(place)
    said, _ = demo.communicate()
    assert demo.returncode == 0, said
    run = place / slurm_demo.RUN
    kinds = [event["event"] for event in events.read(run)]
    assert kinds == ["submitted", *["started", "stopped", "requeued"] * 2, "started", "finished"]
    assert "restarts      2: preempted (went on from step" in said
    assert f"curve         steps 1 to {STEPS}, each once" in said
    assert "$ python launch/jobs.py events slurm_demo" in said
    assert processes_of(place) == []


@pytest.mark.slurm
def test_ctrl_c_cancels_the_job_and_ends_the_cluster(place: Path) -> None:
    demo = start_demo(place)
    run = place / slurm_demo.RUN
    wait_for(lambda: [event["event"] for event in events.read(run)] == ["submitted", "started"], "the first attempt")
    wait_for(lambda: has_step(run, 2), "the second step")
    os.killpg(demo.pid, signal.SIGINT)
    said, _ = demo.communicate()
    assert demo.returncode == 130, said
    assert said.splitlines()[-1] == "slurm-demo: stopped; its jobs are cancelled and its cluster has ended"
    wait_for(lambda: not processes_of(place), "the end of all processes")
    assert list(place.glob("slurm-demo-*")) == []


def test_missing_slurm_and_a_second_demo_end_in_one_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(local_slurm, "found", lambda program: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert slurm_demo.main() == 2
    assert capsys.readouterr().err == (
        "slurm-demo: slurmctld, slurmd, sbatch not found; apt-get install slurmctld slurmd slurm-client\n"
    )
    with runs.locked(slurm_demo.GUARD):
        assert slurm_demo.main() == 2
    assert "slurm_demo is active: process" in capsys.readouterr().err


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What a run that has lost nothing leaves."""
    for event, facts in (
        ("started", {}), ("stopped", {"reason": "preempted"}), ("stopped", {"reason": "crash"}), ("finished", {}),
    ):  # fmt: skip
        events.note(tmp_path, event, "as it should be", **facts)
    (tmp_path / "samples").mkdir()
    write_samples(tmp_path, list(range(STEPS_PER_EPOCH * BATCH)) * EPOCHS)
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, STEPS + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_curve(tmp_path, range(1, STEPS + 1))
    return tmp_path


def write_samples(run: Path, ids: list[int]) -> None:
    """The sample log of one rank."""
    steps = range(STEPS)
    places = [divmod(step, STEPS_PER_EPOCH) for step in steps]
    rows = [
        {"step": step + 1, "epoch": epoch, "consumed": (place + 1) * BATCH, "used": True,
         "ids": ids[step * BATCH : (step + 1) * BATCH]}
        for step, (epoch, place) in zip(steps, places, strict=True)
    ]  # fmt: skip
    (run / "samples" / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_curve(run: Path, steps: range) -> None:
    """TensorBoard's file."""
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for step in steps:
            writer.add_scalar("train/loss", 1 / step, step)


def complaints(run: Path) -> list[str]:
    """All that the demo would hold against the run."""
    return [*slurm_demo.wrong_stops(run), *slurm_demo.wrong_samples(run), *slurm_demo.wrong_curve(run)]


def test_whole_run_is_not_complained_about(whole: Path) -> None:
    assert complaints(whole) == []


def test_another_reason_and_another_end_are_noticed(whole: Path) -> None:
    events.note(whole, "stopped", "once more", reason="time limit")
    assert complaints(whole) == [
        "the run stopped for preempted, crash, time limit, not for preempted, crash",
        "the last event is stopped, not finished",
    ]


def test_sample_that_comes_twice_and_one_that_is_lost_are_noticed(whole: Path) -> None:
    count = STEPS_PER_EPOCH * BATCH
    ids = list(range(count)) * EPOCHS
    ids[count] = 7  # of the second epoch, which has another 7
    write_samples(whole, ids[:-1])
    assert complaints(whole) == [
        f"epoch 2 has {count} samples, {count - 1} of them different",
        f"epoch {EPOCHS} has {count - 1} samples, {count - 1} of them different",
    ]


def test_gap_in_a_curve_is_noticed(whole: Path) -> None:
    for file in (whole / "tensorboard").iterdir():
        file.unlink()
    write_curve(whole, range(2, STEPS + 1))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (whole / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert complaints(whole) == [
        f"TensorBoard does not have the steps 1 to {STEPS} once each: {STEPS - 1} points",
        f"metrics.jsonl does not have the steps 1 to {STEPS} once each: {STEPS + 1} points",
    ]
