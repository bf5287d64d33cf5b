"""What timm's own test-suite asks of a model (tests/test_models.py there, TorchScript aside), asked of ours."""

import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch._subclasses import FakeTensorMode

import dgt  # noqa: F401  (registers the models)

VARIANTS = ["dgt_nano", "dgt_tiny", "dgt_small", "dgt_base", "dgt_base_384"]
# Grouping is at work in the first two stages of dgt_nano at its own size.
NANO_SIZE = 64


def create(name: str = "dgt_nano", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(batch: int = 1, size: int = NANO_SIZE, in_chans: int = 3, width: int | None = None) -> torch.Tensor:
    return torch.randn(batch, in_chans, size, width or size, generator=torch.Generator().manual_seed(1))


def test_variants_are_registered_under_the_dgt_module():
    assert set(timm.list_models(module="dgt")) == set(VARIANTS)


def test_forward_gives_finite_logits_and_checkpointing_does_not_change_them():
    model = create().eval()
    x = images(size=NANO_SIZE)
    logits = model(x)
    assert logits.shape == (1, 1000)
    assert torch.isfinite(logits).all()
    model.set_grad_checkpointing()
    assert torch.equal(model(x), logits)


def test_backward_reaches_every_parameter():
    model = create(num_classes=42).train()
    logits = model(images(batch=2))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg_describes_the_model(name):
    with torch.device("meta"):
        model = create(name)
    cfg, state = model.default_cfg, model.state_dict()
    _, height, width = cfg["input_size"]
    assert model.grouping(height, width)[-1].tokens == math.prod(cfg["pool_size"])
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.head_hidden_size)
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]


@pytest.mark.parametrize("name", ["dgt_nano", "dgt_base_384"])
def test_forward_features_are_unpooled_and_as_large_as_the_default_cfg_says(name):
    with FakeTensorMode():  # shapes only, for models of this size
        model = create(name).eval()
        features = model.forward_features(torch.empty(1, *model.default_cfg["input_size"]))
        assert features.shape == (1, model.num_features, *model.default_cfg["pool_size"])
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


def test_classifier_and_pooling_can_be_removed_and_replaced():
    model = create().eval()
    x = images(batch=2)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7


def test_pooling_that_widens_the_features_widens_the_head():
    model = create(global_pool="catavgmax", num_classes=5).eval()
    assert model.head_hidden_size == 2 * model.num_features
    assert model.get_classifier().in_features == model.head_hidden_size
    assert model(images()).shape == (1, 5)


def test_classifier_and_pooling_can_be_left_out_at_creation():
    assert create(num_classes=0).eval()(images()).shape == (1, 160)
    assert create(num_classes=0, global_pool="").eval()(images()).shape == (1, 160, 2, 2)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (65, 33), (97, 31), (7, 5), (1, 1)])
def test_any_input_size_gives_maps_rounded_up_at_each_halving(height, width):
    model = create(num_classes=3).eval()
    x = images(size=height, width=width)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for feature, info in zip(maps, model.feature_info, strict=True):
        stride = info["reduction"]
        assert feature.shape == (1, info["num_chs"], math.ceil(height / stride), math.ceil(width / stride))
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    model = create(in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model(images(in_chans=in_chans)).shape == (1, 1000)


def test_the_logits_of_an_image_do_not_depend_on_its_batch_mates():
    model = create(num_classes=3).double().eval()
    x = images(batch=3, size=32).double()
    assert model.grouping(32, 32)[0].mode == "grouped"
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x), alone, rtol=1e-12, atol=1e-12)


def test_dropout_acts_before_the_classifier_only():
    model = create(drop_rate=0.5).train()
    x = images(batch=2, size=32)
    assert torch.equal(model.forward_features(x), model.forward_features(x))
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook", "fx"])
def test_features_only_gives_the_same_pyramid_with_each_of_timms_extractors(feature_cls):
    if feature_cls == "fx":
        pytest.importorskip("torchvision")
    x = images(size=96)
    expected = create().eval().forward_intermediates(x, intermediates_only=True)
    model = create(features_only=True, feature_cls=feature_cls).eval()
    outputs = model(x)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert model.feature_info.channels() == [32, 64, 128, 160]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [list(o.shape) for o in outputs] == [[1, 32, 24, 24], [1, 64, 12, 12], [1, 128, 6, 6], [1, 160, 3, 3]]
    for output, reference in zip(outputs, expected, strict=True):
        assert torch.equal(output, reference)


