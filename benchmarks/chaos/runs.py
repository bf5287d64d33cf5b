"""The runs that are disturbed: small enough for many a minute, with everything on that could break exactness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.config import AugmentConfig, DataConfig, SyntheticConfig
from dgt.config import Config
from dgt.models import ModelConfig
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.mixing import MixingConfig
from dgt.training.monitor import MonitorConfig
from dgt.training.parallel.config import DeepSpeedConfig, EngineConfig
from dgt.training.schedule import ScheduleConfig
from dgt.training.steps import StepsConfig

WORLD_SIZE = 2

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero2": {"name": "deepspeed", "deepspeed": DeepSpeedConfig(stage=2)},
    "zero3": {"name": "deepspeed", "deepspeed": DeepSpeedConfig(stage=3)},
}
"""What is disturbed, by name: the engine's settings."""


def small_run(folder: Path, engine: str) -> Config:
    """dgt_nano at 32 px (64 tokens in stage 1, k = 16: real grouping), five epochs of four steps."""
    return Config(
        name="run",
        output_dir=str(folder),
        seed=3,
        model=ModelConfig(name="dgt_nano", drop_path_rate=0.2),
        data=DataConfig(
            backend="synthetic", num_classes=4, image_size=32, num_threads=1, eval_crop_pct=1.0,
            augment=AugmentConfig(scale=(0.5, 1.0), random_erasing=0.3, interpolation="linear"),
            synthetic=SyntheticConfig(train_samples=34, val_samples=11),
        ),
        steps=StepsConfig(epochs=5, global_batch_size=8, micro_batch_size=2),
        schedule=ScheduleConfig(warmup_epochs=1.5),
        mixing=MixingConfig(),
        ema=EmaConfig(decay=0.9),
        engine=EngineConfig(**ENGINES[engine], precision="fp32", threads=1),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=3),
        monitor=MonitorConfig(log_every=1, tensorboard=False),
    )  # fmt: skip
