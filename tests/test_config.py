from pathlib import Path

import pytest

from dgt.config import Config, ConfigError, from_dict, load, to_yaml

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_survives_writing_and_reading(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert load(write(tmp_path / "again.yaml", to_yaml(config))) == config


def test_base_files_are_relative_to_the_file_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path / "base/a.yaml", "optimizer: {lr: 0.1, weight_decay: 0.2}\nsteps: {epochs: 7}\n")
    path = write(tmp_path / "b.yaml", "base: base/a.yaml\noptimizer: {lr: 0.3}\n")
    config = load(path, ["steps.epochs=9", "optimizer.betas=[0.8, 0.9]", "optimizer.eps=1e-7"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.steps.epochs) == (0.3, 0.2, 9)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.optimizer.eps == 1e-7  # YAML 1.1 reads 1e-7 as text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {weight_decy: 0.1}", "unknown key optimizer.weight_decy; did you mean optimizer.weight_decay?"),
        ("weight_decay: 0.1", "unknown key weight_decay; did you mean optimizer.weight_decay?"),
        ("modle: {}", "unknown key modle; did you mean model?"),
        ("steps: {epochs: many}", "steps.epochs: Input should be a valid integer"),
        ("steps: {epochs: 0}", "steps: epochs: must be at least 1, got 0"),
        ("steps: 3", "steps: expected a section of keys and values, got 3"),
        ("steps:", "steps: expected a section of keys and values, got nothing"),
        ("engine: {name: horovod}", "engine.name: Input should be 'ddp' or 'fsdp'"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas"),
        ("steps: {micro_batch_size: 3}", "micro_batch_size: must be even while mixing is on"),
        ("name: ../elsewhere", "no folder name"),
        ("- a\n- b", "a configuration is a mapping"),
        ("a: [", "not valid YAML"),
        ("base: missing.yaml", "cannot read this configuration file"),
        ("base: this.yaml", "base files form a circle"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "this.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_override_without_a_value_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "this.yaml", "{}")
    with pytest.raises(ConfigError, match=r"override 'steps.epochs': expected key.sub=value"):
        load(path, ["steps.epochs"])
    with pytest.raises(ConfigError, match=r"unknown key steps.epoch; did you mean steps.epochs"):
        load(path, ["steps.epoch=3"])


def test_the_defaults_are_valid() -> None:
    assert from_dict({}) == Config()
