"""The demo as a newcomer runs it: real digits, two processes, a Ctrl-C on the way, and the promised accuracy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_is_interrupted_resumes_and_keeps_its_promise(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("dgt", "data_pipeline", "launch", "configs", "slurm"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    done = subprocess.run([sys.executable, "-m", "launch.demo"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    stopped = re.search(r"newest checkpoint step_0*(\d+)", done.stdout)
    assert stopped is not None
    assert f"resuming after step {stopped[1]} from" in done.stdout
    assert "stage 1: 256 tokens, 8 groups, each attends to its own top 16 keys" in done.stdout
    run = checkout / "runs" / "dgt_nano_digits"
    outcome = json.loads((run / "demo.json").read_text())
    assert outcome["samples"] == 360
    assert outcome["top1"] >= 98.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "speed/save_seconds" not in row]  # a save is told when it has ended
    assert steps == sorted(steps)
    assert (checkout / "exports" / "dgt_nano_digits.safetensors").stat().st_size > 4_000_000
