"""The health check of a node, with fake nvidia-smi and dmesg programs; the all-reduce between two real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "slurm" / "health_check.py"
spec = importlib.util.spec_from_file_location("health_check", PROGRAM)
assert spec is not None
assert spec.loader is not None
health_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(health_check)

ECC, RETIRED = "ecc.errors.uncorrected.volatile.total", "retired_pages.pending"
PENDING, FAILURE, RECOVERY = "remapped_rows.pending", "remapped_rows.failure", "gpu_recovery_action"
GPUS = "0, GPU-a, NVIDIA H100 80GB HBM3\n1, GPU-b, NVIDIA H100 80GB HBM3"
HEALTHY = {"name": GPUS, **dict.fromkeys((ECC, PENDING, FAILURE), "GPU-a, 0\nGPU-b, 0"),
           RETIRED: "GPU-a, No\nGPU-b, No", RECOVERY: "GPU-a, None\nGPU-b, None"}  # fmt: skip
MESSAGES = "[    1.277263] random: crng init done"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, on a node n1 without NVIDIA devices that no srun has started anything on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "dev").mkdir()
    for name in ("mount", "umount"):  # for small_disk
        (folder / name).symlink_to(shutil.which(name) or "/none")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(health_check, "DEVICES", tmp_path / "dev")
    for name in [name for name in os.environ if name.startswith("SLURM") or name in ("RANK", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return folder


def program(path: Path, script: str) -> None:
    """A program of one of the shell's own commands."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def nvidia_smi(folder: Path, answers: Mapping[str, str | tuple[int, str]]) -> None:
    """An nvidia-smi that answers by the last field of the query, with status 0 or the given one."""
    cases = []
    for field, answer in answers.items():
        status, text = answer if isinstance(answer, tuple) else (0, answer)
        cases.append(f"--query-*{field}) printf '%s\\n' {shlex.quote(text)}; exit {status};;")
    program(folder / "nvidia-smi", 'case "$1" in\n' + "\n".join(cases) + "\n*) exit 99;;\nesac")
    program(folder / "dmesg", f"echo '{MESSAGES}'")


def check(tmp_path: Path, *options: str) -> tuple[int, dict[str, tuple[bool, str]]]:
    """Exit status, and what the report of n1 says of each check."""
    status = health_check.main([*options, "--report", str(tmp_path / "reports")])
    report = json.loads((tmp_path / "reports" / "n1.json").read_text())
    assert report["node"] == "n1"
    assert report["ok"] == all(entry["ok"] for entry in report["checks"]) == (status == 0)
    return status, {entry["name"]: (entry["ok"], entry["text"]) for entry in report["checks"]}


def failed(found: Mapping[str, tuple[bool, str]]) -> dict[str, str]:
    """The texts of what is not well."""
    return {name: text for name, (ok, text) in found.items() if not ok}


def test_healthy_gpus_pass_with_the_values_that_were_measured(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY)
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 0
    assert found == {
        "GPUs": (True, "2 visible, 2 wanted, NVIDIA H100 80GB HBM3"),
        "ECC errors": (True, f"{ECC} is 0 on 2 of 2 GPUs"),
        "retired pages": (True, f"{RETIRED} is No on 2 of 2 GPUs"),
        "row remapping": (True, f"{PENDING} is 0 on 2 of 2 GPUs"),
        "row remapping failure": (True, f"{FAILURE} is 0 on 2 of 2 GPUs"),
        "recovery action": (True, f"{RECOVERY} is None on 2 of 2 GPUs"),
        "XID errors": (True, "0 that mean hardware trouble in 24 h, none wanted"),
    }


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        (ECC, "3", "ECC errors"),
        (ECC, "[GPU requires reset]", "ECC errors"),
        (RETIRED, "Yes", "retired pages"),
        (PENDING, "1", "row remapping"),
        (PENDING, "Yes", "row remapping"),
        (FAILURE, "1", "row remapping failure"),
        (RECOVERY, "Node Reboot Required", "recovery action"),
        (RECOVERY, "[Unknown Error]", "recovery action"),
    ],
)
def test_one_bad_value_fails_and_names_the_gpu(
    programs: Path, tmp_path: Path, field: str, value: str, name: str
) -> None:
    good = HEALTHY[field].splitlines()[0]
    nvidia_smi(programs, HEALTHY | {field: f"{good}\nGPU-b, {value}"})
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 1
    assert list(failed(found)) == [name]
    assert failed(found)[name].startswith(f"{field} of GPU-b: {value}; 0, No or None wanted: ")


