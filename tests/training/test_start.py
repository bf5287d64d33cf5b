"""Fine-tuning: what a run begins with, at another resolution and class count, and that it does so only once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_config

from dgt.config import Config
from dgt.models import ModelConfig, build_model
from dgt.training import checkpoint, start
from dgt.training.checkpoint import CheckpointError
from dgt.training.start import StartConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train

STEPS = StepsConfig(epochs=2, global_batch_size=8, micro_batch_size=8, max_steps=2, evaluate_every_epochs=0)


def run(folder: Path, name: str, **sections: object) -> Config:
    config = dataclasses.replace(small_config(folder, steps=STEPS), name=name, **sections)  # type: ignore[arg-type]
    assert train(config).status == "finished"
    return config


def tensors_of(config: Config, part: str) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(config.run_dir / "checkpoints", print)
    assert newest is not None
    stored = checkpoint.tensors_in(newest)
    return {n.removeprefix(part): stored.whole(n) for n in stored.tensors if n.startswith(part)}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return run(tmp_path_factory.mktemp("earlier"), "earlier")


@pytest.mark.parametrize(("weights", "part"), [("auto", "ema."), ("ema", "ema."), ("raw", "model.")])
def test_a_run_gives_its_averaged_or_raw_weights(earlier: Config, weights: str, part: str) -> None:
    network = build_model(earlier.model, earlier.data.num_classes)
    start.load_into(network, StartConfig(str(earlier.run_dir), weights))  # type: ignore[arg-type]
    expected = tensors_of(earlier, part)
    assert all(torch.equal(p, expected[name]) for name, p in network.named_parameters())
    if weights == "auto":
        step = checkpoint.committed(earlier.run_dir / "checkpoints")[0]
        again = build_model(earlier.model, earlier.data.num_classes)
        start.load_into(again, StartConfig(str(step)))
        assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())


def test_fine_tuning_at_another_size_and_class_count_starts_from_the_weights_and_a_head_of_the_seed(
    earlier: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(tensors_of(earlier, "ema."), file)
    data = dataclasses.replace(earlier.data, num_classes=3, image_size=48)
    no_change = dataclasses.replace(earlier.optimizer, lr=0.0, weight_decay=0.0)
    flat = dataclasses.replace(earlier.schedule, warmup_epochs=0.0, min_lr=0.0)
    with caplog.at_level(logging.INFO, "dgt"):
        tuned = run(
            tmp_path, "tuned", start=StartConfig(str(file)), data=data, optimizer=no_change, schedule=flat
        )  # fmt: skip
    weights, given = tensors_of(tuned, "model."), load_file(file)
    torch.manual_seed(tuned.seed)
    fresh = build_model(tuned.model, 3).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, (fresh if name.startswith("head.fc.") else given)[name]), name
    assert "head.fc.weight is drawn anew: (4, 160) there, (3, 160) here" in caplog.text

    file.unlink()  # a run that goes on does not need it
    before = weights
    longer = dataclasses.replace(tuned, steps=dataclasses.replace(STEPS, max_steps=3))
    caplog.clear()
    with caplog.at_level(logging.INFO, "dgt"):
        assert train(longer).step == 3
    assert "resuming after step 2" in caplog.text
    assert "starting from" not in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(longer, "model.").items())


def test_weights_that_do_not_fit_are_refused_with_the_first_tensor_and_both_shapes(
    earlier: Config, tmp_path: Path
) -> None:
    tiny = build_model(ModelConfig("dgt_tiny"), 4)
    with pytest.raises(CheckpointError, match=r"stem.conv1.weight has the shape \(16, 3, 3, 3\) there and has the "
                       r"shape \(32, 3, 3, 3\) here"):  # fmt: skip
        start.load_into(tiny, StartConfig(str(earlier.run_dir)))
    with pytest.raises(CheckpointError, match="none is no file, no step_"):
        start.load_into(tiny, StartConfig(str(tmp_path / "none")))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read"):
        start.load_into(tiny, StartConfig(str(broken)))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_what_is_frozen_stays_and_has_neither_moments_nor_another_average(tmp_path: Path, engine: str) -> None:
    base = small_config(tmp_path, engine, steps=STEPS)
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, freeze=("stem", "stages.0", "stages.1")))
    assert train(config).status == "finished"
    torch.manual_seed(config.seed)
    fresh = build_model(config.model, config.data.num_classes).state_dict()
    frozen = {name for name in fresh if name.startswith(("stem.", "stages.0.", "stages.1."))}
    weights, averages = tensors_of(config, "model."), tensors_of(config, "ema.")
    moments = {name.rpartition(".")[0] for name in tensors_of(config, "optimizer.")}
    assert moments == fresh.keys() - frozen
    for name in frozen:
        assert torch.equal(weights[name], fresh[name]), name
        assert torch.equal(averages[name], fresh[name]), name
    assert not any(torch.equal(weights[n], fresh[n]) for n in moments if n.endswith("weight"))
