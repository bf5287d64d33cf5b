"""`launch/jobs.py` cancel: what it ends, what it leaves alone, and what is noted."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ONE, TOKEN, Place, held, tell

from launch import cluster, events, program, status


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder of runs on a machine with a Slurm."""
    made = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], str]]:
    """Somebody who answers questions: each with the next of these."""
    answers: list[Callable[[], str]] = []
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: bool(answers)))
    monkeypatch.setattr("builtins.input", lambda question: answers.pop(0)())
    return answers


def test_cancel_asks_then_tells_slurm_and_then_notes_it(
    place: Place, capsys: pytest.CaptureFixture[str], terminal: list[Callable[[], str]]
) -> None:
    run = place.run("one")
    tell(run, "started")
    place.queue("12|RUNNING|None|n[1-2]|N/A|" + ONE)
    place.scancel("12|COMPLETING|None|n[1-2]|N/A|" + ONE, before=f"cp {run}/events.jsonl {run}/noted.$1")
    assert place.type("cancel", "one") == program.KNOWN_ERROR
    assert "--yes" in capsys.readouterr().err
    terminal.append(lambda: "n")
    assert place.type("cancel", "one") == 1
    assert "nothing was changed" in capsys.readouterr().out
    assert place.called("scancel") == []
    terminal.append(lambda: "y")
    assert place.type("cancel", "one") == 0
    assert "RUNNING on n[1-2]" in capsys.readouterr().out
    assert "cancelled" not in (run / "noted.12").read_text()
    noted = events.read(run)[-1]
    assert (noted["event"], noted["job"], noted["token"]) == ("cancelled", "12", TOKEN)
    assert noted["text"] == f"cancelled by {status.user()} with launch/jobs.py"


def test_a_failed_scancel_cancels_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.run("one")
    tell(run, "submitted", "started")
    before = events.read(run)
    place.queue("12|RUNNING|None|n[1-2]|N/A|" + ONE)
    place.command("scancel", errors="Access/permission denied", code=1)
    assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
    assert "Access/permission denied" in capsys.readouterr().err
    ask = cluster.ask
    monkeypatch.setattr(cluster, "ask", lambda *words, **given: ask(*words, **given) if words[0] != "scancel" else None)
    assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
    assert "it is not installed or says nothing" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "ask", ask)
    place.command("scancel")  # such as with SCANCEL_STATE in the shell
    assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
    assert "scancel 12 has had no effect, the job is RUNNING" in capsys.readouterr().err
    assert events.read(run) == before


def test_a_full_disk_does_not_keep_a_run_from_being_cancelled(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    run = place.run("one")
    tell(run, "submitted", "started")
    place.queue("12|RUNNING|None|n[1-2]|N/A|" + ONE)
    place.scancel()
    monkeypatch.setattr(events, "note", full)
    assert place.type("cancel", "one", "--yes") == 0
    assert place.called("scancel") == ["scancel 12"]
    assert "warning: not noted in events.jsonl: Disk quota exceeded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "queued", "sentence"),
    [
        (["started"], "12|RUNNING|None|n1|N/A|somebody's|theirs", "is not active (vanished)"),
        (["started"], "12|RUNNING|None|n1|N/A||theirs", "is not active (vanished)"),
        (
            ["started", "finished"],
            "12|COMPLETING|None|n1|N/A|" + ONE,
            "has ended already (finished: finished was noted)",
        ),
        (["started", "finished"], "12|RUNNING|None|n1|N/A|" + ONE, "has ended already (finished: finished was noted)"),
        (["started", "gave-up"], "12|COMPLETING|None|n1|N/A|" + ONE, "has ended already (gave up: gave-up was noted)"),
    ],
)
def test_cancel_touches_no_foreign_job_and_no_complete_run(
    place: Place, capsys: pytest.CaptureFixture[str], told: list[str], queued: str, sentence: str
) -> None:
    run = place.run("one")
    tell(run, *told)
    before = events.read(run)
    place.queue(queued)
    place.command("scancel")
    assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
    assert sentence in capsys.readouterr().err
    assert (place.called("scancel"), events.read(run)) == ([], before)


@pytest.mark.parametrize(
    ("told", "queued", "changes", "sentence"),
    [
        ([], "12|COMPLETED|None|n1|N/A|" + ONE, {}, "is not active (COMPLETED)"),
        (["finished"], "12|RUNNING|None|n1|N/A|" + ONE, {}, "has ended already (finished: finished was noted)"),
        ([], "13|RUNNING|None|n1|N/A|" + ONE, {"job": "13"}, "has another job than the one that was shown"),
        ([], "12|RUNNING|None|n1|N/A|slurm-20261125-000000-ffff|one", {"token": "slurm-20261125-000000-ffff"},
         "has another job than the one that was shown"),
    ],
)  # fmt: skip
def test_cancel_looks_again_after_the_answer(
    place: Place, capsys: pytest.CaptureFixture[str], terminal: list[Callable[[], str]],
    told: list[str], queued: str, changes: dict[str, str], sentence: str,
) -> None:  # fmt: skip
    run = place.run("one")
    tell(run, "started")
    place.queue("12|RUNNING|None|n1|N/A|" + ONE)
    place.command("scancel")

    def answer() -> str:
        tell(run, *told)
        place.queue(queued)
        (run / "job.json").write_text(json.dumps(json.loads((run / "job.json").read_text()) | changes))
        return "y"

    terminal.append(answer)
    assert place.type("cancel", "one") == program.KNOWN_ERROR
    assert sentence in capsys.readouterr().err
    assert place.called("scancel") == []


def test_cancel_changes_nothing_where_the_job_is_gone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("one")
    tell(run, "submitted", "started", "stopped:preempted")
    place.command("scancel")
    before = events.read(run)
    assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
    assert "is not active (stopped)" in capsys.readouterr().err
    assert events.read(run) == before
    assert place.called("scancel") == []


def test_cancel_interrupts_the_launcher_on_this_machine_only(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.run("one", "local")
    with held(run) as process:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(status, "this_host", lambda: "another")
            assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
            assert f"held by process {process.pid} on {socket.gethostname()}" in capsys.readouterr().err
        lock = run / "run.lock"
        lock.write_text(lock.read_text().replace(str(process.pid), str(os.getpid())))  # a number that was given again
        assert place.type("cancel", "one", "--yes") == program.KNOWN_ERROR
        lock.write_text(lock.read_text().replace(str(os.getpid()), str(process.pid)))
        assert process.poll() is None
        assert place.type("cancel", "one", "--yes") == 0
        assert process.wait(timeout=60) == 7
    assert place.called("squeue") == []
