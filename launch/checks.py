"""Everything that can be found out before a job starts: configuration, network, batch sizes, data, output folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster import job_state
from launch.runs import LaunchError, read_record

MANY_SIZES = 5
"""Sizes of training images that are compiled without a warning: those of one short side in the default ranges."""

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config


def known_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says all that a person needs; programs print it without a traceback."""
    from data_pipeline.shards.source import DamagedSampleError, DataError
    from dgt.config import ConfigError
    from dgt.training.checkpoint import CheckpointError
    from dgt.training.interrupt import SupersededError
    from dgt.training.run_folder import RunFolderError
    from dgt.training.state import DivergedError

    ours = (LaunchError, ConfigError, CheckpointError, RunFolderError, DivergedError, SupersededError)
    return *ours, DataError, DamagedSampleError


def would_repeat(error: Exception) -> bool:
    """Whether the same job would meet this known error again, so that it is not retried.

    Storage that was full or away for a while may be there again.
    """
    from data_pipeline.shards.source import DamagedSampleError, DataError
    from dgt.training.checkpoint import SaveError, UnreadableError
    from dgt.training.interrupt import SupersededError

    return not isinstance(error, (SaveError, UnreadableError, SupersededError, DataError, DamagedSampleError))


def network(config: Config) -> nn.Module:
    """The configured network without memory for its weights (on torch's meta device).

    Raises ConfigError where the configuration names no network that can be built.
    """
    import torch

    from dgt.config import ConfigError
    from dgt.models import DGTBlock
    from dgt.tasks import build_task
    from dgt.training.parallel import EngineConfig

    try:
        with torch.device("meta"):
            built = build_task(config.task, config.model, config.data).build_model()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    if not any(isinstance(module, DGTBlock) for module in built.modules()):
        defaults = EngineConfig()
        for key in ("activation_checkpointing", "compile", "apex_layer_norm"):
            asked, without = getattr(config.engine, key), getattr(defaults, key)
            if asked != without:
                raise ConfigError(
                    f"engine.{key}: {str(asked).lower()} is for DGT models, and {config.model.name} is none; "
                    f"set it to {str(without).lower()}"
                )
    return built


def beginning(config: Config) -> None:
    """Raises CheckpointError or ConfigError where weights that training needs are not there.

    Those that it starts from are not needed any more once the run has a checkpoint of its own.
    """
    from dgt.training.checkpoint import committed
    from dgt.training.run_folder import RunFolder
    from dgt.training.start import check_kind, find

    if config.start.path and not committed(RunFolder(config.run_dir).checkpoints):
        check_kind(config.start, find(Path(config.start.path)))
    teacher(config)


def teacher(config: Config) -> None:
    """Raises ConfigError where a teacher cannot be had: unknown, without its weights, or with other classes."""
    import torch

    from dgt.config import ConfigError
    from dgt.tasks import ClassificationConfig
    from dgt.tasks.distillation import Teacher

    if not isinstance(config.task, ClassificationConfig) or not config.task.distillation.teacher:
        return
    try:
        Teacher(config.task.distillation, config.data).load(torch.device("cpu"))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def gpu(config: Config) -> None:
    """Raises ConfigError where the optimizer or a norm needs a GPU and this machine has none."""
    import torch

    from dgt.config import ConfigError
    from dgt.tasks import DetectionConfig
    from dgt.training.optim import FROM_APEX

    if torch.cuda.is_available():
        return
    if config.optimizer.name in FROM_APEX:
        raise ConfigError(f"optimizer.name: {config.optimizer.name} needs a CUDA GPU, and this machine shows none")
    if isinstance(config.task, DetectionConfig) and config.task.norm == "sync_batch":
        raise ConfigError("task.norm: sync_batch needs a CUDA GPU, and this machine shows none; set it to group")


def augmentation(config: Config) -> None:
    """Raises ConfigError where the changes to training images cannot be made as they are configured."""
    from data_pipeline.augment import parse_rand_augment
    from dgt.config import ConfigError

    if config.task.name != "classification":  # which alone makes them
        return
    text = config.data.augment.rand_augment
    try:
        if text:
            parse_rand_augment(text)
    except ValueError as error:
        raise ConfigError(f"data.augment.rand_augment: {error}") from None


