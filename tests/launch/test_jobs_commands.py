"""`launch/jobs.py` logs, events, resume and tensorboard."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import types
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, wait_for
from run_folders import ONE, Place, held, tell

import launch
from launch import events, follow, program, status


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder of runs on a machine with a Slurm."""
    made = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    return made


def test_logs_shows_the_end_of_a_log(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "BLOCK_BYTES", 16)
    logs = place.run("one") / "logs"
    logs.mkdir()
    lines = [f"line {number} of it\n" for number in range(100)]
    (logs / "rank-1.log").write_text("".join(lines))
    (logs / "rank-0.log").write_text("cut off")
    (logs / "batch.log").write_text("batch\n")
    for words, text in {
        ("--rank", "1"): "".join(lines[-50:]),
        ("--rank", "1", "-n", "3"): "".join(lines[-3:]),
        ("--rank", "1", "-n", "0"): "",
        ("--rank", "1", "-n", "all"): "".join(lines),
        (): "cut off",
        ("--batch",): "batch\n",
    }.items():
        assert place.type("logs", "one", *words) == 0
        assert capsys.readouterr().out == text
    assert place.type("logs", "one", "--rank", "7") == program.KNOWN_ERROR
    expected = "rank-7.log; there is those of ranks 0 to 1 and that of the batch script (--batch)\n"
    assert capsys.readouterr().err.endswith(expected)


def test_logs_follow_until_the_run_has_ended(place: Place) -> None:
    run = place.run("one", "local")
    shown = place.folder / "shown"
    command = [sys.executable, str(REPOSITORY / "launch" / "jobs.py"), "--runs", str(place.folder), "logs", "one", "-f"]
    with ExitStack() as stack:
        holder = stack.enter_context(held(run))
        output = stack.enter_context(shown.open("wb"))
        following = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE)
        stack.callback(following.kill)
        assert following.stderr is not None
        assert b"waiting for " in following.stderr.readline()
        (run / "logs").mkdir()
        with (run / "logs" / "rank-0.log").open("ab", buffering=0) as log:
            log.write("before the crash, ä".encode()[:-1])
            wait_for(lambda: shown.read_bytes() == b"before the crash, ", "the first line")
            log.write("ä\n".encode()[1:] + b"after it\n")
            wait_for(lambda: shown.read_text() == "before the crash, ä\nafter it\n", "the second line")
            log.write(b"the last words\n")
        tell(run, "submitted", "started", "finished")
        holder.kill()
        assert b"the run is finished" in following.communicate(timeout=60)[1]
        assert following.returncode == 0
        assert shown.read_text() == "before the crash, ä\nafter it\nthe last words\n"


def test_a_log_that_was_emptied_is_followed_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("new\n")
    follow.follow(follow.Log(log, begin=100), has_ended=lambda: True)
    assert capsys.readouterr().out == "new\n"


class Counted:
    """A file of which every read is noted."""

    def __init__(self, file: Any, asked: list[int]):
        self.file, self.asked, self.seek = file, asked, file.seek

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        self.asked.append(size)
        return self.file.read(size)


def test_a_long_log_is_read_in_pieces_and_each_of_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "rank-0.log"
    text = "".join(f"line {number}, ä\n" for number in range(2000))
    log.write_text(text)
    asked: list[int] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(opened(path, mode), asked))
    monkeypatch.setattr(follow, "BLOCK_BYTES", 1000)
    begin = follow.last_lines(log, 1500)
    assert text.encode()[begin:].decode() == "".join(text.splitlines(keepends=True)[-1500:])
    assert 0 < min(asked) <= max(asked) <= 1000
    assert sum(asked) < len(text.encode()) + 1000
    asked.clear()
    follow.Log(log).show()
    assert capsys.readouterr().out == text
    assert max(asked) == 1000


def test_a_requeued_job_is_followed_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.0)
    run = place.run("one")
    watch = follow.Watch([run])
    tell(run, "submitted", "started", "stopped:preempted", "requeued")
    place.queue("12|PENDING|BeginTime||N/A||one" + ONE)
    assert not watch.has_ended()
    place.command("squeue", errors="Unable to contact slurm controller", code=1)
    assert not watch.has_ended()
    place.queue("12|COMPLETING|None|n1|N/A|" + ONE)
    assert not watch.has_ended()
    tell(run, "started", "finished")
    assert watch.has_ended()
    assert watch.found[0].end == "finished"


def test_a_cancelled_run_is_followed_until_it_has_saved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LEAVING_SECONDS", 0.0)
    run = place.run("one")
    watch = follow.Watch([run])
    tell(run, "submitted", "started", "cancelled", "stopped:cancelled")
    place.queue("12|COMPLETING|None|n1|N/A|" + ONE)
    assert not watch.has_ended()
    place.queue("12|CANCELLED|None|n1|N/A|" + ONE)
    assert watch.has_ended()
    assert watch.found[0].end == "cancelled"


