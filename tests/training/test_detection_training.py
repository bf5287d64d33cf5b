"""Detection through the whole loop, on prepared shards; its evaluation whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from data_pipeline.config import DataConfig, DetectionDataConfig
from data_pipeline.loader import build_loader
from data_pipeline.prepare.cli import main
from dgt.config import Config
from dgt.models import ModelConfig
from dgt.models.rcnn_config import HeadsConfig, RPNConfig
from dgt.tasks import DetectionConfig, build_task
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.evaluate import Inference, evaluate
from dgt.training.mixing import MixingConfig
from dgt.training.monitor import MonitorConfig
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig
from dgt.training.schedule import ScheduleConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train
from dgt.training.world import joined

COLOURS = ((220, 60, 40), (50, 80, 220))
VAL_SIZES = [(64, 64), (48, 80), (80, 56), (64, 96), (40, 40)]


def scene(number: int, size: tuple[int, int]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Up to three rectangles of two classes on noise; every fifth image has none, every seventh a crowd."""
    rng = np.random.default_rng(number)
    height, width = size
    image = rng.integers(90, 150, (height, width, 3))
    objects = []
    for i in range(0 if number % 5 == 4 else int(rng.integers(1, 4))):
        w, h = rng.integers(12, 25, 2).tolist()
        left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        category = int(rng.integers(0, 2))
        image[top : top + h, left : left + w] = COLOURS[category]
        outline = [left, top, left + w, top, left + w, top + h, left, top + h]
        objects.append(
            {
                "id": 10 * number + i + 1,
                "image_id": number,
                "category_id": 5 + category,
                "bbox": [left, top, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [outline],
            }
        )
    if objects and number % 7 == 6:
        runs = {"size": [height, width], "counts": [0, height * width]}
        objects[-1] |= {"iscrowd": 1, "segmentation": runs, "bbox": [0, 0, width, height]}
    return image.astype(np.uint8), objects


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    sizes = {"train": [((64, 64), (56, 80))[i % 2] for i in range(24)], "val": VAL_SIZES}
    (folder / "source" / "annotations").mkdir(parents=True)
    for first, (split, of_split) in zip((100, 200), sizes.items(), strict=True):
        (folder / "source" / split).mkdir()
        content: dict[str, list[Any]] = {"images": [], "annotations": []}
        for number, (height, width) in enumerate(of_split, first):
            image, objects = scene(number, (height, width))
            Image.fromarray(image).save(folder / "source" / split / f"{number}.png")
            content["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
            content["annotations"] += objects
        categories = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
        (folder / "source" / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(content | {"categories": categories})
        )
    arguments = ["--src", str(folder / "source"), "--out", str(folder / "shards"), "--splits", "train", "val"]
    assert main(["coco", *arguments, "--jobs", "1"]) == 0
    return folder / "shards"


def configured(folder: Path, shards: Path) -> Config:
    rpn = RPNConfig(anchor_sizes=(8, 16, 32, 64, 128), pre_nms=60, post_nms=40, anchors_per_image=32)
    heads = HeadsConfig(rois_per_image=16, hidden_features=32, mask_convs=1, mask_channels=16)
    return Config(
        name="run",
        output_dir=str(folder),
        task=DetectionConfig(fpn_channels=16, rpn=rpn, heads=heads),
        model=ModelConfig(name="dgt_nano", drop_path_rate=0.1),
        data=DataConfig(
            path=str(shards),
            num_classes=2,
            num_threads=1,
            detection=DetectionDataConfig(short_sides=(48, 64), long_side=96, eval_short_side=64),
        ),
        steps=StepsConfig(total_steps=24, global_batch_size=8, micro_batch_size=4, evaluate_every_epochs=0),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(decay="steps", milestones=(7,), warmup_steps=3, min_lr=0.0),
        mixing=MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
        ema=EmaConfig(decay=0.0),
        engine=EngineConfig(name="ddp", precision="fp32", threads=1),
        checkpoint=CheckpointConfig(every_steps=24),
        monitor=MonitorConfig(log_every=1, tensorboard=False),
    )


def test_training_lowers_the_loss_and_ends_with_coco_metrics(tmp_path: Path, shards: Path) -> None:
    config = configured(tmp_path, shards)
    metrics = train(config).metrics
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 24
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    assert metrics["samples"] == len(VAL_SIZES)
    assert {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"} <= metrics.keys()
    assert all(0 <= metrics[name] <= 100 for name in ("box_ap", "mask_ap"))
    network, counted = build_task(config.task, config.model, config.data).build_model(), set()
    for line in lines[:24]:
        macs = 1e12 * line["speed/model_tflops"] * line["speed/step_seconds"] / (6 * 8)
        long = int(line["data/image_size"])
        canvases = [(h, w) for h in (32, 64, 96) for w in (32, 64, 96) if max(h, w) == long]
        assert any(macs == pytest.approx(network.macs(h, w)) for h, w in canvases)  # type: ignore[operator]
        counted.add(long)
    assert len(counted) > 1, "each step counts its images at its own canvas"


def evaluated(config: Config) -> Any:
    """Totals and records of an evaluation by this world, with weights that follow from the seed."""
    with joined() as world:
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        task = build_task(config.task, config.model, config.data)
        with build_loader(
            config.data, "val", kind=task.kind, train=False, global_batch_size=2 * world.size, rank=world.rank,
            world_size=world.size, seed=config.seed,
        ) as loader:  # fmt: skip
            found = evaluate(Inference(task.build_model(), world, config.engine), task, loader)
        assert found is not None
        return found.totals, found.records


def test_an_evaluation_by_two_ranks_is_exactly_that_by_one(tmp_path: Path, shards: Path) -> None:
    config = configured(tmp_path, shards)
    one = run_ranks(1, evaluated, config)[0].value
    two = run_ranks(2, evaluated, config)
    for totals in (one[0], *(rank.value[0] for rank in two)):
        assert totals.tolist() == [len(VAL_SIZES)]
    assert two[1].value[1] == {}
    assert one[1].keys() == two[0].value[1].keys() == set(range(len(VAL_SIZES)))
    for sample, record in two[0].value[1].items():
        alone = one[1][sample]
        assert record.truth == alone.truth
        assert len(record.detected.scores) > 5
        for name in ("boxes", "scores", "labels"):
            assert np.array_equal(getattr(record.detected, name), getattr(alone.detected, name))
        assert record.detected.masks == alone.detected.masks
