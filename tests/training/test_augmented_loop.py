"""Repeated augmentation and progressive resizing in the loop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small import small_config

from data_pipeline.config import SyntheticConfig
from data_pipeline.loader import build_loader
from dgt.training.monitor import MonitorConfig
from dgt.training.sample_log import surviving_samples
from dgt.training.trainer import train


def test_repeated_augmentation_keeps_the_epochs_length_and_shows_each_sample_in_several_ways(tmp_path: Path) -> None:
    config = small_config(tmp_path, monitor=MonitorConfig(log_every=1, log_samples=True))
    augment = dataclasses.replace(config.data.augment, repeats=2)
    synthetic = SyntheticConfig(train_samples=64, val_samples=8)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, augment=augment, synthetic=synthetic),
        steps=dataclasses.replace(config.steps, epochs=1, global_batch_size=32, micro_batch_size=16),
    )
    assert train(config).step == 64 // 32
    served = [sample for ids in surviving_samples(config.run_dir).values() for sample in ids]
    assert len(served) == 64
    assert len(set(served)) == 32
    assert all(served.count(sample) == 2 for sample in served)

    loader = build_loader(
        config.data, "train", train=True, global_batch_size=32, rank=0, world_size=1, seed=config.seed
    )
    with loader:
        batches = list(loader)
    ids = torch.cat([batch.ids for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    for sample in ids.unique().tolist():
        first, second = images[ids == sample]
        assert not torch.equal(first, second)
    assert not (ids[0::2] == ids[1::2]).any(), "neighbours are mixed: never a sample with its own copy"


def test_progressive_resizing_changes_the_training_images_of_the_epoch_alone(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, image_size_schedule=((0, 24), (1, 40)), image_size=32)
    )
    outcome = train(config)
    assert outcome.step == 8
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    sizes = [line["data/image_size"] for line in lines if "data/image_size" in line]
    assert sizes == [24.0] * 4 + [40.0] * 4
    assert outcome.metrics is not None
    assert outcome.metrics["samples"] == pytest.approx(19)
