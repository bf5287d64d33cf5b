"""Sizes, multiply-accumulates, grouping per stage, initialisation and autocast of the backbone."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dgt  # noqa: F401  (registers the models)
from dgt.models import DGT, Architecture, DGTBlock, StageGrouping

# Parameters in millions and GMACs at 224 pixels of the fit to the published sizes, and how far we may be from it.
PUBLISHED = {"dgt_tiny": (23.46, 4.36), "dgt_small": (52.03, 9.38), "dgt_base": (91.82, 16.28)}
TOLERANCE = 0.03


def on_meta(name: str, **kwargs) -> DGT:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gmacs_are_within_three_percent_of_the_published_sizes(name):
    model = on_meta(name)
    params, gmacs = PUBLISHED[name]
    assert num_parameters(model) / 1e6 == pytest.approx(params, rel=TOLERANCE)
    assert model.macs(224, 224) / 1e9 == pytest.approx(gmacs, rel=TOLERANCE)


@pytest.mark.parametrize(("size", "gmacs"), [(512, 22.8), (896, 69.8)])
def test_gmacs_grow_linearly_with_pixels_at_high_resolution(size, gmacs):
    assert on_meta("dgt_tiny").macs(size, size) / 1e9 == pytest.approx(gmacs, rel=TOLERANCE)


@pytest.mark.parametrize(("size", "gmacs"), [(512, 72.9), (896, 556)])
def test_gmacs_of_dense_attention_grow_quadratically(size, gmacs):
    assert on_meta("dgt_tiny", top_k=10**6).macs(size, size) / 1e9 == pytest.approx(gmacs, rel=TOLERANCE)


def test_nano_is_small_enough_for_a_demo():
    model = on_meta("dgt_nano", num_classes=10)
    assert 1.0e6 < num_parameters(model) < 2.0e6
    assert model.macs(64, 64) < 25e6


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75)])
def test_analytic_macs_equal_the_counted_ones_where_attention_is_dense(height, width):
    model = timm.create_model("dgt_nano", num_classes=10, top_k=10**6).eval()
    # The counter sees the two products of the unfused attention, but not the fused CPU kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, height, width))
    assert counter.get_total_flops() == 2 * model.macs(height, width)


def test_grouping_at_work_replaces_the_quadratic_term_by_clustering_selection_and_k_keys_per_query():
    grouped, dense = on_meta("dgt_nano"), on_meta("dgt_nano", top_k=10**6)
    difference = 0
    for tokens, dim in ((256, 32), (64, 64)):  # the two stages that group at 64 pixels
        clustering, selection, attention = 3 * (8 + 1) * tokens * dim, 8 * tokens * dim, 2 * tokens * 16 * dim
        difference += 2 * tokens * tokens * dim - (clustering + selection + attention)
    assert dense.macs(64, 64) - grouped.macs(64, 64) == difference


def test_grouping_tells_where_groups_are_at_work():
    assert on_meta("dgt_nano").grouping(64, 64) == [
        StageGrouping(256, 8, 16, "grouped"),
        StageGrouping(64, 8, 16, "grouped"),
        StageGrouping(16, 8, 16, "dense"),
        StageGrouping(4, 4, 4, "dense"),
    ]
    modes = [stage.mode for stage in on_meta("dgt_tiny").grouping(224, 224)]
    assert modes == ["grouped", "grouped", "grouped", "dense"]
    assert [stage.mode for stage in on_meta("dgt_tiny", num_groups=1).grouping(224, 224)] == ["dense"] * 4


def test_attention_options_reach_every_block():
    model = on_meta("dgt_nano", num_groups=5, top_k=7, num_iters=2)
    for module in model.modules():
        if isinstance(module, DGTBlock):
            assert module.attn.arch is model.arch
    assert model.arch == Architecture((32, 64, 128, 160), (1, 1, 2, 1), num_groups=5, top_k=7, num_iters=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 48 and 98 at 224 pixels; (448 / 224)^2 = 4 times the tokens, whose root is 2.
        ({}, [(48, 98)] * 4),
        ({"group_growth": 0.5}, [(96, 98)] * 4),
        ({"key_growth": 0.5}, [(48, 196)] * 4),
        ({"group_growth": 1.0, "key_growth": 0.25}, [(192, 139)] * 4),  # 98 * sqrt(2) = 138.6
    ],
)
def test_groups_and_keys_grow_with_the_tokens_of_each_stage(options, expected):
    model = on_meta("dgt_tiny", **options)
    arch, tokens = model.arch, [stage.tokens for stage in model.grouping(448, 448)]
    assert tokens == [112**2, 56**2, 28**2, 14**2]
    assert [arch.groups_and_keys(i, count) for i, count in enumerate(tokens)] == expected
    for size in (224, 96):
        same = [arch.groups_and_keys(i, stage.tokens) for i, stage in enumerate(model.grouping(size, size))]
        assert same == [(48, 98)] * 4, "what was chosen for 224 pixels, and no less for smaller images"


def test_groups_stop_growing_at_256_but_are_never_fewer_than_configured():
    grown = on_meta("dgt_tiny", group_growth=1.0)
    assert [stage.num_groups for stage in grown.grouping(1024, 1024)] == [256] * 4
    assert on_meta("dgt_tiny", num_groups=300, group_growth=0.5).grouping(1024, 1024)[0].num_groups == 300


def test_a_network_attends_by_the_groups_and_keys_that_it_reports(monkeypatch):
    from dgt.models import blocks

    seen, attention = [], blocks.dg_attention

    def noting(q, *args, num_groups, top_k, **options):
        seen.append((q.shape[2], min(num_groups, q.shape[2]), min(top_k, q.shape[2])))
        return attention(q, *args, num_groups=num_groups, top_k=top_k, **options)

    monkeypatch.setattr(blocks, "dg_attention", noting)
    # At 224 pixels stage 1 has 3136 tokens; a map of 60 x 68 cells has 4080: (4080 / 3136)^1 * 8 = 10.4 groups.
    model = timm.create_model("dgt_nano", num_classes=3, group_growth=1.0, key_growth=0.5).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 240, 272))
    stages = [stage[:3] for stage in model.grouping(240, 272)]
    assert stages[0] == (4080, 10, 18)
    assert seen == [stage for stage, depth in zip(stages, (1, 1, 2, 1), strict=True) for _ in range(depth)]


@pytest.mark.parametrize(
    "wrong",
    [{"num_groups": 0}, {"top_k": 0}, {"num_iters": 0}, {"head_dim": 24}, {"group_growth": -0.5}, {"key_growth": 1.5}],
)
def test_impossible_architectures_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        on_meta("dgt_nano", **wrong)


def test_initialisation_follows_the_seed_and_reaches_every_parameter():
    torch.manual_seed(5)
    fresh = timm.create_model("dgt_nano", num_classes=4)
    with torch.device("meta"):
        model = timm.create_model("dgt_nano", num_classes=4)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(5)
    model.init_weights()
    # Building draws once in the layers' own constructors and once for good; so compare statistics, not values.
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.isfinite(a).all(), name
        assert a.std(correction=0).item() == pytest.approx(b.std(correction=0).item(), rel=0.3, abs=1e-7), name
    torch.manual_seed(5)
    again = timm.create_model("dgt_nano", num_classes=4)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


def test_linear_weights_start_with_standard_deviation_two_hundredths_and_zero_biases():
    torch.manual_seed(0)
    model = timm.create_model("dgt_nano")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name


def test_there_is_no_buffer_and_no_batch_norm():
    model = on_meta("dgt_nano")
    assert list(model.buffers()) == []
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())


def test_the_layout_inside_a_stage_is_channels_last_without_copies():
    model = timm.create_model("dgt_nano").eval()
    seen = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        stage.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(2, 3, 64, 64))
    for block, stage in zip(seen[::2], seen[1::2], strict=True):
        assert all(x.is_contiguous() for x in block)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in stage)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast runs norms in float32 on CUDA only")
def test_the_residual_stream_stays_in_float32_under_autocast_on_cuda():
    model = timm.create_model("dgt_nano", num_classes=3).cuda()
    dtypes = []
    for module in model.modules():
        if isinstance(module, DGTBlock):
            module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 64, 64, device="cuda"))
    assert dtypes == [torch.float32] * 5


def test_gradients_under_bfloat16_autocast_are_finite_and_float32():
    model = timm.create_model("dgt_nano", num_classes=3).train()
    assert model.grouping(32, 32)[0].mode == "grouped"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(1, 3, 32, 32)).float().sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_model_runs_in_bfloat16_throughout():
    model = timm.create_model("dgt_nano", num_classes=3).to(torch.bfloat16).eval()
    logits = model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
