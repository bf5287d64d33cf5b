"""`launch/jobs.py` list, status, and what is known of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from run_folders import ONE, REPORT, TOKEN, Place, held, report, tell

from launch import events, jobs, program, runs, status, tables


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder of runs on a machine with a Slurm."""
    made = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    return made


@pytest.mark.parametrize(
    ("told", "queued", "accounted", "state", "active"),
    [
        (["submitted"], "12|PENDING|Resources||N/A|" + ONE, "", "PENDING", True),
        (["submitted", "started"], "12|RUNNING|None|n[1-2]|N/A|" + ONE, "", "RUNNING", True),
        (["submitted", "started", "stopped:crash", "requeued"], "12|PENDING|BeginTime||N/A||one", "", "PENDING", True),
        (["submitted", "started", "finished"], "12|COMPLETED|None|n1|N/A|" + ONE, "", "finished", False),
        (["submitted", "started", "finished", "submitted"], "12|RUNNING|None|n1|N/A|" + ONE, "", "RUNNING", True),
        (["submitted", "started", "stopped:error", "gave-up"], "", "12|FAILED|one", "failed", False),
        (["submitted", "started", "stopped:crash", "gave-up"], "", "", "gave up", False),
        (["submitted", "started", "stopped:signal", "gave-up"], "", "12|FAILED|one", "stopped", False),
        (["submitted", "started", "cancelled", "stopped:cancelled"], "", "", "cancelled", False),
        (["submitted", "started"], "12|TIMEOUT|TimeLimit|n1|N/A|" + ONE, "", "TIMEOUT", False),
        (["submitted", "started"], "", "12|NODE_FAIL|one", "NODE_FAIL", False),
        (["submitted", "started", "stopped:preempted", "requeued"], "", "12|CANCELLED by 1000|one", "CANCELLED", False),
        (["submitted", "started", "stopped:preempted", "requeued"], "", "", "vanished", False),
        (["submitted", "started", "stopped:preempted"], "", "", "stopped", False),
        (["submitted", "started"], "12|RUNNING|None|n1|N/A|slurm-20270101-000000-ffff|one", "", "vanished", False),
        (["submitted", "started"], "12|RUNNING|None|n1|N/A|billed to a|b|other", "", "vanished", False),
        (["submitted", "started"], "12|RUNNING|None|n1|N/A||other", "", "vanished", False),
        (["submitted", "started"], "12|RUNNING|None|n1|N/A|billed to a|b|one", "", "RUNNING", True),
        (["submitted", "started"], "13|RUNNING|None|n1|N/A|" + ONE, "", "vanished", False),
        (["submitted", "started"], "", "12|FAILED|other", "vanished", False),
        (["submitted", "started"], "", "12|RUNNING|one", "vanished", False),
        (["submitted"], "", "", "never started", False),
        (["submitted"], "12|REVOKED|None||N/A|" + ONE, "", "REVOKED", False),
        (["submitted", "started", "finished"], "12|COMPLETING|None|n1|N/A|" + ONE, "", "finished", True),
        (["submitted", "started", "cancelled"], "12|COMPLETING|None|n1|N/A|" + ONE, "", "cancelled", True),
        (["started", "stopped:crash", "requeued"], "12|COMPLETING|None|n1|N/A|" + ONE, "", "COMPLETING", True),
        (["submitted", "started", "finished", "cancelled", "stopped:cancelled"], "", "", "finished", False),
        (["submitted", "started", "cancelled", "finished"], "", "", "finished", False),
        (["submitted", "started", "stopped:crash", "gave-up", "cancelled"], "", "", "gave up", False),
        (["submitted", "started", "stopped:preempted", "cancelled", "requeued"], "", "", "cancelled", False),
        (["started", "stopped:crash", "gave-up", "submitted"], "", "", "gave up", False),
        (["started", "stopped:crash", "gave-up"], "", "", "gave up", False),
        (["started", "stopped:signal", "gave-up", "submitted"], "", "12|FAILED|one", "stopped", False),
        (["started", "submitted"], "", "", "vanished", False),
    ],
)  # fmt: skip
def test_state_is_slurms_word_or_the_end_that_the_run_has_noted(
    place: Place, told: list[str], queued: str, accounted: str, state: str, active: bool
) -> None:
    run = place.run("one")
    tell(run, *told)
    place.queue(*[queued] if queued else [])
    if accounted:
        place.command("sacct", accounted)
    (found,) = status.collect([run])
    assert (found.state, found.is_active) == (state, active)


