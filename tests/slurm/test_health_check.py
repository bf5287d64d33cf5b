"""The health check of a node, with fake nvidia-smi and dmesg programs; the all-reduce between two real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "slurm" / "health_check.py"
spec = importlib.util.spec_from_file_location("health_check", PROGRAM)
assert spec is not None
assert spec.loader is not None
health_check = importlib.util.module_from_spec(spec)
sys.modules["health_check"] = health_check  # its dataclasses look there
spec.loader.exec_module(health_check)

from slurm import gpus, speed  # noqa: E402 - health_check has put its folder on the path

ECC, RETIRED = "ecc.errors.uncorrected.volatile.total", "retired_pages.pending"
PENDING, FAILURE, RECOVERY = "remapped_rows.pending", "remapped_rows.failure", "gpu_recovery_action"
H100 = "NVIDIA H100 80GB HBM3"
HEALTHY = {
    "index": ("0", "1"), "uuid": ("GPU-a", "GPU-b"), "gpu_uuid": ("GPU-a", "GPU-b"), "name": (H100, H100),
    "pci.bus_id": ("00000000:3B:00.0", "00000000:5D:00.0"), RETIRED: ("No", "No"), RECOVERY: ("None", "None"),
    **dict.fromkeys((ECC, PENDING, FAILURE), ("0", "0")),
}  # fmt: skip
"""What each GPU answers to each field."""
Answers = Mapping[str, Sequence[str] | str]
MESSAGES = "[    1.277263] random: crng init done"
NVIDIA_SMI = """\
import json, sys
answers, words = json.load(open({answers!r})), sys.argv[1:]
print(*words, file=open({calls!r}, "a"))
if words == ["-L"]:
    sys.exit(print(answers.get("-L", "")))
fields, rows = words[0].partition("=")[2].split(","), []
for field in fields:
    if isinstance(answers[field], str):
        status, _, said = answers[field].partition(" ")
        print(said)
        sys.exit(int(status))
for values in zip(answers["index"], answers["uuid"], *(answers[field] for field in fields)):
    if "-i" not in words or set(values[:2]) & set(words[words.index("-i") + 1].split(",")):
        rows.append(", ".join(values[2:]))
print("\\n".join(rows) or "No devices were found")
sys.exit(0 if rows else 6)
"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, on a node n1 without NVIDIA devices that no srun has started anything on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "dev").mkdir()
    for name in ("mount", "umount"):  # for small_disk
        (folder / name).symlink_to(shutil.which(name) or "/none")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA_")) or name in ("RANK", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return folder