def test_features_only_selects_out_indices_and_prunes_the_rest():
    x = images()
    expected = create().eval().forward_intermediates(x, intermediates_only=True)
    model = create(features_only=True, out_indices=(0, 2)).eval()
    outputs = model(x)
    assert model.feature_info.channels() == [32, 128]
    assert len(outputs) == 2
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[2])
    assert not any(name.startswith(("model.stages.3", "model.head", "model.norm")) for name in model.state_dict())


def test_forward_intermediates_agrees_with_forward_features():
    model = create().eval()
    x = images()
    final, maps = model.forward_intermediates(x, output_fmt="NCHW")
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    axis, spatial = get_channel_dim("NCHW"), get_spatial_dim("NCHW")
    assert [m.shape[axis] for m in maps] == info.channels()
    assert [m.shape[spatial[0]] for m in maps] == [NANO_SIZE // r for r in info.reduction()]
    assert torch.equal(final, model.forward_features(x))
    model.set_grad_checkpointing()
    assert torch.equal(final, model.forward_intermediates(x)[0])


def test_forward_intermediates_options():
    model = create().eval()
    x = images()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(model.forward_intermediates(x, norm=True, intermediates_only=True)[-1], final)
    assert not torch.equal(maps[-1], final)
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, maps, strict=True))
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [m.shape[1] for m in last_two] == [128, 160]
    early, chosen = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(early, maps[1])
    assert len(chosen) == 2
    late, chosen = model.forward_intermediates(x, indices=[0, -1], stop_early=True)
    assert torch.equal(late, final)
    assert torch.equal(chosen[1], maps[3])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_what_the_chosen_stages_need():
    model = create(num_classes=5).eval()
    x = images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model.forward_features(x), maps[1])
    assert model.num_features == model.head_hidden_size == 64
    assert model.macs(64, 64) < create(num_classes=0).macs(64, 64)
    whole = create(num_classes=5).eval()
    assert whole.prune_intermediate_layers(1, prune_head=False) == [3]
    assert whole(x).shape == (1, 5)


def _fx_model(model: torch.nn.Module, train: bool = False) -> torch.nn.Module:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    tracer_kwargs = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = extraction.get_graph_node_names(model, tracer_kwargs=tracer_kwargs)
    return extraction.create_feature_extractor(
        model,
        train_return_nodes=train_nodes[-1:],
        eval_return_nodes=eval_nodes[-1:],
        tracer_kwargs=tracer_kwargs,
    )


def test_fx_trace_gives_the_same_output():
    model = create().eval()
    x = images(size=NANO_SIZE)
    traced = _fx_model(model)
    with torch.inference_mode():
        (output,) = traced(x).values()
        assert torch.equal(output, model(x))
        (output,) = traced(images(size=48, width=80)).values()
        assert torch.equal(output, model(images(size=48, width=80)))


def test_fx_trace_trains_with_drop_path():
    traced = _fx_model(create(num_classes=42, drop_path_rate=0.2).train(), train=True)
    (output,) = traced(images(batch=2)).values()
    output.mean().backward()
    assert output.shape == (2, 42)
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_every_parameter_by_depth(coarse):
    model = create("dgt_nano")
    layer_of = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(layer_of) == {name for name, _ in model.named_parameters()}
    assert layer_of["stem.conv1.weight"] == 0
    blocks = [layer_of[f"stages.{s}.blocks.{b}.attn.qkv.weight"] for s, b in [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]]
    assert blocks == ([1, 2, 3, 3, 4] if coarse else [1, 2, 3, 4, 5])
    assert coarse or layer_of["norm.weight"] == blocks[-1]
    assert layer_of["head.fc.weight"] == max(layer_of.values()) > blocks[-1]


def test_layer_decay_shrinks_the_learning_rate_towards_the_stem():
    model = create()
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale_of) == len(list(model.parameters()))
    chain = [model.stem.conv1, *(stage.blocks[0].attn.qkv for stage in model.stages), model.head.fc]
    scales = [scale_of[id(layer.weight)] for layer in chain]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    assert (
        scale_of[id(model.stages[2].blocks[1].attn.qkv.weight)]
        == 2 * scale_of[id(model.stages[2].blocks[0].attn.qkv.weight)]
    )


def test_weight_decay_spares_biases_and_norms_and_nothing_else():
    model = create()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    spared = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in spared) == (name.endswith(".bias") or "norm" in name or ".downsample.1." in name), name


def test_safetensors_round_trip_through_create_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = create(num_classes=11).eval()
    path = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), path)
    torch.manual_seed(123)
    loaded = timm.create_model("dgt_nano", num_classes=11, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(images()), model(images()))


def test_weights_of_base_fit_base_at_384():
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in create(name).state_dict().items()} for name in ("dgt_base", "dgt_base_384")]
    assert shapes[0] == shapes[1]
