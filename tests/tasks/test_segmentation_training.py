"""Segmentation through the whole loop, on prepared shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from data_pipeline.config import AugmentConfig, DataConfig, SegmentationDataConfig
from data_pipeline.prepare.cli import main
from dgt.config import Config
from dgt.models import ModelConfig
from dgt.tasks import SegmentationConfig, build_task
from dgt.tasks.segmentation_config import UPerNetConfig
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.mixing import MixingConfig
from dgt.training.monitor import MonitorConfig
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig
from dgt.training.schedule import ScheduleConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train
from launch import weights

CLASSES = 3
COLOURS = np.array([[200, 60, 40], [40, 180, 70], [50, 70, 210]])
VAL_SIZES = [(32, 48), (64, 96), (48, 32), (32, 32), (80, 64)]  # resized to multiples of 4


def scene(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of blocks of colour with noise, and the classes of its pixels, some of them ignored (255)."""
    coarse = rng.integers(0, CLASSES, (3, 3)).astype(np.uint8)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 3 // width
    mask = coarse[rows][:, columns]
    image = np.clip(COLOURS[mask] + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    mask[:2] = 255
    return image, mask


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[np.ndarray, np.ndarray]]]:
    """A prepared set, and the images and masks of its validation split."""
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    sets = {
        "train": [scene(40, 52, rng) for _ in range(24)],
        "val": [scene(*size, rng) for size in VAL_SIZES],
    }
    for split, scenes in sets.items():
        for part in ("images", "annotations"):
            (folder / "source" / part / split).mkdir(parents=True)
        for i, (image, mask) in enumerate(scenes):
            Image.fromarray(image).save(folder / "source" / "images" / split / f"{i:02}.png")
            Image.fromarray(mask).save(folder / "source" / "annotations" / split / f"{i:02}.png")
    arguments = ["--src", str(folder / "source"), "--out", str(folder / "shards"), "--ignore", "255"]
    assert main(["segmentation", *arguments, "--class-names", "red,green,blue"]) == 0
    return folder / "shards", sets["val"]


def configured(folder: Path, shards: Path) -> Config:
    return Config(
        name="run",
        output_dir=str(folder),
        task=SegmentationConfig(head=UPerNetConfig(channels=32, auxiliary_channels=16, norm_groups=8)),
        model=ModelConfig(name="dgt_nano", drop_path_rate=0.1),
        data=DataConfig(
            path=str(shards),
            num_classes=CLASSES,
            num_threads=1,
            augment=AugmentConfig(),
            segmentation=SegmentationDataConfig(
                crop_size=32, short_side=32, long_side=128, max_class_share=1.0, photometric_distortion=False
            ),
        ),
        steps=StepsConfig(total_steps=20, global_batch_size=8, micro_batch_size=4, evaluate_every_epochs=0),
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.01),
        schedule=ScheduleConfig(decay="polynomial", warmup_steps=3, min_lr=0.0),
        mixing=MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
        ema=EmaConfig(decay=0.0),
        engine=EngineConfig(name="ddp", precision="fp32", threads=1),
        checkpoint=CheckpointConfig(every_steps=20),
        monitor=MonitorConfig(log_every=1, tensorboard=False),
    )


def test_training_lowers_the_loss_and_its_evaluation_is_that_of_a_direct_computation(
    tmp_path: Path, shards: tuple[Path, list[tuple[np.ndarray, np.ndarray]]]
) -> None:
    config = configured(tmp_path, shards[0])
    metrics = train(config).metrics
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])

    task = build_task(config.task, config.model, config.data)
    network = task.build_model().eval()
    network.load_state_dict(weights.read(weights.find(config.run_dir / "checkpoints", "newest"), network, None)[0])
    confusion, mean, std = np.zeros((CLASSES, CLASSES)), config.data.mean, config.data.std
    for image, mask in shards[1]:
        height, width = mask.shape
        size = [height * 32 // min(height, width), width * 32 // min(height, width)]
        pixels = functional.resize(torch.from_numpy(image).permute(2, 0, 1), size, antialias=True)
        x = functional.normalize(pixels.float() / 255, mean, std)[None]
        with torch.no_grad():
            answer = F.interpolate(network(x), size=(height, width), mode="bilinear").argmax(1)[0].numpy()
        np.add.at(confusion, (mask[mask < 255], answer[mask < 255]), 1)
    right, truth, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    expected = {
        "miou": 100 * np.mean(right / (truth + guessed - right)),
        "macc": 100 * np.mean(right / truth),
        "pixel_acc": 100 * right.sum() / truth.sum(),
        "samples": len(VAL_SIZES),
    }
    # rounding may decide between equal classes: one of the pixels of a class, of which there are thousands
    assert min(truth) > 2000
    assert metrics == pytest.approx(expected, abs=100 / 2000)
    assert metrics["miou"] > 50
