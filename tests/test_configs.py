"""Every recipe builds its network, shares its batches over the GPUs it is meant for, and refers to what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from data_pipeline.augment import parse_rand_augment
from dgt.config import Config, load
from dgt.tasks import ClassificationConfig, build_task
from dgt.training.optim import build_optimizer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_its_network_and_optimizer_and_shares_its_batches(name: str) -> None:
    config = load(RECIPES[name])
    with torch.device("meta"):
        network = build_task(config.task, config.model, config.data).build_model()
    build_optimizer(network, config.optimizer)
    if config.data.augment.rand_augment:
        parse_rand_augment(config.data.augment.rand_augment)
    for ranks in (1, 8) if "in1k" in name or "in22k" in name else (1, 2):
        assert config.steps.share(ranks) % 2 == 0
        assert config.steps.share(ranks) % min(config.steps.micro_batch_size, config.steps.share(ranks)) == 0
    assert config.schedule.warmup_epochs < config.steps.epochs
    assert config.mixing.off_epoch < config.steps.epochs
    assert config.schedule.min_lr < config.optimizer.lr


def test_every_size_has_every_kind_of_imagenet_recipe() -> None:
    kinds = ("in1k", "in1k_384", "in22k", "in22k_in1k")
    assert {f"dgt_{size}_{kind}" for size in "tsb" for kind in kinds} <= RECIPES.keys()


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "epochs", "batch"),
    [
        ("dgt_t_in1k", 1e-3, 0.05, 300, 1024),
        ("dgt_t_in1k_384", 1e-5, 1e-8, 30, 1024),
        ("dgt_t_in22k", 1e-3, 0.01, 90, 4096),
        ("dgt_t_in22k_in1k", 5e-5, 1e-8, 30, 512),
    ],
)
def test_the_numbers_are_those_that_a_recipes_comment_names(
    name: str, lr: float, weight_decay: float, epochs: int, batch: int
) -> None:
    config = load(RECIPES[name])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (lr, weight_decay)
    assert (config.steps.epochs, config.steps.global_batch_size) == (epochs, batch)


@pytest.mark.parametrize("size", "tsb")
def test_segmentation_of_ade20k_follows_the_recipe_with_which_backbones_are_compared(size: str) -> None:
    config = load(RECIPES[f"upernet_dgt_{size}_ade20k"])
    assert (config.steps.total_steps, config.steps.global_batch_size, config.data.num_classes) == (160_000, 16, 150)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.betas) == (6e-5, 0.01, (0.9, 0.999))
    assert (config.schedule.decay, config.schedule.power, config.schedule.warmup_steps) == ("polynomial", 1.0, 1500)
    assert (config.data.segmentation.crop_size, config.data.segmentation.scale) == (512, (0.5, 2.0))
    assert config.steps.share(8) == config.steps.micro_batch_size == 2


@pytest.mark.parametrize("size", "tsb")
@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize(
    ("schedule", "epochs", "milestones", "sides"),
    [("1x", 12, (8, 11), (800,)), ("3x", 36, (27, 33), tuple(range(480, 801, 32)))],
)
def test_detection_on_coco_follows_the_recipe_with_which_backbones_are_compared(
    size: str, detector: str, schedule: str, epochs: int, milestones: tuple[int, ...], sides: tuple[int, ...]
) -> None:
    config = load(RECIPES[f"{detector}_dgt_{size}_coco_{schedule}"])
    assert (config.task.detector, config.data.num_classes) == (detector, 80)
    assert (config.steps.epochs, config.steps.global_batch_size) == (epochs, 16)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.betas) == (1e-4, 0.05, (0.9, 0.999))
    assert (config.schedule.decay, config.schedule.milestones, config.schedule.gamma) == ("steps", milestones, 0.1)
    assert (config.schedule.warmup_steps, config.data.augment.horizontal_flip) == (1000, 0.5)
    detection = config.data.detection
    assert (detection.short_sides, detection.long_side, detection.eval_short_side) == (sides, 1333, 800)
    assert config.steps.share(8) == config.steps.micro_batch_size == 2


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if load(path).start.path])
def test_a_fine_tuning_recipe_starts_from_a_run_of_a_recipe_whose_network_it_fits(name: str) -> None:
    config = load(RECIPES[name])
    earlier = load(RECIPES[Path(config.start.path).name.removesuffix(".safetensors")])
    ours, theirs = shapes(config), shapes(earlier)
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert all(key.startswith("head.fc.") for key in differ)
    assert bool(differ) == (config.data.num_classes != earlier.data.num_classes)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_task(config.task, config.model, config.data).build_model()
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def teacher(path: Path) -> str:
    task = load(path).task
    return task.distillation.teacher if isinstance(task, ClassificationConfig) else ""


@pytest.mark.parametrize("name", [name for name, path in RECIPES.items() if teacher(path)])
def test_a_teacher_is_one_that_timm_knows_with_the_same_classes(name: str) -> None:
    config = load(RECIPES[name])
    assert timm.get_pretrained_cfg(config.task.distillation.teacher).num_classes == config.data.num_classes
