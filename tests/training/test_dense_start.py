"""Dense networks begin with a backbone of a classifier or with another dense network, and learn it layer by layer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig, build_model, freeze
from dgt.models.rcnn_config import HeadsConfig
from dgt.tasks import DetectionConfig, SegmentationConfig, TaskConfig, build_task
from dgt.tasks.segmentation_config import UPerNetConfig
from dgt.training import start
from dgt.training.checkpoint import CheckpointError
from dgt.training.optim import OptimizerConfig, build_optimizer, make_state, set_learning_rate
from dgt.training.start import StartConfig
from dgt.training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
SEGMENTATION = SegmentationConfig(head=UPerNetConfig(channels=16, auxiliary_channels=16, norm_groups=4))
DETECTION = DetectionConfig(fpn_channels=16, heads=HeadsConfig(hidden_features=16, mask_convs=1, mask_channels=16))


def network(task: TaskConfig, num_classes: int, seed: int, name: str = "dgt_nano", **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_task(task, ModelConfig(name, **options), DataConfig(num_classes=num_classes)).build_model()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(folder: Path, model: nn.Module) -> StartConfig:
    file = folder / "weights.safetensors"
    save_file(tensors(model), file)
    return StartConfig(str(file))


@pytest.mark.parametrize("task", [SEGMENTATION, DETECTION], ids=lambda task: task.name)
def test_a_classifiers_stem_and_stages_become_the_backbone_and_all_else_is_drawn(
    task: TaskConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(7)
    given = saved(tmp_path, build_model(ModelConfig("dgt_nano"), 10))
    own = network(task, 3, seed=1)
    drawn, there = tensors(own), load_file(given.path)
    with caplog.at_level(logging.INFO, "dgt"):
        start.load_into(own, given, ALONE)
    taken = 0
    for name, tensor in own.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, there[name.removeprefix("backbone.")]), name
            taken += 1
        else:
            assert torch.equal(tensor, drawn[name]), name
    assert taken == len(there) - 4
    said = [record.message.strip() for record in caplog.records]
    assert said[0] == f"starting from {given.path}: {taken} of {len(drawn)} tensors"
    assert said[1] == f"taken: backbone ({taken})"
    assert said[2].startswith("drawn anew: ")
    assert "norms (8)" in said[2]
    assert said[3] == "there, and not taken: a classifier's head (2), a classifier's norm (2)"
    assert len(said) == 4, "no line for each tensor"


@pytest.mark.parametrize("task", [SEGMENTATION, DETECTION], ids=lambda task: task.name)
def test_another_run_of_the_task_gives_all_but_what_depends_on_the_number_of_classes(
    task: TaskConfig, tmp_path: Path
) -> None:
    given = saved(tmp_path, network(task, 5, seed=7))
    there, same, other = load_file(given.path), network(task, 5, seed=1), network(task, 3, seed=1)
    start.load_into(same, given, ALONE)
    assert all(torch.equal(tensor, there[name]) for name, tensor in same.state_dict().items())

    drawn = tensors(other)
    start.load_into(other, given, ALONE)
    new = {name for name, tensor in other.state_dict().items() if tensor.shape != there[name].shape}
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, (drawn if name in new else there)[name]), name
    answers = {
        "segmentation": {"classifier", "auxiliary.classifier"},
        "detection": {"roi_heads.box_heads.0.predictor", "roi_heads.mask_head.1"},
    }[task.name]
    assert all(any(name.startswith(answer + ".") for answer in answers) for name in new)
    assert len(new) == {"segmentation": 4, "detection": 6}[task.name]


def test_a_segmentation_gives_a_detector_its_backbone_and_norms(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = saved(tmp_path, network(SEGMENTATION, 5, seed=7))
    own, there = network(DETECTION, 3, seed=1), load_file(given.path)
    with caplog.at_level(logging.INFO, "dgt"):
        start.load_into(own, given, ALONE)
    assert all(torch.equal(t, there[n]) for n, t in own.state_dict().items() if n.startswith(("backbone.", "norms.")))
    assert "taken: backbone (" in caplog.text
    assert "), norms (8)\n" in caplog.text
    assert "there, and not taken: auxiliary (5), classifier (2), fusion (3)" in caplog.text


def test_a_backbone_that_does_not_fit_is_refused_and_so_is_a_dense_network_for_a_classifier(tmp_path: Path) -> None:
    given = saved(tmp_path, build_model(ModelConfig("dgt_nano"), 10))
    with pytest.raises(
        CheckpointError,
        match=r"backbone\.stem\.conv1\.weight has the shape \(16, 3, 3, 3\) there and has the shape \(32, 3, 3, 3\)",
    ):
        start.load_into(network(SEGMENTATION, 3, seed=1, name="dgt_tiny"), given, ALONE)
    shorter = build_model(ModelConfig("dgt_nano"), 10)
    del shorter.stages[2].blocks[1]  # type: ignore[union-attr,operator,index]
    with pytest.raises(CheckpointError, match=r"backbone\.stages\.2\.blocks\.1\.\S+ is not there"):
        start.load_into(network(SEGMENTATION, 3, seed=1), saved(tmp_path, shorter), ALONE)
    dense = saved(tmp_path, network(SEGMENTATION, 3, seed=1))
    with pytest.raises(CheckpointError, match=r"holds a dense network; export its backbone with .* --part backbone"):
        start.load_into(build_model(ModelConfig("dgt_nano"), 10), dense, ALONE)


@pytest.mark.parametrize("task", [SEGMENTATION, DETECTION], ids=lambda task: task.name)
def test_heads_and_norms_learn_at_the_full_rate_and_blocks_below_at_decayed_ones(task: TaskConfig) -> None:
    model = network(task, 3, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, layer_decay=0.5))
    set_learning_rate(optimizer, 2.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [f"stages.{stage}.blocks.{i}" for stage, depth in enumerate((1, 1, 2, 1)) for i in range(depth)]
    parts = {"stem": 2.0 * 0.5**6} | {block: 2.0 * 0.5 ** (5 - i) for i, block in enumerate(blocks)}
    parts |= {f"stages.{i}.downsample": parts[f"stages.{i}.blocks.0"] for i in (1, 2, 3)}
    expected = {f"backbone.{part}.": rate for part, rate in parts.items()}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        assert rate == next((r for part, r in expected.items() if name.startswith(part)), 2.0), name
    assert decayed == {name: 0.05 if p.ndim > 1 else 0.0 for p, name in names.items()}
    norms = [name for name in names.values() if ".norm" in name or name.startswith("norms.")]
    assert len(norms) > 20
    assert not any(decayed[name] for name in norms)


def test_a_frozen_backbone_leaves_norms_and_heads_to_learn() -> None:
    model = network(DETECTION, 3, seed=1, freeze=("backbone",))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    freeze(model, ["norms.*", "fpn"])
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"rpn", "roi_heads"}


def test_muon_orthogonalises_the_matrices_of_the_backbone_and_none_of_the_heads() -> None:
    model = network(SEGMENTATION, 3, seed=1)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    make_state(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for p, state in optimizer.state.items() if "momentum_buffer" in state}
    assert by_muon
    assert all(name.startswith("backbone.") for name in by_muon)
    assert "backbone.stages.0.blocks.0.attn.qkv.weight" in by_muon
