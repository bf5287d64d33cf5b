"""A whole run on .beton files, from prepared images to metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_config

from data_pipeline.prepare import main
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train

pytestmark = pytest.mark.ffcv


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of 4 colours, as JPEG and PNG in turn: 32 to train on, 9 to validate."""
    folder = tmp_path / "images"
    colours = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30))
    rng = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 32), ("val", 9)):
        for number in range(count):
            noise = rng.integers(-20, 21, (40, 40, 3))
            pixels = np.clip(np.array(colours[number % 4]) + noise, 0, 255).astype(np.uint8)
            path = folder / split / f"class{number % 4}" / f"{number:02d}.{('jpg', 'png')[number // 4 % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def test_run_on_beton_gives_the_metrics_of_the_run_on_tar_shards(tmp_path: Path, images: Path) -> None:
    metrics = {}
    for backend in ("webdataset", "ffcv"):
        shards = tmp_path / backend
        assert (
            main(["imagefolder", "--src", str(images), "--out", str(shards), "--format", backend, "--jobs", "1"]) == 0
        )
        config = small_config(
            tmp_path / "runs" / backend, steps=StepsConfig(epochs=2, global_batch_size=8, micro_batch_size=4)
        )
        config = replace(config, data=replace(config.data, backend=backend, path=str(shards), decoding="exact"))
        outcome = train(config)
        assert outcome.step == 8
        metrics[backend] = outcome.metrics
    assert metrics["ffcv"]["samples"] == 9
    assert metrics["ffcv"]["loss"] == metrics["webdataset"]["loss"]
    assert metrics["ffcv"]["top1"] == metrics["webdataset"]["top1"]
