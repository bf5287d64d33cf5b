"""Before a dense task is started: its plan, its memory, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError
from data_pipeline.shards.storage import LocalFolder
from dgt.config import ConfigError, load
from dgt.tasks import build_task
from dgt.training.inputs import StepInputs
from launch import checks, find_micro_batch, memory, plan, submit, traffic
from launch.layout import Layout
from launch.limits import memory as refuse_too_little
from launch.profiles import Profile

HEADS = {
    "segmentation": {"head": {"channels": 16, "auxiliary_channels": 16, "norm_groups": 4}},
    "detection": {
        "fpn_channels": 16,
        "heads": {"rois_per_image": 16, "hidden_features": 16, "mask_convs": 1, "mask_channels": 16},
        "rpn": {"anchor_sizes": [8, 16, 32, 48, 64], "pre_nms": 50, "post_nms": 20},
    },
}


def write(folder: Path, task: str) -> Path:
    """A configuration of the task."""
    values: dict[str, Any] = {
        "name": task, "output_dir": str(folder / "runs"), "task": {"name": task, **HEADS[task]},
        "model": {"name": "dgt_nano"},
        "data": {"num_classes": 5, "path": str(folder / "none"), "segmentation": {"crop_size": 96},
                 "detection": {"short_sides": [64], "long_side": 100, "eval_short_side": 64}},
        "steps": {"total_steps": 9, "global_batch_size": 8, "micro_batch_size": 2},
        "mixing": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "engine": {"name": "ddp", "precision": "fp32"},
    }  # fmt: skip
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("task", "size", "planned"),
    [("segmentation", (96, 96), True), ("detection", (64, 128), False)],
)
def test_a_dry_run_shows_size_and_length_and_says_what_memory_it_cannot_plan(
    task: str, size: tuple[int, int], planned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, task)
    assert submit.main(["--config", str(path), "--dry-run", "--cluster", "local", "--processes-per-node", "2"]) == 0
    text, config = capsys.readouterr().out, load(path)
    network = checks.network(config)
    built = build_task(config.task, config.model, config.data).build_model()
    assert f"{sum(p.numel() for p in built.parameters()):,}" in text
    assert traffic.image_size(config) == size
    assert f"GMACs at {size[0]} x {size[1]}  {network.macs(*size) / 1e9:.3g}" in text  # type: ignore[operator]
    assert "steps             9" in text
    assert f"There is no folder {tmp_path / 'none'}" in text
    assert ("activations (checkpointing: none)" in text) == planned
    assert ("the memory of a detection step is not planned" in text) != planned


def test_segmentations_memory_is_what_a_step_holds(tmp_path: Path) -> None:
    from benchmarks.plan_memory import peak_in

    config = load(write(tmp_path, "segmentation"), ["steps.global_batch_size=2", "ema.decay=0.0", "engine.threads=1"])
    predicted = memory.estimate(config, checks.network(config), 1).total
    from dgt.training.parallel import build_engine
    from dgt.training.world import joined

    with joined() as world, torch.profiler.profile(profile_memory=True) as profile:
        task = build_task(config.task, config.model, config.data)
        engine = build_engine(task.build_model(), world, config.engine, config.optimizer)
        batch, prepare = find_micro_batch.made_up_batch(config, 2), StepInputs(config, 0, world.device, 0)
        with torch.profiler.record_function("step"):
            engine.train_step(
                [slice(0, 2)], lambda model, part: task.loss(model, prepare(batch, part)) / 2, 1e-3, lambda *_: True
            )
    assert predicted == pytest.approx(peak_in(profile, "step"), rel=0.15)  # the promise of docs/planning.md


def test_what_is_not_planned_refuses_nothing(tmp_path: Path) -> None:
    config = load(write(tmp_path, "detection"))
    network, where = checks.network(config), Layout("slurm", 1, 1, use_gpus=True)
    with pytest.raises(memory.UnplannedError, match="find_micro_batch"):
        memory.estimate(config, network, 1)
    refuse_too_little(config, where, network, Profile(gpu_memory_gb=0.001))
    assert "not planned" in plan.modes(plan.Plan(config, where, Profile(), network))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_micro_batch_is_tried_out_with_targets_that_are_learned_from(task: str, tmp_path: Path) -> None:
    config = load(write(tmp_path, task))
    batch = find_micro_batch.made_up_batch(config, 2)
    height, width = traffic.largest_image_size(config)
    assert (height, width) == ((96, 96) if task == "segmentation" else (128, 128)), "what no batch of training exceeds"
    assert tuple(batch.images.shape) == (2, height, width, 3)  # type: ignore[union-attr]
    assert batch.sizes == [(height, width)] * 2
    if task == "segmentation":
        assert all(np.unique(classes).tolist() == [0, 1, 2, 3, 4] for classes in batch.targets)
    else:
        for instances in batch.targets:
            left, top, right, bottom = instances.boxes.T
            assert min(left.min(), top.min()) >= 0
            assert right.max() <= width
            assert bottom.max() <= height
            assert [mask.shape for mask in instances.masks] == list(zip(bottom - top, right - left, strict=True))
    torch.manual_seed(0)
    learner = build_task(config.task, config.model, config.data)
    network = learner.build_model().train()
    loss = learner.loss(network, StepInputs(config, 0, torch.device("cpu"), 0)(batch, slice(0, 2)))
    loss.backward()
    assert loss.item() > 0
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad), "ddp waits for every gradient"


@pytest.mark.parametrize(
    ("task", "ranks", "overrides", "message"),
    [
        ("segmentation", 2, ["engine.name=fsdp", "task.inference.mode=slide"], r"task\.inference\.mode: slide passes"),
        (
            "segmentation",
            2,
            ["engine.name=deepspeed", "engine.deepspeed.stage=3", "task.inference.mode=slide"],
            r"deepspeed gathers its weights from 2 ranks",
        ),
    ],
)
def test_evaluations_that_would_hang_are_refused(
    task: str, ranks: int, overrides: list[str], message: str, tmp_path: Path
) -> None:
    config = load(write(tmp_path, task), overrides)
    with pytest.raises(ConfigError, match=message):
        checks.evaluation(config, ranks)
    checks.evaluation(config, 1)
    for fine in (["engine.name=ddp"], ["engine.name=deepspeed", "engine.deepspeed.stage=2"]):
        checks.evaluation(load(write(tmp_path, task), [*overrides, *fine]), ranks)
    checks.evaluation(load(write(tmp_path, task), [*overrides, "task.inference.mode=whole"]), ranks)


def test_detection_needs_pycocotools_and_a_gpu_for_synchronised_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(write(tmp_path, "detection"), ["task.norm=sync_batch"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"task\.norm: sync_batch needs a CUDA GPU"):
        checks.gpu(config)
    checks.engine(config, checks.network(config), 2)  # its statistics are those of all ranks
    checks.evaluation(config, 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pycocotools, which is not installed; install the extra dgt\[dense\]"):
        checks.evaluation(config, 2)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_other_networks_than_ours_are_refused_as_backbones(task: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resnet18 is no backbone for dense prediction; use a dgt_"):
        checks.network(load(write(tmp_path, task), ["model.name=resnet18"]))
    network = checks.network(load(write(tmp_path, task), ["engine.activation_checkpointing=full"]))
    assert any("backbone" in name for name, _ in network.named_parameters()), "options of DGT models are taken"


def test_many_sizes_to_compile_are_warned_of(tmp_path: Path) -> None:
    ranges = "data.detection.aspect_bounds=[0.7, 1.0, 1.4]"
    sides = "data.detection.short_sides=[64, 72, 80, 88]"
    compiled = load(write(tmp_path, "detection"), ["engine.compile=true", sides, ranges])
    assert "up to 16 sizes (4 of data.detection.short_sides in 4 ranges" in checks.sizes_to_compile(compiled)[0]
    assert checks.sizes_to_compile(load(write(tmp_path, "detection"), [sides])) == []
    assert checks.sizes_to_compile(load(write(tmp_path, "detection"), ["engine.compile=true", ranges])) == []
    assert checks.sizes_to_compile(load(write(tmp_path, "segmentation"), ["engine.compile=true"])) == []


def test_a_set_with_another_number_of_classes_another_kind_or_without_masks_is_refused(tmp_path: Path) -> None:
    from data_pipeline.prepare import main as prepare

    out = tmp_path / "none"
    options = ["--train", "8", "--val", "1", "--size", "64", "--jobs", "1"]
    assert prepare(["shapes", "--task", "detection", "--out", str(out), *options]) == 0
    path = write(tmp_path, "detection")
    assert checks.samples(load(path, ["data.num_classes=6"])) == (8, 1)
    with pytest.raises(DataError, match="has 6 classes, but the configuration says 5"):
        checks.samples(load(path))
    with pytest.raises(DataError, match="is a set for detection, and one for segmentation is needed"):
        checks.samples(load(write(tmp_path, "segmentation"), ["data.num_classes=6"]))
    index = set_index.load(LocalFolder(out))
    index.targets["masks"] = False
    (out / "index.json").write_bytes(set_index.to_bytes(index))
    boxes = ["data.num_classes=6", "task.detector=faster_rcnn"]
    assert checks.masks(load(path, boxes)) is None
    with pytest.raises(DataError, match=r"has boxes and no masks, .* set task.detector to faster_rcnn"):
        checks.masks(load(path, boxes[:1]))
