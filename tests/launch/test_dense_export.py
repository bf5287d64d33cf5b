"""Parts of a dense run's network as files: what timm and later runs load from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.config import DataConfig
from data_pipeline.dense_config import DetectionDataConfig, SegmentationDataConfig
from dgt.config import Config
from dgt.models import DenseNetwork, ModelConfig
from dgt.models.rcnn_config import HeadsConfig
from dgt.tasks import DetectionConfig, SegmentationConfig, build_task
from dgt.tasks.segmentation_config import UPerNetConfig
from dgt.training import start
from dgt.training.ema import EmaConfig
from dgt.training.keeper import Keeper
from dgt.training.mixing import MixingConfig
from dgt.training.parallel import EngineConfig, build_engine
from dgt.training.run_folder import RunFolder, claim, plain
from dgt.training.start import StartConfig
from dgt.training.state import Progress
from dgt.training.world import World, joined
from launch import export, sources
from launch.runs import LaunchError

ALONE = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
TASKS = {
    "segmentation": SegmentationConfig(head=UPerNetConfig(channels=16, auxiliary_channels=16, norm_groups=4)),
    "detection": DetectionConfig(
        fpn_channels=16, heads=HeadsConfig(hidden_features=16, mask_convs=1, mask_channels=16)
    ),
}
NECKS = {"segmentation": {"pyramid", "laterals", "smoothers", "fusion"}, "detection": {"fpn"}}


@pytest.fixture(scope="module", params=sorted(TASKS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, nn.Module]:
    """A run that has saved its first weights, and its network."""
    torch.manual_seed(3)
    config = Config(
        name="dense",
        output_dir=str(tmp_path_factory.mktemp(request.param)),
        task=TASKS[request.param],
        model=ModelConfig("dgt_nano", top_k=12),
        data=DataConfig(
            num_classes=5,
            segmentation=SegmentationDataConfig(crop_size=96),
            detection=DetectionDataConfig(short_sides=(64,), long_side=96, eval_short_side=64),
        ),
        mixing=MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
        ema=EmaConfig(decay=0.0),
        engine=EngineConfig(precision="fp32"),
    )
    claim(RunFolder(config.run_dir), plain(config))
    with joined() as world:
        network = build_task(config.task, config.model, config.data).build_model()
        engine = build_engine(network, world, config.engine, config.optimizer)
        keeper = Keeper(config, world, engine, Progress(), lambda: None)
        assert keeper.save()
        keeper.conclude(must=True)
        keeper.close()
    return config, network


def exported(run: tuple[Config, nn.Module], part: str, folder: Path) -> Path:
    out = folder / f"{part}.safetensors"
    arguments = ["--run", str(run[0].run_dir), "--checkpoint", "newest", "--out", str(out), "--part", part]
    assert export.main(arguments) == 0
    return out


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def test_a_backbone_is_a_network_of_timm_with_the_same_maps(
    run: tuple[Config, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, network = exported(run, "backbone", tmp_path), run[1].eval()
    assert isinstance(network, DenseNetwork)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = network.backbone.forward_intermediates(images, intermediates_only=True)
    names: dict[str, Any] = {}
    exec("\n".join(capsys.readouterr().out.splitlines()[1:]), names)  # what it says about loading
    assert all(torch.equal(a, b) for a, b in zip(names["maps"].eval()(images), expected, strict=True))
    last: Tensor = names["model"].eval().forward_features(images)
    assert torch.equal(last, network.features(images)[-1]), "the last norm stands behind the last stage"
    facts = header(path)
    assert (facts["part"], facts["num_classes"], facts["model_args"]) == ("backbone", "0", '{"top_k": 12}')
    size = [3, 96, 96] if run[0].task.name == "segmentation" else [3, 64, 96]
    assert json.loads(facts["pretrained_cfg"])["input_size"] == size


def test_a_neck_is_all_but_what_answers_and_begins_another_run(run: tuple[Config, nn.Module], tmp_path: Path) -> None:
    config, network = run
    path, state = exported(run, "neck", tmp_path), network.state_dict()
    held = load_file(path)
    assert {name.split(".")[0] for name in held} == {"backbone", "norms"} | NECKS[config.task.name]
    assert held.keys() == {n for n in state if n.split(".")[0] in {"backbone", "norms"} | NECKS[config.task.name]}
    assert all(torch.equal(tensor, state[name]) for name, tensor in held.items())
    torch.manual_seed(9)
    other = build_task(config.task, config.model, config.data).build_model()
    start.load_into(other, StartConfig(str(path)), ALONE)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in held.items())
    with pytest.raises(LaunchError, match="holds the neck of a network only, which answers nothing"):
        sources.read_file(path, network, None)


def test_the_whole_network_is_read_as_it_was_saved(run: tuple[Config, nn.Module], tmp_path: Path) -> None:
    path, network = exported(run, "network", tmp_path), run[1]
    tensors, kind = sources.read_file(path, network, None)
    assert kind == "raw"
    assert tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in tensors.items())
    assert sources.carried(path, []).task == run[0].task


def test_a_classifier_has_a_backbone_and_no_neck() -> None:
    network = timm.create_model("dgt_nano", num_classes=3)
    names = {name: f"model.{name}" for name in network.state_dict()}
    kept = export.part_of(names, network, "classification", "backbone")
    assert kept.keys() == {name for name in names if not name.startswith("head.")}
    with pytest.raises(LaunchError, match="a classifier has none"):
        export.part_of(names, network, "classification", "neck")
