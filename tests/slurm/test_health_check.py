"""The health check of a node, and of the connections between two, by real processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from health_check_runs import PROGRAM, bare_node, check, failed, gpus, health_check, program, running

from slurm import speed


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, of a bare node."""
    return bare_node(tmp_path, monkeypatch)


def test_shared_folder_of_the_batch_script_passes_and_stays_clean(tmp_path: Path) -> None:
    jobs = tmp_path / "run" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "slurm-1.shared").write_text("slurm-1\n")
    status, found = check(tmp_path, "--shared", str(tmp_path / "run"), "--token", "slurm-1")
    assert status == 0
    assert found["shared folder"] == (True, f"{tmp_path}/run can be written and is that of the batch script")
    assert found["clock"] == (True, "differs by 0.0 s from the one that stamps files there, at most 5 s wanted")
    assert os.listdir(tmp_path / "run") == ["jobs"]
    assert os.listdir(jobs) == ["slurm-1.shared"]


@pytest.mark.parametrize("content", [None, "slurm-0\n", ""])
def test_folder_without_the_batch_scripts_token_is_another_file_system(tmp_path: Path, content: str | None) -> None:
    jobs = tmp_path / "run" / "jobs"
    if content is not None:
        jobs.mkdir(parents=True)
        (jobs / "slurm-1.shared").write_text(content)
    status, found = check(tmp_path, "--shared", str(tmp_path / "run"), "--token", "slurm-1")
    assert status == 1
    wanted = f"{jobs}/slurm-1.shared is not as the batch script wrote it: another file system is mounted"
    assert failed(found)["shared folder"].startswith(wanted)


def test_full_shared_folder_fails(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "data").write_bytes(bytes(64 * 2**20))
    _, found = check(tmp_path, "--shared", str(small_disk))
    sentence = f"{small_disk} cannot be written on this node: No space left on device"
    assert failed(found) == {"shared folder": sentence, "clock": sentence}
    assert os.listdir(small_disk) == ["data"]


def test_free_space_is_compared_with_the_demand(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(small_disk))
    status, found = check(tmp_path, "--free", "$SCRATCH=0.04", "--free", f"{small_disk}=0.06", "--free", "/tmp=0.0")
    assert status == 1
    assert found["free space in $SCRATCH"] == (True, "0.05 GB, 0.04 GB wanted")
    assert found["free space in /tmp"][0], "a place without a demand"
    text = "0.05 GB, 0.06 GB wanted; remove what old jobs left there"
    assert found[f"free space in {small_disk}"] == (False, text)


def test_missing_scratch_fails_with_its_path(tmp_path: Path) -> None:
    _, found = check(tmp_path, "--free", f"{tmp_path}/none=1")
    assert f"No such file or directory: '{tmp_path}/none'" in failed(found)[f"free space in {tmp_path}/none"]


@pytest.mark.parametrize(("value", "shown"), [(None, "'$NODE_SCRATCH'"), ("", "''"), ("here", "'here'")])
def test_variable_that_names_no_place_fails_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, shown: str
) -> None:
    if value is not None:
        monkeypatch.setenv("NODE_SCRATCH", value)
    _, found = check(tmp_path, "--free", "$NODE_SCRATCH=0")
    words = f"$NODE_SCRATCH is {shown} on this node: a variable is not set, or names no absolute path"
    assert failed(found) == {"free space in $NODE_SCRATCH": words}


@pytest.mark.parametrize(
    ("before", "stamp", "after", "difference"),
    [
        (100.2, 100.3, 100.4, 0),
        (100.2, 100.0, 100.4, 0),  # stamped in whole seconds
        (100.2, 140.0, 150.0, 0),  # a slow write
        (100.2, 90.0, 100.4, 10),
        (100.2, 110.5, 100.5, -10),
    ],
)
def test_clock_difference_counts_from_the_time_of_the_write(
    before: float, stamp: float, after: float, difference: float
) -> None:
    assert health_check.clock_difference(before, stamp, after) == difference


@pytest.mark.parametrize(("server", "word"), [(-60, "ahead"), (60, "behind")])
def test_clock_that_is_off_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: float, word: str) -> None:
    def stamp(descriptor: int) -> None:
        os.utime(descriptor, (time.time() + server,) * 2)

    monkeypatch.setattr(os, "fsync", stamp)
    _, found = check(tmp_path, "--shared", str(tmp_path))
    assert re.match(rf"differs by (59|60)\.\d s .*, at most 5 s wanted: it is {word};", failed(found)["clock"])
    assert check(tmp_path, "--shared", str(tmp_path), "--clock-skew", "61")[0] == 0


NOW = 1_000_000.0
"""The batch script's clock when it starts the check."""


