"""Fine-tuning: what a run begins with, at another resolution and class count, and that it does so only once."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from small import small_config

from dgt.config import Config
from dgt.models import ModelConfig, build_model
from dgt.training import checkpoint, start
from dgt.training.checkpoint import CheckpointError, UnreadableError
from dgt.training.start import StartConfig
from dgt.training.steps import StepsConfig
from dgt.training.tensor_files import TensorFileError, TensorFiles
from dgt.training.trainer import train
from dgt.training.world import World, joined
from launch import checks

ALONE = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
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
    start.load_into(network, StartConfig(str(earlier.run_dir), weights), ALONE)  # type: ignore[arg-type]
    expected = tensors_of(earlier, part)
    assert all(torch.equal(p, expected[name]) for name, p in network.named_parameters())
    if weights == "auto":
        step = checkpoint.committed(earlier.run_dir / "checkpoints")[0]
        again = build_model(earlier.model, earlier.data.num_classes)
        start.load_into(again, StartConfig(str(step)), ALONE)
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


def test_a_damaged_newest_checkpoint_of_the_other_run_is_passed_over_and_a_missing_best_is_named(
    earlier: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHORT_PATIENCE", 0.0)
    other = tmp_path / "other"
    shutil.copytree(earlier.run_dir, other)
    (whole,) = checkpoint.committed(other / "checkpoints")
    shutil.copytree(whole, whole.with_name("step_00000009"))
    (whole.with_name("step_00000009") / "manifest.json").write_text("{")
    network = build_model(earlier.model, earlier.data.num_classes)
    start.load_into(network, StartConfig(str(other)), ALONE)
    assert whole.with_name("step_00000009").is_dir(), "another run's folder is not changed"

    body = checkpoint.read_manifest(whole)
    checkpoint.write_manifest(whole, body | {"progress": body["progress"] | {"best_step": 1}})
    with pytest.raises(CheckpointError, match=r"start\.path: the best checkpoint, .*step_00000001, is not there any"):
        start.load_into(network, StartConfig(str(other)), ALONE)


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(5, "I/O"), UnreadableError), (TensorFileError("x"), CheckpointError)]
)
def test_tensors_that_cannot_be_read_are_an_error_in_one_sentence(
    earlier: Config, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(TensorFiles, "whole", failing)
    with pytest.raises(kind, match="step_00000002: "):
        start.load_into(build_model(earlier.model, 4), StartConfig(str(earlier.run_dir)), ALONE)


def start_as_two_ranks(path: str, config: Config) -> tuple[int, bool]:
    """How many files this rank has hashed, and whether it has the weights."""
    hashed, described = [], checkpoint.described

    def counting(file: Path) -> dict[str, object]:
        hashed.append(file)
        return described(file)

    checkpoint.described = counting  # type: ignore[assignment]
    with joined() as world:
        network = build_model(config.model, config.data.num_classes)
        start.load_into(network, StartConfig(path), world)
        count, averages = len(hashed), tensors_of(config, "ema.")
        return count, torch.equal(network.state_dict()["head.fc.bias"], averages["head.fc.bias"])


def test_one_rank_verifies_the_weights_that_all_start_from(earlier: Config) -> None:
    results = [result.value for result in run_ranks(2, start_as_two_ranks, str(earlier.run_dir), earlier)]
    assert results == [(1, True), (0, True)]


@pytest.mark.parametrize(("holds", "other"), [("ema", "raw"), ("raw", "ema")])
def test_an_exported_file_is_refused_where_it_holds_the_other_kind(
    earlier: Config, tmp_path: Path, holds: Any, other: Any
) -> None:
    file, network = tmp_path / "weights.safetensors", build_model(earlier.model, 4)
    save_file(tensors_of(earlier, "ema."), file, {"weights": holds})
    for fine in (holds, "auto"):
        start.load_into(network, StartConfig(str(file), fine), ALONE)
    with pytest.raises(CheckpointError, match=rf"start\.weights: .* holds {holds} weights, not {other}"):
        start.load_into(network, StartConfig(str(file), other), ALONE)
    config = dataclasses.replace(small_config(tmp_path), start=StartConfig(str(file), other))
    with pytest.raises(CheckpointError, match=r"start\.weights: "):
        checks.beginning(config)


def fail_on_rank_1(path: str, config: Config) -> str:
    """What this rank raises where rank 1 cannot read."""
    with joined() as world:
        if world.rank == 1:
            start.load_state_dict = None  # type: ignore[assignment]
        try:
            start.load_into(build_model(config.model, config.data.num_classes), StartConfig(path), world)
        except CheckpointError as error:
            return str(error)
        return ""


def test_a_rank_that_cannot_read_the_weights_ends_all_with_its_sentence(earlier: Config, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(tensors_of(earlier, "ema."), file)
    first, second = (result.value for result in run_ranks(2, fail_on_rank_1, str(file), earlier))
    assert first == second
    assert "weights.safetensors cannot be read" in first


def test_weights_that_do_not_fit_are_refused_with_the_first_tensor_and_both_shapes(
    earlier: Config, tmp_path: Path
) -> None:
    tiny = build_model(ModelConfig("dgt_tiny"), 4)
    with pytest.raises(CheckpointError, match=r"stem.conv1.weight has the shape \(16, 3, 3, 3\) there and has the "
                       r"shape \(32, 3, 3, 3\) here"):  # fmt: skip
        start.load_into(tiny, StartConfig(str(earlier.run_dir)), ALONE)
    with pytest.raises(CheckpointError, match="none is no file, no step_"):
        start.load_into(tiny, StartConfig(str(tmp_path / "none")), ALONE)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read"):
        start.load_into(tiny, StartConfig(str(broken)), ALONE)


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