def program(path: Path, script: str) -> None:
    """A program of one of the shell's own commands."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def nvidia_smi(folder: Path, answers: Answers) -> Path:
    """An nvidia-smi with these answers, or in place of one a status and what it says; returns the list of its calls."""
    calls, told = folder.parent / "calls", folder.parent / "answers"
    told.write_text(json.dumps(answers))
    (folder / "nvidia-smi").write_text(
        f"#!{sys.executable} -SE\n" + NVIDIA_SMI.format(answers=str(told), calls=str(calls))
    )
    (folder / "nvidia-smi").chmod(0o755)
    program(folder / "dmesg", f"echo '{MESSAGES}'")
    return calls


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
    calls = nvidia_smi(programs, HEALTHY)
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 0
    assert found == {
        "GPUs": (True, f"2 visible, 2 wanted, {H100}"),
        "ECC errors": (True, f"{ECC} is 0 on 2 of 2 GPUs"),
        "retired pages": (True, f"{RETIRED} is No on 2 of 2 GPUs"),
        "row remapping": (True, f"{PENDING} is 0 on 2 of 2 GPUs"),
        "row remapping failure": (True, f"{FAILURE} is 0 on 2 of 2 GPUs"),
        "recovery action": (True, f"{RECOVERY} is None on 2 of 2 GPUs"),
        "XID errors": (True, "0 that mean hardware trouble in 24 h, none wanted"),
    }
    asked = [line.split()[0] for line in calls.read_text().splitlines()]
    assert asked == [
        f"--query-gpu=index,uuid,name,pci.bus_id,{ECC},{RETIRED},{RECOVERY}",
        f"--query-remapped-rows=gpu_uuid,{PENDING},{FAILURE}",
    ], "each call of nvidia-smi can take many seconds"


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
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
    nvidia_smi(programs, HEALTHY | {field: (HEALTHY[field][0], value)})
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 1
    assert list(failed(found)) == [name]
    assert failed(found)[name].startswith(f"{field} of GPU-b: {value}; 0, No or None wanted: ")


def test_contained_memory_errors_are_said_and_exclude_nothing(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY | {ECC: ("0", "3")})
    status, found = check(tmp_path)
    assert status == 0
    assert found["ECC errors"] == (True, f"{ECC} of GPU-b: 3: contained errors, as long as no other check fails")


@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]", "N/A", "[Deprecated]", "[Requested functionality]"])
def test_values_that_a_gpu_does_not_tell_are_no_errors(programs: Path, tmp_path: Path, value: str) -> None:
    fields = (ECC, RETIRED, PENDING, FAILURE, RECOVERY)
    nvidia_smi(programs, HEALTHY | dict.fromkeys(fields, (value, value)))
    status, found = check(tmp_path)
    assert status == 0
    assert found["retired pages"] == (True, f"not known: these GPUs do not tell {RETIRED}")
    assert len([text for _, text in found.values() if text.startswith("not known: these GPUs do not tell")]) == 5


def test_fields_that_an_old_driver_does_not_know_are_left_out_and_the_others_judged(
    programs: Path, tmp_path: Path
) -> None:
    no_option = "2 ERROR: Option \"--query-remapped-rows\" is not recognized. Please run 'nvidia-smi -h'."
    no_field = f'2 Field "{RECOVERY}" is not a valid field to query.'
    calls = nvidia_smi(
        programs, HEALTHY | {PENDING: no_option, RECOVERY: no_field, RETIRED: ("No", "Yes"), FAILURE: no_option}
    )
    _, found = check(tmp_path, "--gpus", "2")
    assert list(failed(found)) == ["retired pages"]
    for name, field in (("row remapping", PENDING), ("recovery action", RECOVERY)):
        assert found[name] == (True, f"not known: this driver is too old to be asked for {field}")
    assert len(calls.read_text().splitlines()) == 3, "one more than where all is known"


def test_driver_that_fails_is_quoted_and_not_asked_further(programs: Path, tmp_path: Path) -> None:
    calls = nvidia_smi(programs, {"index": "9 NVIDIA-SMI has failed because it couldn't communicate with the driver."})
    status, found = check(tmp_path)
    assert status == 1
    assert list(found) == ["GPUs", "XID errors"]
    assert "status 9: NVIDIA-SMI has failed because it couldn't communicate" in failed(found)["GPUs"]
    assert len(calls.read_text().splitlines()) == 1


def test_lost_gpu_fails_although_nvidia_smi_lists_the_others(programs: Path, tmp_path: Path) -> None:
    lost = "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error"
    nvidia_smi(programs, HEALTHY | {"index": f"0 {lost}\n0, GPU-a, {H100}"})
    _, found = check(tmp_path)
    assert lost in failed(found)["GPUs"]


MIG = f"""\
GPU 0: {H100} (UUID: GPU-a)
  MIG 3g.40gb     Device  0: (UUID: MIG-1)
  MIG 3g.40gb     Device  1: (UUID: MIG-2)
GPU 1: {H100} (UUID: GPU-b)
  MIG 3g.40gb     Device  0: (UUID: MIG-3)