@pytest.mark.parametrize(
    ("started", "node", "server", "words"),
    [
        (0, 0, 0, None),
        (60, 0, 0, None),  # srun takes its time
        (0, -4, 0, None),
        (0, -6, 0, "at least 6.0 s behind the batch script's, at most 5 s wanted"),
        (60, 7, 0, "at least 6.0 s ahead of the batch script's, at most 5 s wanted"),
        (60, 6, 0, None),  # of which a second may be the proof's age
        (60, 50, None, None),  # the node stamps its files itself, as on Lustre: nothing can be told
        (0, 126, None, "at least 6.0 s ahead of the batch script's"),  # the step would have been ended before
        (0, 7, -300, "at least 6.0 s ahead of the batch script's"),
        (0, 0, -300, None),  # the file server's clock is wrong, which harms nobody
        (60, 0, 300, None),
    ],
)
def test_clock_is_compared_with_the_batch_scripts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: float,
    node: float,
    server: float | None,
    words: str | None,
) -> None:
    """The check starts so many seconds after srun, on a node that is ahead, with the file server's clock off, too.

    The batch script's proof is a second old when srun starts.
    """
    proof = tmp_path / "jobs" / "t.shared"
    proof.parent.mkdir()
    proof.write_text("t")
    os.utime(proof, (NOW - 1 + (server or 0),) * 2)
    seen = NOW + started + node
    stamp = seen if server is None else NOW + started + server
    monkeypatch.setattr(health_check, "write_small_file", lambda *_: (seen, stamp, seen))
    options = health_check.parse(["--shared", str(tmp_path), "--token", "t", "--now", str(NOW), "--limit", "120"])
    found = health_check.clock(options, "n1", seen)
    assert found.ok == (words is None)
    assert found.text.startswith(words or "within 5 s of the batch script's")


def test_clock_of_a_node_that_starts_now_is_that_of_the_batch_script(tmp_path: Path) -> None:
    assert check(tmp_path, "--now", str(time.time()))[1]["clock"][0]
    _, found = check(tmp_path, "--now", str(time.time() + 60))
    assert re.match(r"at least (59|60)\.\d s behind the batch script's", failed(found)["clock"])