def test_a_run_whose_record_is_damaged_is_not_followed_for_good(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "follow", lambda *_: pytest.fail("it is followed"))
    (place.run("one") / "job.json").write_text("{")
    assert place.type("logs", "-f", "one") == program.KNOWN_ERROR
    assert "job.json cannot be read" in capsys.readouterr().err


def test_a_run_that_slurm_still_runs_has_ended_when_it_says_so(place: Place) -> None:
    run = place.run("one")
    tell(run, "submitted", "started", "finished")
    place.queue("12|RUNNING|None|n1|N/A|" + ONE)
    (found,) = status.collect([run])
    assert (found.state, found.has_left, found.end) == ("RUNNING", True, "finished")


def test_events_are_a_timeline(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("one")
    assert place.type("events", "one") == 0
    assert "nothing is noted" in capsys.readouterr().out
    tell(run, "submitted", "stopped:node failure")
    assert place.type("events", "one") == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [[part.strip() for part in row if part.strip()][1:] for row in rows] == [
        ["submitted", "submitted was noted"],
        ["stopped (node failure)", "stopped:node failure was noted"],
    ]
    assert place.type("events", "one", "--json") == 0
    assert json.loads(capsys.readouterr().out) == events.read(run)


def test_resume_hands_the_run_over_unless_there_is_nothing_to_resume(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Path] = []
    monkeypatch.setattr(
        launch, "submission", types.SimpleNamespace(resume=lambda run: handed.append(run) or 0), raising=False
    )
    place.run("never", cluster=None)
    done = place.run("done", "local")
    tell(done, "submitted", "started", "finished")
    stopped = place.run("stopped")
    tell(stopped, "submitted", "started", "stopped:crash", "gave-up")
    assert place.type("resume", "never") == program.KNOWN_ERROR
    assert "was never submitted" in capsys.readouterr().err
    assert place.type("resume", "done") == program.KNOWN_ERROR
    assert "under another --name with more steps.epochs" in capsys.readouterr().err
    (done / "config.yaml").write_text("steps: {max_steps: 40}\n")
    assert place.type("resume", "done") == program.KNOWN_ERROR
    assert "it ended at steps.max_steps=40" in capsys.readouterr().err
    assert handed == []
    assert place.type("resume", "stopped") == 0
    assert handed == [stopped]


def listening(port: int) -> list[str]:
    """Addresses, as Linux prints them, on which someone listens at this port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, is_listening = line.split()[1], line.split()[3] == "0A"
            if is_listening and int(address.rpartition(":")[2], 16) == port:
                found.append(address.rpartition(":")[0])
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_serves_this_machine_only_and_leaves_nothing(
    place: Place, tmp_path: Path, number: signal.Signals
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for name in ("first", "second"):
        writer = SummaryWriter(str(place.run(name, "local") / "tensorboard"))
        writer.add_scalar("train/loss", 1.0, 1)
        writer.close()
    place.run("without", "local")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(REPOSITORY / "launch" / "jobs.py"), "tensorboard", "--runs", str(place.folder)]
    board = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, text=True)
    try:
        assert board.stdout is not None
        lines = [board.stdout.readline().strip() for _ in range(4)]
        port = int(lines[0].split("localhost:")[1].split("/")[0])
        assert lines[0] == f"TensorBoard: http://localhost:{port}/   (first, second)"
        assert lines[2] == f"ssh -N -L {port}:localhost:{port} {status.user()}@{socket.gethostname()}"
        assert listening(port) == ["0100007F"], "not 127.0.0.1 alone"
        served = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=60).read())
        assert set(served) <= {"first", "second"}
        wait_for(lambda: runs_served(port) == ["first", "second"], "both runs")
        board.send_signal(number)
        assert board.wait(timeout=60) == 130
        assert listening(port) == []
        assert list(scratch.glob("dgt-curves-*")) == []
    finally:
        board.terminate()
        board.communicate(timeout=60)


def runs_served(port: int) -> list[str]:
    """The runs that TensorBoard has read so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=60) as answer:
        return sorted(json.loads(answer.read()))


def test_tensorboard_says_what_is_missing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("one", "local")
    assert place.type("tensorboard", "one") == program.KNOWN_ERROR
    assert "no run of these has a tensorboard folder" in capsys.readouterr().err
    (run / "tensorboard").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert place.type("tensorboard", "one", "--port", str(port)) == program.KNOWN_ERROR
        assert f"port {port}: Address already in use" in capsys.readouterr().err