"""


def test_mig_instances_count_as_gpus(programs: Path, tmp_path: Path) -> None:
    nvidia_smi(programs, HEALTHY | {"-L": MIG})
    assert check(tmp_path, "--gpus", "3")[1]["GPUs"] == (True, f"3 MIG instances visible, 3 wanted, {H100}")
    assert "3 MIG instances visible, 4 wanted" in failed(check(tmp_path, "--gpus", "4")[1])["GPUs"]


def test_mig_instances_of_the_job_are_judged_by_their_own_gpu(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(programs, HEALTHY | {"-L": MIG, PENDING: ("0", "1")})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    status, found = check(tmp_path, "--gpus", "2")
    assert status == 0
    assert found["GPUs"] == (True, f"2 MIG instances visible, 2 wanted, {H100}")
    assert found["row remapping"] == (True, f"{PENDING} is 0 on 1 of 1 GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-4")
    assert "1 MIG instances visible, 2 wanted" in failed(check(tmp_path, "--gpus", "2")[1])["GPUs"]


@pytest.mark.parametrize(
    ("name", "ours", "others"),
    [
        ("CUDA_VISIBLE_DEVICES", "0", "1"), ("CUDA_VISIBLE_DEVICES", "GPU-a", "GPU-b"), ("SLURM_STEP_GPUS", "0", "1"),
        ("SLURM_JOB_GPUS", "0", "1"),
    ],
)  # fmt: skip
def test_gpus_of_another_job_are_not_held_against_the_node(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ours: str, others: str
) -> None:
    nvidia_smi(programs, HEALTHY | {PENDING: ("0", "1"), RECOVERY: ("None", "Reset")})
    program(programs / "dmesg", "echo 'NVRM: Xid (PCI:0000:5d:00): 79, GPU has fallen off the bus.'")
    monkeypatch.setenv(name, ours)
    status, found = check(tmp_path, "--gpus", "1")
    assert (status, found["GPUs"]) == (0, (True, f"1 visible, 1 wanted, {H100}"))
    monkeypatch.setenv(name, others)
    assert list(failed(check(tmp_path, "--gpus", "1")[1])) == ["row remapping", "recovery action", "XID errors"]


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", "NoDevFiles"), ("SLURM_STEP_GPUS", "4,5"), ("SLURM_JOB_GPUS", "")]
)
def test_names_that_do_not_fit_what_is_seen_leave_all_gpus_to_be_judged(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A process that is confined to GPUs 4 and 5 of the node sees them as 0 and 1."""
    nvidia_smi(programs, HEALTHY)
    monkeypatch.setenv(name, value)
    assert check(tmp_path, "--gpus", "2")[1]["GPUs"] == (True, f"2 visible, 2 wanted, {H100}")


def test_hanging_nvidia_smi_is_given_up_and_killed(programs: Path, tmp_path: Path) -> None:
    program(programs / "nvidia-smi", f"echo $$ > {tmp_path}/pid\nexec /bin/sleep 300")
    status, found = check(tmp_path, "--gpus", "2", "--timeout", "0.5")
    assert status == 1
    assert failed(found) == {"GPUs": "nvidia-smi gave no answer within 0.5 s; the driver hangs, reboot the node"}
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while running(pid):
        assert time.monotonic() < deadline, "nvidia-smi still runs"


def test_checks_share_the_time_that_there_is(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths of --limit are for the checks; each is waited for as long as the earlier ones leave."""
    nvidia_smi(programs, HEALTHY)
    limits, now = [], time.monotonic()

    def slow(command: Sequence[str], limit: float) -> tuple[int, str]:
        nonlocal now
        limits.append(round(limit))
        now += 20
        return 0, ""

    monkeypatch.setattr(gpus.time, "monotonic", lambda: now)
    allowed = gpus.Time.of(30, 0.8 * 50)
    monkeypatch.setattr(gpus, "run", slow)
    asked = gpus.Gpus(allowed)
    asked.listed()
    asked.state(next(question for question in gpus.QUESTIONS if question.field == PENDING))
    asked.xid_errors()
    assert limits == [30, 20, 0]


def running(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("number", "text"), [(1, f"1 visible, 2 wanted, {H100}; "), (0, "0 visible, 2 wanted; ")])
def test_missing_gpus_fail(programs: Path, tmp_path: Path, number: int, text: str) -> None:
    nvidia_smi(programs, {field: values[:number] for field, values in HEALTHY.items()})
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
    program(programs / "dmesg", "exec /bin/sleep 300")
    text = "not known: the kernel's messages cannot be read here (dmesg gave no answer within 1 s)"
    assert check(tmp_path, "--timeout", "1")[1]["XID errors"] == (True, text)


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
    assert gpus.fatal_xids(line, uptime=1000 + 24 * 3600 + 1) == ([line] if counts else [])


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
    ended, asked = threading.Event(), []
    original = health_check.write_atomically

    def hangs(path: Path, text: str) -> None:
        asked.append(text)
        if len(asked) == 1:
            ended.wait(30)
        original(path, text)

    monkeypatch.setattr(health_check, "write_atomically", hangs)
    report = health_check.Report(tmp_path, "n1", gpus.Time.of(0.2, 60))
    for number in range(3):
        report.make(health_check.Check(f"check {number}", lambda: gpus.Finding(True, "fine"), None))
    assert len(asked) == 1
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