def test_exception_in_a_check_is_its_finding_and_the_others_are_made(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise(*_: Any) -> None:
        raise KeyError("what\nnobody thought of")

    monkeypatch.setattr(health_check, "free_space", surprise)
    status, found = check(tmp_path, "--free", "/=1", "--shared", str(tmp_path))
    assert status == 1
    assert failed(found) == {"free space in /": "KeyError: 'what\\nnobody thought of'"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "ok    n1  shared folder", "ok    n1  clock", "FAIL  n1  free space in /", "ok    n1  GPUs",
    ]  # fmt: skip


def test_file_system_that_hangs_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(health_check, "free_space", lambda *_: ended.wait(30))
    _, found = check(tmp_path, "--free", "/=1", "--timeout", "0.1")
    assert failed(found) == {"free space in /": "no answer within 0.1 s; it may hang for good"}
    assert found["GPUs"][0]
    ended.set()


def test_report_that_cannot_be_written_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert health_check.main(["--report", str(tmp_path / "file")]) == 1
    assert "FAIL  n1  report: [Errno 17] File exists" in capsys.readouterr().out


def test_only_the_first_task_of_a_node_checks_and_reports(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs / "nvidia-smi", "exit 9")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert health_check.main(["--gpus", "1", "--report", str(tmp_path / "reports")]) == 0
    assert not (tmp_path / "reports").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options",
    [
        ("--gpus", "-1"), ("--gpus", "many"), ("--free", "/tmp"), ("--free", "/tmp=much"), ("--clock-skew", "0"),
        ("--timeout", "inf"), ("--token", "t"), ("--matmul-tflops", "nan"), ("--unknown",), ("argument",),
    ],
)  # fmt: skip
def test_wrong_command_line_ends_with_2(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as left:
        health_check.main(options)
    assert left.value.code == 2


def test_program_needs_no_more_than_python_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", str(PROGRAM), "--shared", str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"ok    n1  shared folder: {tmp_path} can be written\n")


def test_matrix_product_is_compared_with_the_expectation(tmp_path: Path) -> None:
    assert check(tmp_path, "--matmul-tflops", "1e-6", "--gpus", "0")[0] == 0
    _, found = check(tmp_path, "--matmul-tflops", "1e6", "--gpus", "0")
    text = failed(found)["matrix product"]
    assert re.search(r"\b(cpu|cuda:0) [\d.e+-]+.* TFLOP/s, 1e\+06 wanted; ", text)


def test_matrix_product_leaves_no_gpu_in_the_hands_of_the_process_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured by a process that has ended; where it fails, its last words are told."""
    script = (
        f"import os; open('{tmp_path}/pid', 'w').write(str(os.getpid())); print('a warning\\n{{\"cuda:0\": 5e12}}')"
    )
    (tmp_path / "speed.py").write_text(script)
    monkeypatch.setattr(health_check, "SPEED", tmp_path / "speed.py")
    found = check(tmp_path, "--matmul-tflops", "4", "--gpus", "0")[1]
    assert found["matrix product"] == (True, "cuda:0 5 TFLOP/s, 4 wanted")
    assert not running(int((tmp_path / "pid").read_text()))
    (tmp_path / "speed.py").write_text("print('loading'); raise RuntimeError('CUDA error: out of memory')")
    _, found = check(tmp_path, "--matmul-tflops", "1", "--gpus", "0")
    said = "ended with status 1, and said: RuntimeError: CUDA error: out of memory"
    assert failed(found)["matrix product"].endswith(said)


class Reached(Exception):
    """The point that a test is interested in."""


def test_gpu_is_touched_only_when_all_ranks_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(speed.torch.cuda, "device_count", lambda: 2)

    def set_device(device: str) -> None:
        steps.append(device)
        raise Reached

    monkeypatch.setattr(speed.torch.cuda, "set_device", set_device)
    monkeypatch.setattr(speed, "meet", lambda limit: steps.append("met"))
    with pytest.raises(Reached):
        speed.all_reduce(1)
    assert steps == ["met", "cuda:1"]


def test_rank_that_does_not_come_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    store = speed.dist.HashStore()
    monkeypatch.setattr(speed.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 3)]))
    with pytest.raises(RuntimeError, match=r"only 1 of 3 ranks came within 0 s"):
        speed.meet(0.1)
    store.add("came", 1)
    assert speed.meet(0.1) is store, "the third one"


def test_all_reduce_of_one_rank_has_nothing_to_measure(tmp_path: Path) -> None:
    status, found = check(tmp_path, "--allreduce-gb-s", "100", "--gpus", "0")
    assert (status, found) == (0, {"all-reduce": (True, "there is only one rank, so nothing is exchanged")})


@pytest.mark.parametrize(
    ("name", "option", "title"),
    [
        ("shared_folder", ("--shared", "/tmp"), "shared folder"),
        ("free_space", ("--free", "/=1"), "free space in /"),
        ("matrix_product", ("--matmul-tflops", "1"), "matrix product"),
        ("all_reduce", ("--allreduce-gb-s", "1"), "all-reduce"),
    ],
)
def test_report_has_a_check_that_is_under_way_as_one_that_did_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: tuple[str, str], title: str
) -> None:
    """It is what stays where a library aborts the process, or where the whole step is ended."""
    during = []

    def ask(*_: Any) -> Any:
        during.append(json.loads((tmp_path / "reports" / "n1.json").read_text()))
        return gpus.Finding(True, "fine")

    monkeypatch.setattr(health_check, name, ask)
    status, found = check(tmp_path, *option, "--gpus", "0")
    assert (status, found[title]) == (0, (True, "fine"))
    assert (during[0]["ok"], during[0]["checks"][-1]["name"]) == (False, title)
    assert during[0]["checks"][-1]["text"].startswith("did not end")


def test_folder_of_reports_that_hangs_is_tried_again_at_the_end_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, tried = threading.Event(), []
    original = health_check.write_atomically

    class Counted(health_check.Report):  # type: ignore[name-defined, misc]
        def put(self) -> gpus.Finding:
            tried.append(1)
            return super().put()

    def hangs(path: Path, text: str) -> None:
        if len(tried) == 1:
            ended.wait(30)
        original(path, text)

    monkeypatch.setattr(health_check, "write_atomically", hangs)
    report = Counted(tmp_path, "n1", gpus.Time.of(0.2, 60))
    for number in range(3):
        report.make(health_check.Check(f"check {number}", lambda: gpus.Finding(True, "fine"), None))
    assert len(tried) == 1
    assert not report.write()["ok"], "it still hangs"
    ended.set()
    assert report.write()["ok"]
    told = json.loads((tmp_path / "n1.json").read_text())
    assert [entry["name"] for entry in told["checks"]] == ["check 0", "check 1", "check 2"]


def test_all_reduce_of_two_nodes_stands_in_both_reports(tmp_path: Path) -> None:
    """Each is started as by srun; what they expect differs, so one passes and one fails on the same value."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, expected in enumerate(("1e-6", "1e6")):
        srun = {"SLURM_JOB_ID": "7", "SLURM_PROCID": f"{rank}", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}  # fmt: skip
        options = ("--gpus", "0", "--allreduce-gb-s", expected, "--report", str(tmp_path))
        started.append(
            subprocess.Popen([sys.executable, PROGRAM, *options], env=os.environ | srun, stdout=subprocess.PIPE)
        )
    output = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 1], output
    values = []
    for node, ok, wanted in (("n1", True, "1e-06"), ("n2", False, "1e+06")):
        report = json.loads((tmp_path / f"{node}.json").read_text())
        (entry,) = report["checks"]
        assert (report["node"], report["ok"], entry["name"], entry["ok"]) == (node, ok, "all-reduce", ok)
        match = re.match(rf"(\S+) GB/s over 2 ranks \((gloo|nccl)\), {re.escape(wanted)} GB/s wanted", entry["text"])
        assert match, entry["text"]
        values.append(float(match[1]))
    assert values[0] == values[1] > 0  # the slowest rank's time is everybody's
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["n1.json", "n2.json"]
