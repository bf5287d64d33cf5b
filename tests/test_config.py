from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgt.config import Config, ConfigError, from_dict, load, to_yaml

OFF = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
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
        ("engine: {name: horovod}", "engine.name: Input should be 'ddp', 'fsdp' or 'deepspeed'"),
        ("optimizer: {betas: [0.9]}", "optimizer: betas: adamw has 2 of them"),
        ("steps: {micro_batch_size: 3}", "micro_batch_size: must be even while mixing is on"),
        (
            "{steps: {global_batch_size: 1000}, data: {order: block, canonical_nodes: 8}}",
            "steps.global_batch_size: must be a multiple of 16, twice data.canonical_nodes",
        ),
        ("data: {image_size_schedule: [[1, 160]]}", "image_size_schedule: epochs must rise from 0"),
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.epoch=3", "unknown key steps.epoch; did you mean steps.epochs?"),
        ("steps=3", "steps: expected a section of keys and values, got 3"),
        ("steps.epochs=true", "steps.epochs: true and false are no numbers, got True"),
    ],
)
def test_a_mistake_in_an_override_is_blamed_on_the_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "this.yaml", "{}"), ["name=fine", override])
    assert str(caught.value) == f"override {override!r}: {message}"


@pytest.mark.parametrize(
    "values",
    [
        {"steps": {"epochs": True}},
        {"optimizer": {"lr": False}},
        {"optimizer": {"betas": [0.9, True]}},
        {"model": {"top_k": True}},
        {"data": {"augment": {"scale": [0.1, True]}}},
    ],
)
def test_true_and_false_are_no_numbers(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="true and false are no numbers"):
        from_dict(values)


def test_true_and_false_are_taken_where_they_belong() -> None:
    assert from_dict({"ema": {"warmup": False}}).ema.warmup is False