def batches(config: Config, ranks: int) -> None:
    """Raises ConfigError where a global batch cannot be shared by this number of ranks."""
    from dgt.config import ConfigError

    try:
        share = config.steps.share(ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.mixing.enabled and share % 2:
        raise ConfigError(
            f"steps.global_batch_size: {config.steps.global_batch_size} over {ranks} ranks is {share} samples each; "
            "the number must be even while mixing is on, because neighbouring samples are mixed with each other"
        )


def engine(config: Config, built: nn.Module, ranks: int) -> None:
    """Raises ConfigError where the engine cannot be had with this optimizer, network or number of ranks, or at all."""
    from dgt.config import ConfigError
    from dgt.training.parallel import check_engine, check_network

    try:
        check_engine(config.engine, config.optimizer, ranks)
        check_network(built, ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def evaluation(config: Config, ranks: int) -> None:
    """Raises ConfigError where the evaluation of a dense task cannot be computed, or not on this number of ranks."""
    import importlib.util

    from dgt.config import ConfigError
    from dgt.tasks import DetectionConfig, SegmentationConfig

    task, sharded = config.task, ranks > 1 and shards_weights(config)
    if isinstance(task, SegmentationConfig) and task.inference.mode == "slide" and sharded:
        raise ConfigError(
            f"task.inference.mode: slide passes each image through the network as often as it has windows, while "
            f"{config.engine.name} gathers its weights from {ranks} ranks, which would wait for each other; set it to "
            "whole and evaluate with windows afterwards (launch/evaluate.py), or set engine.name to ddp"
        )
    if isinstance(task, DetectionConfig) and importlib.util.find_spec("pycocotools") is None:
        raise ConfigError(
            "task.name: detection is evaluated by pycocotools, which is not installed; install the extra dgt[dense]"
        )


def sizes_to_compile(config: Config) -> list[str]:
    """A warning where blocks are compiled for many sizes of images, else nothing."""
    from dgt.tasks import DetectionConfig

    if not isinstance(config.task, DetectionConfig) or not config.engine.compile:
        return []
    detection = config.data.detection
    sizes = len(set(detection.short_sides)) * (len(detection.aspect_bounds) + 1)
    if sizes <= MANY_SIZES:
        return []
    return [
        f"engine.compile: training images come in up to {sizes} sizes ({len(set(detection.short_sides))} of "
        f"data.detection.short_sides in {len(detection.aspect_bounds) + 1} ranges of aspect_bounds), and each is "
        "compiled apart, for minutes, in every attempt"
    ]


def shards_weights(config: Config) -> bool:
    """Whether a rank needs the others to compute with whole weights."""
    engine = config.engine
    return engine.name == "fsdp" or (engine.name == "deepspeed" and engine.deepspeed.stage == 3)


def samples(config: Config) -> tuple[int, int]:
    """Number of samples of the training and the validation split. Raises DataError where one cannot be used."""
    from data_pipeline.loader import open_split
    from data_pipeline.shards.source import DataError

    counts = []
    for split in (config.data.train_split, config.data.val_split):
        source = open_split(config.data, split, config.task.name)
        try:
            counts.append(len(source))
        finally:
            source.close()
    if counts[0] < config.steps.global_batch_size:
        raise DataError(
            f"split {config.data.train_split!r} has {counts[0]} samples, fewer than one global batch of "
            f"{config.steps.global_batch_size}; lower steps.global_batch_size"
        )
    if counts[1] == 0:
        raise DataError(f"split {config.data.val_split!r} has no samples")
    masks(config)
    return counts[0], counts[1]


def masks(config: Config) -> None:
    """Raises DataError where objects are to be segmented and the data has their boxes only."""
    from data_pipeline.shards.reader import read_index
    from data_pipeline.shards.source import DataError
    from data_pipeline.shards.storage import without_secrets
    from dgt.tasks import DetectionConfig

    if not isinstance(config.task, DetectionConfig) or not config.task.has_masks:
        return
    if not read_index(config.data).targets.get("masks", True):
        raise DataError(
            f"{without_secrets(config.data.path)} has boxes and no masks, from which a {config.task.detector} cannot "
            "learn; set task.detector to faster_rcnn"
        )


def output_folder(config: Config) -> None:
    """Raises RunFolderError where the run's folder is another run's, LaunchError where it cannot be written."""
    from dgt.training import run_folder

    run_folder.check(run_folder.RunFolder(config.run_dir), run_folder.plain(config))
    nearest = config.run_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise LaunchError(f"output_dir: {nearest} is a file, so {config.run_dir} cannot be made")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LaunchError(f"output_dir: no permission to write in {nearest}")


def not_active(run: Path, own_job: str | None = None) -> None:
    """Raises LaunchError where the run's last job still waits or runs in Slurm, unless that is `own_job`."""
    record = read_record(run)
    if record is None or record.cluster != "slurm" or (own_job is not None and record.job == own_job):
        return
    state = job_state(record)
    if state is not None:
        raise LaunchError(
            f"the run {run.name} is active: {record.name} is {state}. Wait for its end, cancel it with "
            f"`launch/jobs.py cancel {run}`, or choose another --name"
        )


def problems(*checks: Callable[[], object]) -> list[str]:
    """What the checks complain about, one sentence each."""
    found = []
    for check in checks:
        try:
            check()
        except known_errors() as error:
            found.append(str(error))
    return found
