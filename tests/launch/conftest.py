"""A tiny run on synthetic images, and a real Slurm of four nodes on this machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import local_slurm, runs
from launch.runs import JobRecord, LaunchError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
name: tiny
output_dir: {folder}
model: {{name: dgt_nano, drop_path_rate: 0.1}}
data: {{backend: synthetic, num_classes: 4, image_size: 32, num_threads: 0}}
steps: {{epochs: 2, global_batch_size: 8, micro_batch_size: 4, evaluate_every_epochs: 0}}
engine: {{name: fsdp, precision: fp32, threads: 1}}
checkpoint: {{every_steps: 3, keep_last: 2}}
monitor: {{log_every: 1, tensorboard: false}}
"""
PATIENCE = 120
"""Seconds after which something that a test waits for will not come."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Eight steps of four samples for each of two ranks; the run is `tmp_path`/runs/tiny."""
    return write_config(tmp_path)


def write_config(folder: Path) -> Path:
    """The configuration, for runs in `folder`/runs."""
    values = yaml.safe_load(CONFIG.format(folder=folder / "runs"))
    values["data"]["synthetic"] = {"train_samples": 32, "val_samples": 9}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_slurm_record(run: Path, job: str) -> None:
    """Makes a Slurm job the last one of the run."""
    token = "slurm-20260101-000000-abcd"
    record = JobRecord("slurm", token, job, 2, 8, True, ("rank",), str(run), {}, "2026-01-01T00:00:00", "here")
    runs.write_record(run, record)


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Looks until `happened` is true."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.05)


def steps_logged(run: Path) -> list[int]:
    """The training steps in metrics.jsonl, in order."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row["step"] for row in rows if "train/loss" in row]


def has_step(run: Path, step: int) -> bool:
    """Whether the run has logged this step."""
    return (run / "metrics.jsonl").exists() and step in steps_logged(run)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_slurm.LocalSlurm]:
    """The cluster of `launch.local_slurm`; skips where Slurm is not installed, but not under CI."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with local_slurm.running(folder) as cluster:
            yield cluster
    except LaunchError as error:
        if os.environ.get("CI") == "true" or "not found" not in str(error):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def empty_queue(slurm: local_slurm.LocalSlurm) -> Iterator[None]:
    """Takes the jobs of a test that has failed out of the next one's way."""
    yield
    local_slurm.clear(slurm)


@pytest.fixture(scope="session")
def undisturbed(slurm: local_slurm.LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run of tests/launch/slurm_runs.py comes to where nobody disturbs it, on the same cluster."""
    from slurm_runs import Run, result

    run = Run(slurm, tmp_path_factory.mktemp("undisturbed")).start()
    run.wait_for_end()
    return result(run.folder)