@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]", "N/A"])
def test_values_that_a_gpu_does_not_have_are_no_errors(programs: Path, tmp_path: Path, value: str) -> None:
    nvidia_smi(programs, dict.fromkeys(HEALTHY, f"GPU-a, {value}") | {"name": "0, GPU-a, NVIDIA L4"})
    status, found = check(tmp_path)
    assert status == 0
    assert found["retired pages"] == (True, f"not known: these GPUs do not tell {RETIRED}")
    assert len([text for _, text in found.values() if text.startswith("not known: these GPUs do not tell")]) == 5


def test_queries_that_an_old_driver_does_not_know_are_no_errors(programs: Path, tmp_path: Path) -> None:
    no_option = (2, "ERROR: Option \"--query-remapped-rows\" is not recognized. Please run 'nvidia-smi -h'.")
    no_field = (2, f'Field "{RECOVERY}" is not a valid field to query.')
    nvidia_smi(programs, HEALTHY | {PENDING: no_option, FAILURE: no_option, RECOVERY: no_field})
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 0
    for name, field in (("row remapping", PENDING), ("recovery action", RECOVERY)):
        assert found[name] == (True, f"not known: this driver is too old to be asked for {field}")


def test_driver_that_fails_is_quoted_and_not_asked_further(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, {"name": (9, "NVIDIA-SMI has failed because it couldn't communicate with the driver.")})
    status, found = check(tmp_path)
    assert status == 1
    assert list(found) == ["GPUs", "XID errors"]
    assert "status 9: NVIDIA-SMI has failed because it couldn't communicate" in failed(found)["GPUs"]


def test_lost_gpu_fails_although_nvidia_smi_lists_the_others(programs: Path, tmp_path: Path) -> None:
    lost = "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error"
    nvidia_smi(programs, HEALTHY | {"name": f"{lost}\n{GPUS.splitlines()[0]}"})
    _, found = check(tmp_path)
    assert lost in failed(found)["GPUs"]


def test_hanging_nvidia_smi_is_given_up_and_killed(programs: Path, tmp_path: Path) -> None:
    program(programs / "nvidia-smi", f"echo $$ > {tmp_path}/pid\nexec /bin/sleep 300")
    status, found = check(tmp_path, "--gpus", "2", "--timeout", "0.5")
    assert status == 1
    assert failed(found) == {"GPUs": "nvidia-smi gave no answer within 0.5 s; the driver hangs, reboot the node"}
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while running(pid):
        assert time.monotonic() < deadline, "nvidia-smi still runs"


def running(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("0, GPU-a, NVIDIA L4", "1 visible, 2 wanted, NVIDIA L4; "),
        ((6, "No devices were found"), "0 visible, 2 wanted; "),
    ],
)
def test_missing_gpus_fail(programs: Path, tmp_path: Path, answer: str | tuple[int, str], text: str) -> None:
    nvidia_smi(programs, HEALTHY | {"name": answer})
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 1
    assert failed(found)["GPUs"].startswith(text)


def test_more_gpus_than_the_job_uses_are_well(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY)
    assert check(tmp_path, "--gpus", "1")[0] == 0


def test_node_without_nvidia_smi_passes_where_nothing_could_be_asked(tmp_path: Path) -> None:
    for options, text in (((), "no nvidia-smi"), (("--gpus", "2"), "no nvidia-smi, 2 wanted")):
        assert check(tmp_path, *options) == (0, {"GPUs": (True, f"{text}: nothing could be asked")})


def test_device_without_nvidia_smi_fails_only_where_gpus_are_demanded(tmp_path: Path) -> None:
    (tmp_path / "dev" / "nvidia0").touch()
    assert check(tmp_path)[0] == 0
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 1
    assert failed(found)["GPUs"].startswith(f"no nvidia-smi, but {tmp_path}/dev has nvidia0, 2 wanted")