@pytest.mark.parametrize(
    ("end", "state"), [("finished", "finished"), ("failed", "failed"), ("interrupted", "stopped")]
)  # fmt: skip
def test_markers_tell_the_end_of_a_local_job_that_noted_none(place: Place, end: str, state: str) -> None:
    run = place.run("one", "local")
    tell(run, "submitted", "started")
    runs.leave_marker(str(run / "jobs" / "local-20261124-053612-1a2b.0"), end, {"step": 8})  # type: ignore[arg-type]
    (found,) = status.collect([run])
    assert (found.state, found.is_active) == (state, False)
    events.note(run, "started", "the next attempt", attempt=1, token="local-20261124-053612-1a2b")
    (found,) = status.collect([run])
    assert found.state == "vanished", "the marker is an earlier attempt's"


def test_a_job_that_was_complete_when_it_was_cancelled_is_finished(place: Place) -> None:
    run = place.run("one")
    runs.leave_marker(str(run / "jobs" / f"{TOKEN}.0"), "finished", {"step": 8})
    tell(run, "submitted", "started", "cancelled", "stopped:cancelled")
    (found,) = status.collect([run])
    assert (found.state, found.detail) == ("finished", "training is complete after step 8")


def test_events_belong_to_the_submission_that_they_name(place: Place) -> None:
    run = place.run("one", token="slurm-20261125-000000-ffff")
    tell(run, "submitted", "started", "stopped:time limit", token=TOKEN)
    tell(run, "started", "finished", "cancelled", token="slurm-20261124-120000-ffff")
    tell(run, "started", "stopped:crash", "requeued", "started", "stopped:crash", "gave-up")  # the disk was full before
    (found,) = status.collect([run])
    assert (found.state, found.detail, found.story.is_final) == ("gave up", "gave-up was noted", True)
    assert [(one.reason, one.is_resubmission) for one in found.story.restarts] == [
        ("time limit", True), ("finished", True), ("crash", False),
    ]  # fmt: skip


def test_a_submission_without_a_number_is_found_by_its_token(place: Place) -> None:
    run = place.run("one", job="")
    place.queue("77|PENDING|Priority||N/A|" + ONE)
    (found,) = status.collect([run])
    assert (found.job, found.state, found.detail) == ("77", "PENDING", "Priority")


def test_a_submission_that_was_cut_off_is_not_what_the_job_before_was(place: Place) -> None:
    run = place.run("one", token="slurm-20261125-000000-ffff", job="")
    tell(run, "submitted", "started", "finished", token=TOKEN)
    (found,) = status.collect([run])
    assert (found.state, found.story.end) == ("never started", None)
    place.queue("77|PENDING|Priority||N/A|slurm-20261125-000000-ffff|one")
    (found,) = status.collect([run])
    assert (found.state, found.story.is_final) == ("PENDING", False)


def test_one_question_to_slurm_serves_all_runs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        place.run(f"r{number}", job=str(number))
        tell(place.folder / f"r{number}", "submitted", "started")
    place.queue("3|RUNNING|None|n1|N/A|" + TOKEN + "|r3")
    (place.folder / "no_run").mkdir()
    assert place.type("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [f"r{number}", "RUNNING" if number == 3 else "vanished", str(number)] for number in range(5)
    ]
    assert len(place.called("squeue")) == 1
    assert len(place.called("sacct")) == 1


