"""ZeRO through DeepSpeed: its configuration is ours, its state goes to and from every other engine bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from recipes import Recipe, always, assembled, config_of, losses
from small import small_config
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dgt.config import ConfigError, to_yaml
from dgt.models import ModelConfig
from dgt.training import checkpoint
from dgt.training.ema import Ema, EmaConfig
from dgt.training.histograms import distributions
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import Engine, EngineConfig, build_engine, check_engine, check_network
from dgt.training.parallel.config import OPEN, DeepSpeedConfig
from dgt.training.parallel.deepspeed import settings_of
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train
from dgt.training.world import World, joined
from launch import checks

BUCKETS = [key for key in OPEN["zero_optimization"] or () if key != "offload_optimizer"]
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


class Odd(nn.Module):
    """Sizes that divide by no number of ranks, a frozen layer, a buffer, and one parameter that ZeRO 3 keeps whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(7, 3)
        self.register_buffer("shift", torch.arange(7.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(self.frozen(x).relu() * self.scale + self.shift)


def engine_of(label: str, world: World, **options: Any) -> Engine:
    torch.manual_seed(0)
    network = Odd()
    with torch.no_grad():
        network.conv.bias.zero_().neg_()  # -0.0, whose sign a sum over ranks would lose
    return build_engine(network, world, config_of(label, **options), OptimizerConfig(lr=0.1, weight_decay=0.1))


def step(engine: Engine, lr: float = 0.1) -> float:
    """One step on six samples, whatever the number of ranks; the loss."""
    data = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    own = data.chunk(engine.world.size)[engine.world.rank]

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum() / 6

    return engine.train_step([own[:1], own[1:]] if len(own) > 1 else [own], loss_of, lr, always).loss


def output(engine: Engine) -> Tensor:
    with torch.no_grad():
        engine.network.eval()
        return engine.network(torch.ones(2, 3, 4, 4)).clone()


def pieces_of(engine: Engine, ema: Ema) -> Any:
    return engine.state() | {f"ema.{name}": piece for name, piece in ema.averages.items()}


def save_all(folder: Path) -> dict[str, Any]:
    """Under each engine two steps and a save; the whole tensors, and what the network computes."""
    found = {}
    with joined() as world:
        for number, label in enumerate(ENGINES, start=1):
            engine = engine_of(label, world)
            ema = Ema(engine.weights(), EmaConfig(decay=0.5))
            for i in range(2):
                step(engine, lr=0.05 * number)  # so that each has weights of its own
                ema.update(i)
            pieces = pieces_of(engine, ema)
            assert checkpoint.save(folder / label, 2, pieces, {"progress": {}, "config": {}}, world) is None
            found[label] = (assembled(pieces, world), output(engine))
            shown = {name for of_rank in world.gather([n for n, _ in distributions(engine)]) for name in of_rank}
            assert shown == {f"weights/{name}" for name in engine.weights()}, label
    return found


def load_all(folder: Path, saved: dict[str, Any]) -> dict[str, list[float]]:
    """Loads every engine's checkpoint under every engine and checks the bits; by source, each one's next loss."""
    found = {}
    with joined() as world:
        for label in ENGINES:
            engine = engine_of(label, world)
            ema = Ema(engine.weights(), EmaConfig(decay=0.5))
            for source in ENGINES:
                tensors, computed = saved[source]
                pieces = pieces_of(engine, ema)
                read = checkpoint.verify(next((folder / source).glob("step_*")))
                checkpoint.read_pieces(read, pieces, world)
                engine.adopt(pieces)
                now = assembled(pieces_of(engine, ema), world)
                assert now.keys() == tensors.keys(), (label, source)
                for name, tensor in tensors.items():
                    same = tensor.flatten().view(torch.uint8).equal(now[name].flatten().view(torch.uint8))
                    assert same, (label, source, name)
                # Under ddp convolutions are channels-last, and round otherwise.
                torch.testing.assert_close(output(engine), computed, rtol=1e-5, atol=1e-6)
                with engine.averaged_weights(ema):
                    assert (output(engine) - computed).abs().max() > 1e-3
                again = assembled(pieces_of(engine, ema), world)
                assert all(torch.equal(again[name], now[name]) for name in now), "the weights must be back"
                found.setdefault(source, []).append(step(engine))
    return found


@pytest.mark.deepspeed
def test_state_of_any_engine_loads_into_any_other_at_any_number_of_ranks(tmp_path: Path) -> None:
    saved = run_ranks(2, save_all, tmp_path)[0].value
    names = saved["ddp"][0].keys()
    assert {"model.shift", "model.frozen.bias", "optimizer.scale.exp_avg", "optimizer.conv.bias.step"} < names
    assert "optimizer.frozen.weight.exp_avg" not in names
    for ranks in (1, 2, 3):
        for result in run_ranks(ranks, load_all, tmp_path, saved):
            for source, following in result.value.items():
                # Sums over six samples, in another order.
                assert following == pytest.approx([following[0]] * len(ENGINES), rel=1e-5), source


@pytest.mark.deepspeed
def test_a_run_without_a_launcher_is_one_rank(tmp_path: Path) -> None:
    steps = StepsConfig(epochs=1, global_batch_size=8, micro_batch_size=8, max_steps=2, evaluate_every_epochs=0)
    config = replace(small_config(tmp_path, steps=steps), engine=config_of("zero2", threads=1))
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("RANK") and k != "WORLD_SIZE"}
    command = [sys.executable, "-m", "launch.train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training is complete after step 2" in done.stdout


def selective() -> Tensor:
    with joined() as world:
        torch.set_num_threads(1)
        return losses(Recipe(world, config_of("zero3", activation_checkpointing="selective")).run(3))


def without() -> Tensor:
    with joined() as world:
        torch.set_num_threads(1)
        return losses(Recipe(world, config_of("ddp")).run(3))


@pytest.mark.deepspeed
def test_selective_checkpointing_changes_nothing_under_zero_3() -> None:
    # The third loss follows from gradients of biases that are no longer 0.
    torch.testing.assert_close(run_ranks(1, selective)[0].value, run_ranks(1, without)[0].value, rtol=1e-6, atol=0)


def with_offload() -> dict[str, Any]:
    with joined() as world:
        found = {}
        for stage in (1, 2, 3):
            config = EngineConfig(
                name="deepspeed", precision="fp32", deepspeed=DeepSpeedConfig(stage=stage, offload="cpu")
            )  # fmt: skip
            torch.manual_seed(0)
            engine = build_engine(Odd(), world, config, OptimizerConfig(lr=0.1))
            found[stage] = [step(engine) for _ in range(3)]
        torch.manual_seed(0)
        engine = build_engine(Odd(), world, config_of("ddp"), OptimizerConfig(lr=0.1))
        return found | {"ddp": [step(engine) for _ in range(3)]}


@pytest.mark.deepspeed
def test_offload_to_host_memory_trains_alike() -> None:
    for result in run_ranks(2, with_offload):
        expected = result.value.pop("ddp")
        for stage, found in result.value.items():
            assert found == pytest.approx(expected, rel=1e-5), stage


@pytest.mark.parametrize("label", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_optimizers_that_need_whole_tensors_are_refused(label: str, name: Any) -> None:
    with pytest.raises(ValueError, match=f"optimizer.name: {name} needs whole tensors"):
        check_engine(config_of(label), OptimizerConfig(name=name), 2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_batch_size": 8}, "settings: train_batch_size cannot"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage cannot"),
        ({"fp16": {"enabled": True}, "gradient_clipping": 1.0}, "fp16, gradient_clipping cannot"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device cannot"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload cannot"),
        ({"zero_optimization": True}, "settings: zero_optimization cannot"),
        ({"communication_data_type": "fp16"}, "communication_data_type cannot"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients cannot"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "mics_shard_size cannot"),
        (
            {"elasticity": {"enabled": True}, "tensor_parallel": {"autotp_size": 2}},
            "elasticity, tensor_parallel cannot",
        ),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op cannot"),
    ],
)
def test_settings_that_contradict_the_configuration_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepSpeedConfig(settings=settings)


def test_other_settings_of_deepspeed_are_laid_over_ours() -> None:
    own = DeepSpeedConfig(stage=3, settings={"zero_optimization": {"reduce_bucket_size": 7}, "dump_state": True})
    made = settings_of(own, clip=2.0, elements=101)
    assert made["dump_state"]
    assert made["gradient_clipping"] == 2.0
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["allgather_bucket_size"] % 2 == 0


@pytest.mark.deepspeed
def test_a_value_that_deepspeed_refuses_is_one_sentence_before_anything_starts() -> None:
    own = DeepSpeedConfig(settings={"zero_optimization": {"reduce_bucket_size": -1}})
    with pytest.raises(ValueError, match=r"engine\.deepspeed\.settings: DeepSpeed refuses .*\n?.*reduce_bucket_size"):
        check_engine(EngineConfig(name="deepspeed", deepspeed=own), OptimizerConfig(), 2)
    fine = DeepSpeedConfig(stage=3, offload="cpu", settings={"zero_optimization": dict.fromkeys(BUCKETS, 1)})
    check_engine(EngineConfig(name="deepspeed", deepspeed=fine), OptimizerConfig(), 2)


@pytest.mark.parametrize(
    ("config", "missing", "named"),
    [
        (config_of("zero1"), "deepspeed", r"install the extra dgt\[deepspeed\], or choose another engine"),
        (config_of("ddp", apex_layer_norm=True), "apex", "engine.apex_layer_norm: NVIDIA's apex is not installed"),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_way_out(
    config: EngineConfig, missing: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ValueError, match=named):
        check_engine(config, OptimizerConfig(), 2)


def test_running_statistics_are_refused_on_more_than_one_rank_and_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"'1\.0' \(BatchNorm2d\) keeps running statistics, and each of 2 ranks"):
        check_network(network, 2)
    check_network(network, 1)
    check_network(Odd(), 2)  # has a buffer that training does not change
    check_network(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), 2)
    # Statistics that are fixed, or the same on all ranks, are no rank's own.
    check_network(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.SyncBatchNorm(4)), 2)


def test_a_network_with_running_statistics_trains_on_one_rank_and_is_refused_before_anything_starts_on_two(
    tmp_path: Path,
) -> None:
    steps = StepsConfig(epochs=1, global_batch_size=8, micro_batch_size=4, max_steps=2)
    config = replace(
        small_config(tmp_path, model=ModelConfig(name="resnet10t"), steps=steps), engine=config_of("ddp", threads=1)
    )
    network = checks.network(config)
    with pytest.raises(ConfigError, match="keeps running statistics"):
        checks.engine(config, network, 2)
    checks.engine(config, network, 1)
    assert train(config).status == "finished"


def test_shards_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.fsdp\.shard_size: 5 ranks do not divide into groups of 2"):
        check_engine(config_of("hybrid"), OptimizerConfig(), 5)
    check_engine(config_of("hybrid"), OptimizerConfig(), 6)