def test_job_without_gpus_does_not_ask_a_broken_driver(programs: Path, tmp_path: Path) -> None:
    program(programs / "nvidia-smi", "exit 9")
    assert check(tmp_path, "--gpus", "0") == (0, {})


def test_kernel_messages_about_broken_gpus_fail_newest_first(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY)
    lines = [
        "NVRM: Xid (PCI:0000:3b:00): 48, pid=1, first",
        "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
    ]
    program(programs / "dmesg", "\n".join(f"echo '{line}'" for line in lines))
    status, found = check(tmp_path)
    assert status == 1
    assert failed(found)["XID errors"].endswith(f"newest: {lines[1]} | {lines[0]}")
    assert failed(found)["XID errors"].startswith("2 that mean hardware trouble in 24 h, none wanted")


def test_kernel_messages_that_may_not_be_read_are_no_error(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY)
    refusal = "dmesg: read kernel buffer failed: Operation not permitted"
    program(programs / "dmesg", f"echo '{refusal}'; exit 1")
    text = f"not known: the kernel's messages cannot be read here ({refusal})"
    assert check(tmp_path)[1]["XID errors"] == (True, text)
    (programs / "dmesg").unlink()
    assert check(tmp_path)[1]["XID errors"][0]


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("[86401.000000] NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.", True),
        ("[ 1000.000000] NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.", False),
        ("NVRM: Xid (0000:3b:00): 48, An uncorrectable double bit error", True),
        ("[86401.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, MMU Fault", False),
        ("[86401.000000] NVRM: Xid (PCI:0000:3b:00): 94, pid=7, Contained: SM", False),
        ("[86401.000000] NVRM: Xid (PCI:0000:3b:00): 119, pid=7, Timeout waiting for RPC", True),
        ("[86401.000000] usb 1-1: new device 79", False),
    ],
)
def test_xid_errors_count_where_they_are_fatal_and_of_the_last_day(line: str, counts: bool) -> None:
    assert health_check.fatal_xids(line, uptime=1000 + 24 * 3600 + 1) == ([line] if counts else [])


def test_shared_folder_of_the_batch_script_passes_and_stays_clean(tmp_path: Path) -> None:
    jobs = tmp_path / "run" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / "slurm-1.shared").write_text("slurm-1\n")
    status, found = check(tmp_path, "--shared", str(tmp_path / "run"), "--token", "slurm-1")
    assert status == 0
    assert found["shared folder"] == (True, f"{tmp_path}/run can be written and is that of the batch script")
    assert found["clock"] == (True, "differs by 0.0 s from the file server's, at most 5 s wanted")
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
    status, found = check(tmp_path, "--free", "$SCRATCH=0.04", "--free", f"{small_disk}=0.06")
    assert status == 1
    assert found["free space in $SCRATCH"] == (True, "0.05 GB, 0.04 GB wanted")
    text = "0.05 GB, 0.06 GB wanted; remove what old jobs left there"
    assert found[f"free space in {small_disk}"] == (False, text)


def test_missing_scratch_fails_with_its_path(tmp_path: Path) -> None:
    _, found = check(tmp_path, "--free", f"{tmp_path}/none=1")
    assert f"No such file or directory: '{tmp_path}/none'" in failed(found)[f"free space in {tmp_path}/none"]


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


def test_all_reduce_of_one_rank_has_nothing_to_measure(tmp_path: Path) -> None:
    status, found = check(tmp_path, "--allreduce-gb-s", "100", "--gpus", "0")
    assert (status, found) == (0, {"all-reduce": (True, "there is only one rank, so nothing is exchanged")})


def test_report_says_that_an_all_reduce_began_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that aborts the process leaves this report."""
    during = []

    def all_reduce(wanted: float) -> Any:
        during.append(json.loads((tmp_path / "reports" / "n1.json").read_text()))
        return health_check.Finding(True, f"{wanted}")

    monkeypatch.setattr(health_check, "all_reduce", all_reduce)
    status, found = check(tmp_path, "--allreduce-gb-s", "100", "--gpus", "0")
    assert (status, found) == (0, {"all-reduce": (True, "100.0")})
    assert not during[0]["ok"]
    assert [entry["name"] for entry in during[0]["checks"]] == ["all-reduce"]
    assert during[0]["checks"][0]["text"].startswith("did not end")


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
