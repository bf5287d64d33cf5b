"""slurm/health_check.py as tests run it: on a bare node, with programs of their own as nvidia-smi and dmesg."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "slurm" / "health_check.py"
spec = importlib.util.spec_from_file_location("health_check", PROGRAM)
assert spec is not None
assert spec.loader is not None
health_check = importlib.util.module_from_spec(spec)
sys.modules["health_check"] = health_check  # its dataclasses look there
spec.loader.exec_module(health_check)

from slurm import gpus  # noqa: E402 - health_check has put its folder on the path

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


def bare_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this a node n1 without NVIDIA devices that no srun has started anything on; the only folder on its PATH."""
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


def running(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
