"""Building a model from its configuration, and what importing the package needs."""

import dataclasses
import subprocess
import sys

import pytest

from dgt.models import DGT, ModelConfig, build_model, freeze


def test_a_dgt_takes_its_options():
    config = ModelConfig("dgt_nano", drop_path_rate=0.2, num_groups=4, top_k=9, num_iters=2)
    model = build_model(config, num_classes=7, in_chans=1)
    assert isinstance(model, DGT)
    assert (model.arch.num_groups, model.arch.top_k, model.arch.num_iters) == (4, 9, 2)
    assert (model.num_classes, model.in_chans) == (7, 1)
    assert model.stages[3].blocks[0].drop_path == pytest.approx(0.2)


def test_options_left_out_keep_the_variants_own():
    model = build_model(ModelConfig("dgt_nano"), num_classes=2)
    assert (model.arch.num_groups, model.arch.top_k, model.arch.num_iters) == (8, 16, 3)


def test_any_timm_model_works():
    model = build_model(ModelConfig("test_vit", drop_path_rate=0.1), num_classes=6)
    assert model.get_classifier().out_features == 6


def test_dgt_options_on_another_model_are_refused_by_name():
    with pytest.raises(ValueError, match=r"test_vit.*num_groups, top_k"):
        build_model(ModelConfig("test_vit", num_groups=4, top_k=3), num_classes=6)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"dgt_tny.*dgt_tiny"):
        build_model(ModelConfig("dgt_tny"), num_classes=6)


@pytest.mark.parametrize(
    ("patterns", "learning"),
    [
        (("backbone",), {"head"}),
        (("stem", "stages.0", "stages.1"), {"stages.2", "stages.3", "norm", "head"}),
        (("stages.*", "norm.*"), {"stem", "head"}),
    ],
)
def test_what_is_frozen_needs_no_gradient(patterns, learning):
    model = build_model(ModelConfig("dgt_nano"), num_classes=3)
    freeze(model, patterns)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {".".join(name.split(".")[: 2 if name.startswith("stages") else 1]) for name in names} == learning


def test_a_name_of_nothing_to_freeze_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"freeze: 'stage.0' names no parameter; the nearest name is 'stages.0'"):
        freeze(build_model(ModelConfig("dgt_nano"), num_classes=3), ("stage.0",))


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig("dgt_nano").name = "other"  # type: ignore[misc]


def test_importing_dgt_registers_the_models_and_imports_no_optional_package():
    code = """
import sys, timm, torch
before = set(sys.modules)
import dgt
assert timm.is_model("dgt_nano")
new = {name.split(".")[0] for name in set(sys.modules) - before}
optional = {"pydantic", "yaml", "tensorboard", "webdataset", "simplejpeg", "cv2", "sklearn", "deepspeed", "submitit"}
assert not new & optional, new & optional
"""
    subprocess.run([sys.executable, "-c", code], check=True)
