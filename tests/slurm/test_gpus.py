"""What the health check makes of the GPUs, with fake nvidia-smi and dmesg programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from health_check_runs import (
    ECC,
    FAILURE,
    H100,
    HEALTHY,
    PENDING,
    RECOVERY,
    RETIRED,
    bare_node,
    check,
    failed,
    gpus,
    nvidia_smi,
    program,
    running,
)


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, of a bare node."""
    return bare_node(tmp_path, monkeypatch)


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


def test_query_that_fails_is_not_made_again_for_its_next_field(programs: Path, tmp_path: Path) -> None:
    calls = nvidia_smi(programs, HEALTHY | {"gpu_uuid": "255 Unknown Error"})
    _, found = check(tmp_path)
    assert list(failed(found)) == ["row remapping", "row remapping failure"]
    assert len(calls.read_text().splitlines()) == 2


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
