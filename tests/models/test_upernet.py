"""UPerNet: against its definition in torch's own functions, and as a pure function of each sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dgt.models import ModelConfig
from dgt.models.drop_path import drop_path_scale
from dgt.models.resampling import enlarge, pool, resize
from dgt.models.upernet import ConvNorm, UPerNet, channel_scale


def build(drop_path_rate: float = 0.0, seed: int = 0, **options) -> UPerNet:
    torch.manual_seed(seed)
    options = {"channels": 16, "auxiliary_channels": 8, "norm_groups": 4} | options
    return UPerNet(ModelConfig(name="dgt_nano", drop_path_rate=drop_path_rate), 5, **options)


def images(n: int, height: int, width: int) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def any_map(layout: torch.memory_format) -> Tensor:
    """(2, 3, 7, 5) float64 that requires a gradient."""
    return torch.randn(2, 3, 7, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cells", [1, 2, 3, 6, 8])
def test_pooling_takes_the_means_that_adaptive_pooling_takes(cells: int, layout: torch.memory_format) -> None:
    x = any_map(layout)
    torch.testing.assert_close(pool(x, cells), F.adaptive_avg_pool2d(x, cells))
    weight = torch.randn(2, 3, cells, cells, dtype=torch.float64)
    ours = torch.autograd.grad((pool(x, cells) * weight).sum(), x)
    theirs = torch.autograd.grad((F.adaptive_avg_pool2d(x, cells) * weight).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(7, 5), (14, 10), (19, 33), (3, 4), (1, 1)])
def test_resizing_is_bilinear_interpolation(size: tuple[int, int], layout: torch.memory_format) -> None:
    x = any_map(layout)
    expected = F.interpolate(x, size=size, mode="bilinear")
    torch.testing.assert_close(resize(x, size), expected)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad((resize(x, size) * weight).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weight).sum(), x))


@pytest.mark.parametrize("size", [(28, 20), (27, 18), (25, 17)])
def test_enlarging_leaves_cells_in_their_places_where_a_size_was_rounded_up(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    whole = F.interpolate(x, size=(28, 20), mode="bilinear")
    torch.testing.assert_close(enlarge(x, 4, size), whole[..., : size[0], : size[1]])


def test_under_autocast_resampling_is_exact_in_float32_and_keeps_the_dtype() -> None:
    x = torch.randn(1, 2, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(resize(x, (9, 9)), F.interpolate(x, size=(9, 9), mode="bilinear"))
        assert pool(x.bfloat16(), 3).dtype == enlarge(x.bfloat16(), 2, (11, 14)).dtype == torch.bfloat16


def conv_norm(module: ConvNorm, x: Tensor) -> Tensor:
    norm = module.norm
    y = F.conv2d(x, module.conv.weight, padding=module.conv.kernel_size[0] // 2)
    return F.relu(F.group_norm(y, norm.num_groups, norm.weight, norm.bias))


def test_the_network_is_upernet_as_it_is_written_in_torchs_functions() -> None:
    network = build().double().eval()
    x = images(2, 96, 64).double()
    maps = network.features(x)
    top = maps[3]
    pooled = [
        F.interpolate(conv_norm(branch, F.adaptive_avg_pool2d(top, cells)), size=top.shape[-2:], mode="bilinear")
        for cells, branch in zip((1, 2, 3, 6), network.pyramid.branches, strict=True)
    ]
    levels = [conv_norm(network.pyramid.fusion, torch.cat([top, *pooled], dim=1))]
    for stage in (2, 1, 0):
        lateral = conv_norm(network.laterals[stage], maps[stage])
        levels.insert(0, lateral + F.interpolate(levels[0], size=lateral.shape[-2:], mode="bilinear"))
    outputs = [conv_norm(network.smoothers[stage], levels[stage]) for stage in range(3)] + levels[3:]
    outputs = [F.interpolate(y, size=(24, 16), mode="bilinear") for y in outputs]
    fused = conv_norm(network.fusion, torch.cat(outputs, dim=1))
    classifier = network.classifier.conv
    torch.testing.assert_close(network(x), F.conv2d(fused, classifier.weight, classifier.bias))

    network.train().classifier.dropout = network.auxiliary.classifier.dropout = 0.0
    last = network.auxiliary.classifier.conv
    expected = F.conv2d(conv_norm(network.auxiliary.conv, maps[2]), last.weight, last.bias)
    torch.testing.assert_close(network(x)[1], expected)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (45, 70), (33, 31), (100, 32)])
def test_any_image_size_gives_maps_at_strides_4_and_16_rounded_up(height: int, width: int) -> None:
    network = build()
    x = images(2, height, width)
    logits, auxiliary = network(x)
    assert logits.shape == (2, 5, -(-height // 4), -(-width // 4))
    assert auxiliary.shape == (2, 5, -(-height // 16), -(-width // 16))
    assert network.eval()(x).shape == logits.shape


def test_without_auxiliary_channels_there_is_no_such_head() -> None:
    network = build(auxiliary_channels=0)
    assert network(images(1, 64, 64))[1] is None
    assert not [name for name, _ in network.named_parameters() if "auxiliary" in name]
    assert len(network.heads()) + 1 == len(build().heads())


def test_every_parameter_takes_part_in_a_training_pass() -> None:
    network = build(drop_path_rate=0.1)
    logits, auxiliary = network(images(2, 64, 64), torch.tensor([3, 4]))
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_the_heads_are_all_that_is_beside_the_backbone_and_are_called_once_each() -> None:
    network = build()
    calls: list[nn.Module] = []
    for head in network.heads():
        head.register_forward_hook(lambda module, *_: calls.append(module))
    network(images(1, 64, 64))
    assert sorted(map(id, calls)) == sorted(map(id, network.heads()))
    inside = {id(parameter) for head in network.heads() for parameter in head.parameters()}
    outside = {name.split(".")[0] for name, parameter in network.named_parameters() if id(parameter) not in inside}
    assert outside == {"backbone", "norms"}


def test_no_norm_looks_at_other_samples() -> None:
    batch_norms = [
        name for name, module in build().named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    ]
    assert batch_norms == []


def test_a_samples_logits_in_training_do_not_depend_on_its_batch_mates_or_its_place() -> None:
    network = build(drop_path_rate=0.3, dropout=0.5).double().train()
    x, keys = images(4, 64, 32).double(), torch.tensor([5, 2**32 - 1, 7, 0])
    with torch.no_grad():
        whole = network(x, keys)
        order = torch.tensor([3, 1])
        for ours, all_of_them in zip(network(x[order], keys[order]), whole, strict=True):
            torch.testing.assert_close(ours, all_of_them[order], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(network(x, keys + 1)[0], whole[0])


def test_dropout_drops_whole_channels_at_its_rate_and_keeps_the_expectation() -> None:
    scale = channel_scale(torch.zeros(400, 64, 2, 2), 0.25, torch.arange(400), 2**20)
    assert scale.shape == (400, 64, 1, 1)
    assert set(scale.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # five standard deviations of the mean of 25,600 draws
    assert abs((scale > 0).double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / scale.numel()) ** 0.5


def test_dropout_of_both_heads_and_of_the_drop_paths_are_independent_draws() -> None:
    network = build(dropout=0.5)
    keys = torch.arange(20_000)
    ones = torch.ones(len(keys), 16, 1, 1)
    masks = [drop_path_scale(ones, 0.5, keys, index).reshape(-1, 1) for index in range(10)]
    for classifier in (network.classifier, network.auxiliary.classifier):
        seen: list[Tensor] = []
        classifier.conv.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        classifier(ones[:, : classifier.conv.in_channels], keys)
        masks.append(seen[0].flatten(1))
    drawn = (torch.cat(masks, dim=1) > 0).double() - 0.5
    correlation = 4 * drawn.T @ drawn / len(keys)
    assert drawn.shape[1] == 10 + 16 + 8
    assert (correlation - torch.eye(34)).abs().max() < 5 / len(keys) ** 0.5


def test_without_keys_dropout_draws_from_torchs_generator_and_in_evaluation_not_at_all() -> None:
    network = build(dropout=0.5)
    x = images(2, 64, 64)
    torch.manual_seed(3)
    first = network(x)[0]
    assert not torch.equal(network(x)[0], first)
    torch.manual_seed(3)
    assert torch.equal(network(x)[0], first)
    network.eval()
    assert torch.equal(network(x, torch.tensor([1, 2])), network(x))


def test_classifiers_start_small_and_other_convolutions_keep_the_gradients_variance() -> None:
    network = build(channels=64, auxiliary_channels=32)
    for classifier in (network.classifier, network.auxiliary.classifier):
        assert abs(classifier.conv.weight.std().item() / 0.01 - 1) < 0.2
        assert not classifier.conv.bias.any()
    weight = network.fusion.conv.weight
    assert abs(weight.std().item() / (2 / (9 * 64)) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "million", "training_million", "giga"),
    [("dgt_tiny", 52.52, 53.14, 933.8), ("dgt_small", 82.60, 83.52, 1041.8), ("dgt_base", 123.90, 125.12, 1189.3)],
)
def test_parameters_and_gmacs_at_512_x_2048(name: str, million: float, training_million: float, giga: float) -> None:
    with torch.device("meta"):
        network = UPerNet(ModelConfig(name=name), 150).eval()
        arch = network.backbone.arch
        maps = [torch.zeros(1, dim, 128 >> i, 512 >> i) for i, dim in enumerate(arch.embed_dims)]
        counter = FlopCounterMode(display=False)
        with counter:
            network.classifier(network.fused(maps))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    auxiliary = sum(parameter.numel() for parameter in network.auxiliary.parameters())
    assert round(parameters / 1e6, 2) == training_million
    assert round((parameters - auxiliary) / 1e6, 2) == million
    assert round(network.macs(512, 2048) / 1e9, 1) == giga
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2
    assert network.macs(512, 2048) == network.backbone.macs(512, 2048) + convolutions


def test_a_network_that_is_no_dgt_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet18 is no backbone for dense prediction"):
        UPerNet(ModelConfig(name="resnet18"), 5)
