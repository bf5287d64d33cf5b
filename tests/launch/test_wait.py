"""Following submitted jobs to their end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from run_folders import ONE, TOKEN, Place, report, tell

from launch import follow, wait


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder of runs on a machine with a Slurm that is asked at every look."""
    made = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(wait, "POLL_SECONDS", 0.0)
    return made


def squeue(place: Place, *answers: str) -> None:
    """Has squeue give one answer after the other, the last for good."""
    counter = place.folder.parent / "asked"
    counter.write_text("0")
    for number, answer in enumerate(answers):
        (place.folder.parent / f"answer-{number}").write_text(answer + "\n")
    last = len(answers) - 1
    place.command(
        "squeue",
        before=f"n=$(cat {counter}); cat {counter.parent}/answer-$n; [ $n = {last} ] || echo $((n + 1)) > {counter}",
    )


@pytest.mark.parametrize(("end", "status"), [("finished", 0), ("gave-up", 1), ("stopped:cancelled", 1)])
def test_one_run_is_shown_to_its_end_and_the_status_says_whether_it_is_complete(
    place: Place, capsys: pytest.CaptureFixture[str], end: str, status: int
) -> None:
    run = place.run("one")
    report(run, {"step": 1})
    tell(run, "submitted", "started", end)
    squeue(place, "12|PENDING|None||N/A|" + ONE, "12|COMPLETING|None|n1|N/A|" + ONE, "12|COMPLETED|None|n1|N/A|" + ONE)
    assert wait.until_ended([run]) == status
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in shown] == [
        f"{word.split(':')[0]}: {word} was noted" for word in ("submitted", "started", end)
    ], "the log of an earlier job was shown"


def test_a_slurm_that_is_away_and_a_job_that_comes_back_are_waited_for(place: Place) -> None:
    run = place.run("one")
    tell(run, "submitted", "started", "stopped:preempted", "requeued")
    squeue(place, "12|COMPLETING|None|n1|N/A|" + ONE, "12|PENDING|BeginTime||N/A|" + ONE, "")
    assert wait.until_ended([run]) == 1
    assert len(place.called("squeue")) == 3
    place.command("squeue", errors="Unable to contact slurm controller", code=1)
    watch = follow.Watch([run])
    assert not watch.has_ended()
    assert watch.problems == ["Slurm does not answer: Unable to contact slurm controller"]


def test_several_runs_are_waited_for_with_one_question_and_told_apart(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("one", "two")):
        report(place.run(name, job=str(number)), {"step": 1})
        tell(place.folder / name, "submitted", "started", "finished")
    both = [place.folder / "one", place.folder / "two"]
    squeue(place, f"0|COMPLETED|None|n1|N/A|{ONE}\n1|PENDING|None||N/A|{TOKEN}|two", "")
    assert wait.until_ended(both) == 0
    assert len(place.called("squeue")) == 2
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in told] == ["one"] * 3 + ["two"] * 3
    tell(both[1], "started")
    assert wait.until_ended(both) == 1


def test_a_file_that_is_away_for_a_moment_is_read_later(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.run("one")
    tell(run, "submitted", "started", "finished")
    squeue(place, "12|PENDING|None||N/A|" + ONE, "")
    show, tries = wait.show_events, []

    def away_at_first(*given: Any) -> int:
        tries.append(given)
        if len(tries) == 1:
            raise OSError(errno.ESTALE, "Stale file handle", "events.jsonl")
        return show(*given)

    monkeypatch.setattr(wait, "show_events", away_at_first)
    assert wait.until_ended([run]) == 0
    said = capsys.readouterr()
    assert said.err == "events.jsonl cannot be read now: Stale file handle\n"
    assert len(said.out.splitlines()) == 3


def test_the_status_is_right_where_nobody_reads_what_is_shown(place: Place) -> None:
    run = place.run("one")
    tell(run, "submitted", "started", "finished")
    read, write = os.pipe()
    os.close(read)
    code = (
        "import sys; from pathlib import Path; from launch import wait; sys.exit(wait.until_ended([Path(sys.argv[1])]))"
    )
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-c", code, str(run)]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_leaves_the_job_alone(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    run = place.run("one")
    place.queue("12|RUNNING|None|n1|N/A|" + ONE)
    place.command("scancel")
    monkeypatch.setattr(wait.time, "sleep", interrupt)
    assert wait.until_ended([run]) == 130
    assert "the job goes on" in capsys.readouterr().out
    assert place.called("scancel") == []