@pytest.mark.parametrize("text", [".nan", "nan", ".inf", "inf", "1e999"])
@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.betas", "mixing.mixup_alpha", "data.std", "data.mean"])
def test_numbers_must_be_finite(tmp_path: Path, key: str, text: str) -> None:
    values = {"optimizer.betas": f"[0.9, {text}]", "data.std": f"[1, 1, {text}]", "data.mean": f"[0, {text}, 0]"}
    with pytest.raises(ConfigError, match=key.split(".")[1]):
        load(write(tmp_path / "this.yaml", "{}"), [f"{key}={values.get(key, text)}"])


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "num_classes", 0, "must be at least 1, got 0"),
        ("data", "image_size", 7, "must be at least 8, got 7"),
        ("data", "num_threads", -2, "must be at least -1, got -2"),
        ("data", "prefetch", -1, "must be at least 0, got -1"),
        ("data", "block_shards", 0, "must be at least 1, got 0"),
        ("data", "max_bad_samples", -1, "must be at least 0, got -1"),
        ("data", "mean", [123.7, 116.3, 103.5], "is on the scale 0 to 1, got [123.7, 116.3, 103.5]"),
        ("data", "std", [0.2, 0, 0.2], "must be above 0 and finite, got [0.2, 0.0, 0.2]"),
        ("data", "eval_crop_pct", 0, "must be in (0, 1], got 0.0"),
        ("data", "eval_crop_pct", 1.2, "must be in (0, 1], got 1.2"),
        ("data.augment", "scale", [0, 1], "must be two numbers in (0, 1], the smaller first, got [0.0, 1.0]"),
        ("data.augment", "scale", [0.5, 1.1], "must be two numbers in (0, 1], the smaller first, got [0.5, 1.1]"),
        ("data.augment", "scale", [1, 0.5], "must be two numbers in (0, 1], the smaller first, got [1.0, 0.5]"),
        ("data.augment", "ratio", [0, 1], "must be two numbers above 0, the smaller first, got [0.0, 1.0]"),
        ("data.augment", "ratio", [2, 1], "must be two numbers above 0, the smaller first, got [2.0, 1.0]"),
        ("data.augment", "horizontal_flip", -0.1, "is a probability, in [0, 1], got -0.1"),
        ("data.augment", "random_erasing", 1.1, "is a probability, in [0, 1], got 1.1"),
        ("data.synthetic", "train_samples", 0, "must be at least 1, got 0"),
        ("data.synthetic", "val_samples", 0, "must be at least 1, got 0"),
        ("model", "drop_path_rate", 1.0, "must lie in [0, 1), got 1.0"),
        ("model", "num_groups", 0, "must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_section_and_field(section: str, key: str, value: Any, message: str) -> None:
    values: dict[str, Any] = {key: value}
    for part in reversed(section.split(".")):
        values = {part: values}
    with pytest.raises(ConfigError) as caught:
        from_dict(values, "source")
    assert str(caught.value) == f"source: {section}: {key}: {message}"


@pytest.mark.parametrize("text", ["750", "'750'", "0750", "0o750", "75", "570", "7500", "abc", "true"])
def test_the_permissions_of_a_run_folder_are_three_octal_digits_with_or_without_quotes(
    tmp_path: Path, text: str
) -> None:
    path = write(tmp_path / "this.yaml", "{}")
    if text.strip("'") == "750":
        assert load(path, [f"output_mode={text}"]).output_mode == "750"
    else:
        with pytest.raises(ConfigError, match="output_mode"):
            load(path, [f"output_mode={text}"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_draw_can_be_keyed_by_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed: must lie in \[0, 2\*\*32\)"):
        from_dict({"seed": seed})


def test_the_defaults_are_valid() -> None:
    assert from_dict({}) == Config()


@pytest.mark.parametrize(("name", "key"), [("segmentation", "head.channels"), ("detection", "fpn_channels")])
def test_the_name_of_the_task_decides_what_its_section_holds(tmp_path: Path, name: str, key: str) -> None:
    base = write(tmp_path / "base.yaml", f"task: {{name: {name}}}\nmixing: {{mixup_alpha: 0.0, cutmix_alpha: 0.0}}")
    config = load(write(base.parent / "this.yaml", "base: base.yaml"), [f"task.{key}=64"])
    assert (config.task.name, attrgetter(key)(config.task)) == (name, 64)
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    with pytest.raises(ConfigError, match=r"unknown key task\.label_smoothing; known here"):
        load(tmp_path / "this.yaml", ["task.label_smoothing=0.1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.name=detecton", "task.name: 'detecton' is none of classification, segmentation, detection"),
        ("task.score_treshold=0.1", "unknown key task.score_treshold; did you mean task.score_threshold?"),
        ("task.rpn.pre_nmss=1", "unknown key task.rpn.pre_nmss; did you mean task.rpn.pre_nms?"),
        ("task.score_threshold=true", "task.score_threshold: true and false are no numbers, got True"),
    ],
)
def test_a_mistake_in_a_task_is_blamed_on_the_task_that_is_meant(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "this.yaml", "task: {name: detection}"), [override])
    assert str(caught.value) == f"override {override!r}: {message}"


def test_every_wrong_value_is_named_those_of_the_task_too() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict({"task": {"name": "segmentation", "ohem_threshold": 2}, "steps": {"epochs": "many"}})
    named = [line.split(":")[1].strip() for line in str(caught.value).splitlines()]
    assert named == ["task.ohem_threshold", "steps.epochs"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": {"name": "segmentation"}}, "mixing: is for classification"),
        ({"task": {"name": "detection"}, "mixing": OFF, "data": {"order": "block"}}, "data.order: block cannot put"),
        ({"task": {"name": "detection"}, "mixing": OFF, "data": {"backend": "synthetic"}}, "data.backend: synthetic"),
        ({"task": {"name": "segmentation", "class_weights": [1]}, "mixing": OFF}, "task.class_weights: 1 weights for"),
    ],
)
def test_what_a_dense_task_has_no_use_for_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values)
