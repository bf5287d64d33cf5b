"""Tiny sets for dense tasks, drawn once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.prepare import main as prepare


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A set of drawn shapes for each dense task: 14 images to train on and 7 held out, of 64 pixels."""
    found = {}
    for task in ("segmentation", "detection"):
        out = found[task] = tmp_path_factory.mktemp(task) / "shapes"
        assert prepare(["shapes", "--task", task, "--out", str(out), *OPTIONS]) == 0
    return found


OPTIONS = ("--train", "14", "--val", "7", "--size", "64", "--jobs", "1")