def test_a_slurm_that_does_not_answer_hides_nothing_else(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(place.run("away"), "submitted", "started")
    tell(place.run("done", job="11"), "submitted", "started", "finished")
    tell(place.run("here", "local"), "submitted", "started", "stopped:signal")
    place.command("squeue", errors="Unable to contact slurm controller", code=1)
    assert place.type("list") == 0
    said = capsys.readouterr()
    states = {line.split()[0]: line.split()[1] for line in said.out.splitlines()[1:]}
    assert states == {"away": "unknown", "done": "finished", "here": "stopped"}
    assert said.err == "dgt-jobs: Slurm does not answer: Unable to contact slurm controller\n"
    assert place.type("cancel", "away", "--yes") == program.KNOWN_ERROR
    (place.bin / "squeue").unlink()
    monkeypatch.setenv("PATH", str(place.bin))
    assert place.type("list") == 0
    assert "no squeue on this machine" in capsys.readouterr().err


def test_table_tells_progress_by_value_and_fits_a_terminal(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("a_run_whose_name_is_far_too_long_for_most_tables")
    tell(run, "submitted", "started", "stopped:preempted", "requeued", "started")
    report(run, {"step": 100, "train/loss": 0.51239, "speed/images_per_s": 812.4, "speed/step_seconds": 18.0})
    place.queue("12|RUNNING|None|n[1-2]|N/A|" + ONE)
    assert place.type("list") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert line.split()[:-2] == [
        run.name, "RUNNING", "12", "n[1-2]", "100/500", "20", "%", "2.0", "h", "0.5124", "812.4", "1", "preempted",
    ]  # fmt: skip
    found = status.collect([run])
    for width in (40, 80, 120):
        columns, (cells,) = tables.fitting(found, width)
        widths = [max(len(column.title), len(cell)) for column, cell in zip(columns, cells, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= width
        assert [column.title for column in columns][:2] == ["run", "state"]
    assert tables.fitting(found, None)[0] == list(tables.COLUMNS)
    assert tables.COLOURS["CANCELLED"] == tables.COLOURS["cancelled"]
    assert header.split() == " ".join(column.title for column in tables.COLUMNS).split()


def test_status_page_tells_all_of_one_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("one")
    earlier = ("submitted", "started", "stopped:preempted", "requeued", "started", "stopped:time limit")
    tell(run, *earlier, token="slurm-20261123-000000-ffff")
    tell(run, "submitted")
    events.note(run, "started", "again", attempt=3, nodes=["n3"], step=100, token=TOKEN)
    events.note(run, "node-excluded", "n4 is bad", node="n4", token=TOKEN)
    report(
        run,
        {"step": 50, "val/top1": 61.5, "val/loss": 1.5},
        {"step": 90, "val/top1": 60.0, "val/loss": 1.25},
        {"step": 100, "train/loss": None, "speed/images_per_s": 812.4, "speed/step_seconds": 9.0,
         "speed/data_wait": 0.25, "speed/memory_gb": 61.27},
    )  # fmt: skip
    newest = run / "checkpoints" / "step_00000090"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text(json.dumps({"progress": {"best_metric": 61.5, "best_step": 50}}))
    place.queue("12|RUNNING|None|n3|N/A|" + ONE)
    assert place.type("status", "one") == 0
    page = capsys.readouterr().out
    told = dict(line.split("  ", 1) for line in page.split("\n\n")[0].splitlines() if line[0] != " ")
    told = {label: text.strip() for label, text in told.items()}
    assert told["state"] == "RUNNING"
    assert told["job"] == "Slurm job 12, 2 nodes x 4 processes, submitted 2026-11-24 05:36:12"
    assert told["nodes"] == "n3"
    assert told["attempt"].startswith("3, started 20")
    assert told["step"] == "100/500 (20 %), epoch 2 of 10, 1 h 00 min left"
    assert told["loss"] == "nan"
    assert told["evaluation"] == "top1 60, loss 1.25 (step 90)"
    assert told["best"] == "top1 61.5 (step 50)"
    assert told["speed"] == "812.4 images/s, 25 % of the time spent waiting for data"
    assert told["memory"] == "61.3 GB at most on rank 0"
    assert told["checkpoint"].startswith("step_00000090, ")
    assert told["restarts"] == "2"
    reasons = [line.split("after: ")[1] for line in page.splitlines() if "after: " in line]
    assert reasons == ["preempted", "time limit, submitted again, from step 100"]
    assert told["excluded"] == "n4"
    assert told["logs"] == str(run / "logs")
    assert [line.split()[-1] for line in page.split("\n\n")[1].splitlines()] == ["0", "it"]
    assert "logs one -f" in page
    assert "cancel one" in page
    assert place.type("status", str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out)["progress"]["loss"] is None


def test_the_total_is_read_from_the_line_that_training_writes(tmp_path: Path) -> None:
    from dgt.training.monitor import Monitor, MonitorConfig, Resumed, Size
    from dgt.training.run_folder import RunFolder
    from launch import progress

    size = Size(1250, 125, 8, 1)
    monitor = Monitor(MonitorConfig(), RunFolder(tmp_path), size, Resumed(), is_main=False)
    rates = {"speed/step_seconds": 1.0, "speed/images_per_s": 8.0, "speed/data_wait": 0.0}
    log = tmp_path / "rank-0.log"
    log.write_text("".join(f"2026  {monitor.line(s, {'train/loss': 1.0, 'train/lr': 0.1}, rates)}\n" for s in (1, 126)))
    assert progress.last_report(log) == (2, 10, 1250)


def test_the_total_is_found_before_much_other_output_but_not_at_any_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import progress

    log = tmp_path / "rank-0.log"
    chatter = "n1:12:34 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC\n"
    line = REPORT.format(step=100) + "\n"
    for block in range(1, 120, 7):  # wherever the line is cut
        monkeypatch.setattr(progress, "LOG_BLOCK_BYTES", 300 + block)
        log.write_text(chatter + line + chatter * 20)
        assert progress.last_report(log) == (2, 10, 500)
    log.write_text(line + line.replace("500", "600") + chatter * 20)
    assert progress.last_report(log) == (2, 10, 600), "not the last one"
    monkeypatch.setattr(progress, "LOG_SEARCH_BYTES", 500)
    assert progress.last_report(log) == (None, None, None)


def test_time_left_is_told_only_while_it_trains(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("one")
    tell(run, "submitted", "started")
    report(run, {"step": 100, "train/loss": 0.5, "speed/step_seconds": 9.0})
    for state, left in (("RUNNING", 3600.0), ("PENDING", None), ("COMPLETING", None)):
        place.queue(f"12|{state}|None||N/A|{ONE}")
        (found,) = status.collect([run])
        assert found.seconds_left == left
        place.type("status", "one")
        assert ("1 h 00 min left" in capsys.readouterr().out) == (left is not None)
        assert tables.fitting([found], None)[1][0][6] == ("1.0 h" if left else "-")


def test_expected_start_is_told_in_this_machines_time(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("one")
    place.queue("12|PENDING|Priority||2026-11-24T05:36:12|" + ONE)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        place.type("status", "one")
        assert "to start at 2026-11-24 14:36:12" in capsys.readouterr().out, "Slurm is asked for UTC"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_jobs_of_other_users_are_not_called_vanished(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, story in (("theirs", "started"), ("ended", "finished"), ("mine", "started")):
        tell(place.run(name), "submitted", story)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(status, "owner", lambda run: 1000 if run.name == "mine" else 2000)
    found = {one.name: one for one in status.collect(status.all_runs(place.folder))}
    assert {name: (one.state, one.is_active) for name, one in found.items()} == {
        "theirs": ("unknown", None), "ended": ("finished", False), "mine": ("vanished", False),
    }  # fmt: skip
    assert [len(found[name].problems) for name in ("theirs", "ended", "mine")] == [1, 0, 0]
    status.collect([place.folder / "theirs"])
    assert "--user=1000,2000" in place.called("squeue")[-1], "squeue ignores users who are not known here"
    place.command("sacct", "12|TIMEOUT|theirs")
    assert {one.name: one.state for one in status.collect(status.all_runs(place.folder))}["theirs"] == "TIMEOUT"


def test_what_cannot_be_read_of_a_run_hides_no_other(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("no_log", "no_record", "no_story", "whole")):
        tell(place.run(name, job=str(number)), "submitted", "started", "stopped:time limit")
    for name, file in (("no_story", "events.jsonl"), ("no_log", "metrics.jsonl"), ("no_record", "job.json")):
        (place.folder / name / file).unlink(missing_ok=True)
        (place.folder / name / file).mkdir()  # root can read whatever is a file
    assert place.type("list") == 0
    said = capsys.readouterr()
    states = [line.rsplit(maxsplit=11)[0].split(maxsplit=1) for line in said.out.splitlines()[1:]]
    assert {line[0]: line[1].split()[0] for line in states} == {
        "no_log": "stopped", "no_record": "damaged", "no_story": "unknown", "whole": "stopped",
    }  # fmt: skip
    for name, file in (("no_story", "events.jsonl"), ("no_log", "metrics.jsonl"), ("no_record", "job.json")):
        assert f"{place.folder / name / file}" in said.err
    place.queue(f"2|RUNNING|None|n1|N/A|{TOKEN}|no_story")
    (found,) = status.collect([place.folder / "no_story"])
    assert (found.state, found.is_active) == ("RUNNING", True)


def test_a_run_that_is_deleted_meanwhile_hides_no_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, whole = place.run("gone"), place.run("whole")
    tell(whole, "submitted", "started", "finished")
    real = status.owner
    monkeypatch.setattr(status, "owner", lambda run: real(place.folder / "nothing" if run == gone else run))
    assert [found.state for found in status.collect([gone, whole])] == ["never started", "finished"]


def test_damage_is_said_and_concerns_one_run_only(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    broken, whole = place.run("broken"), place.run("whole", "local")
    (broken / "job.json").write_text("{")
    tell(whole, "started")
    report(whole, {"step": 5, "train/loss": 1.0})
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "trai\n{"step": 7, "train/loss": 2.0}\n{"step": 8')
    assert place.type("status", "broken") == program.KNOWN_ERROR
    assert f"{broken / 'job.json'} cannot be read" in capsys.readouterr().err
    assert place.type("list") == 0
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()[1:]] == [["broken", "damaged"], ["whole", "vanished"]]
    assert str(broken / "job.json") in said.err
    assert place.type("status", "whole") == 0
    page = capsys.readouterr().out
    assert "metrics.jsonl: 1 damaged line passed over" in page
    assert "step          7" in page


def test_unknown_names_get_near_ones_and_other_folders_are_no_runs(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run("dgt_base")
    for words, sentence in {
        ("status", "dgt_bse"): "there is no run dgt_bse; did you mean dgt_base?",
        ("logs", str(tmp_path)): f"{tmp_path} is no run: it has none of config.yaml, job.json, events.jsonl",
        ("events", "x", "--runs", "/nowhere"): "there is no run x; there are no runs in /nowhere",
        ("list", "--runs", "/nowhere"): "/nowhere, the folder of all runs: No such file or directory",
    }.items():
        given = words if "--runs" in words else (*words, "--runs", str(place.folder))
        assert jobs.main(list(given)) == program.KNOWN_ERROR
        said = capsys.readouterr()
        assert sentence in said.err
        assert (said.out, len(said.err.splitlines())) == ("", 1)


@pytest.mark.parametrize("linux_lists_it", [True, False])
def test_a_held_lock_makes_a_local_run_active(
    place: Place, linux_lists_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linux_lists_it:
        monkeypatch.setattr(status, "is_listed", lambda descriptor: False)
    run = place.run("one", "local")
    tell(run, "submitted", "started", "finished", token="local-20261123-000000-ffff")
    tell(run, "submitted", "started")
    with held(run) as process:
        (found,) = status.collect([run])
        assert (found.state, found.is_active) == ("running", True)
        assert found.detail == f"process {process.pid} on {socket.gethostname()}"
    (found,) = status.collect([run])
    assert (found.state, found.is_active) == ("vanished", False)
    with runs.locked(run):  # looking at it has left no lock behind
        assert status.lock_holder(run) == f"process {os.getpid()} on {socket.gethostname()}"


def test_it_starts_from_anywhere_without_torch(place: Place, tmp_path: Path) -> None:
    tell(place.run("one", "local"), "submitted", "started", "finished")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['jobs.py', 'status', 'one', '--runs', {str(place.folder)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(REPOSITORY / 'launch' / 'jobs.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "state         finished: finished was noted" in done.stdout
    piped = f"{sys.executable} {REPOSITORY / 'launch' / 'jobs.py'} --runs {place.folder} status one | head -n 1"
    shown = subprocess.run(piped, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (shown.stdout.split(), shown.stderr) == (["run", str(place.folder / "one")], "")
