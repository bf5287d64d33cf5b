"""Drop path: a mask per sample and branch that follows from the sample's key alone."""

import pytest
import timm
import torch

import dgt
from dgt.models import drop_path_scale, hash_uint32

NUM_KEYS = 20_000
# Standard deviation of the mean of NUM_KEYS coin flips is at most 0.5 / sqrt(NUM_KEYS); five of them bound every test.
FIVE_SIGMA = 5 * 0.5 / NUM_KEYS**0.5


def keep_masks(drop_prob: float, indices: range, keys: torch.Tensor | None = None) -> torch.Tensor:
    """(len(indices), NUM_KEYS) bool."""
    keys = torch.arange(NUM_KEYS) if keys is None else keys
    x = torch.zeros(len(keys), 1)
    return torch.stack([drop_path_scale(x, drop_prob, keys, i).flatten() > 0 for i in indices])


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("dgt_nano", num_classes=5, **kwargs)


def test_hash_values_are_fixed():
    keys = torch.tensor([0, 1, 2, 12345, 2**31, 2**32 - 1])
    # Runs resumed with a newer version must drop the same paths.
    assert hash_uint32(keys, 0).tolist() == [479660387, 3781211601, 1783966147, 4271430136, 3831646443, 3768681343]
    assert hash_uint32(keys, 45).tolist() == [3463006642, 3186441253, 2800755735, 3957110146, 649697323, 1633725061]


def test_hash_agrees_with_unbounded_integers_so_int64_never_overflows():
    def reference(key: int, index: int) -> int:
        x = (key + (index + 1) * 0x9E3779B9) % 2**32
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x7FEB352D % 2**32
        return x ^ (x >> 15)

    keys = [0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 0xDEADBEEF]
    for index in (0, 1, 47, 10_000):
        assert hash_uint32(torch.tensor(keys), index).tolist() == [reference(key, index) for key in keys]


def test_hash_flips_every_output_bit_with_probability_one_half_for_every_input_bit():
    keys = torch.randint(2**32, (NUM_KEYS,), generator=torch.Generator().manual_seed(0))
    hashes = hash_uint32(keys, 3)
    for bit in range(32):
        flipped = hashes ^ hash_uint32(keys ^ (1 << bit), 3)
        share = torch.stack([(flipped >> out & 1).double().mean() for out in range(32)])
        assert (share - 0.5).abs().max() < FIVE_SIGMA


@pytest.mark.parametrize("drop_prob", [0.05, 0.3, 0.5, 0.9])
def test_keep_rate_is_one_minus_the_drop_probability(drop_prob):
    rates = keep_masks(drop_prob, range(16)).double().mean(1)
    assert (rates - (1 - drop_prob)).abs().max() < FIVE_SIGMA


def test_kept_paths_are_scaled_to_keep_the_expectation():
    scale = drop_path_scale(torch.zeros(1000, 2, 2, 3), 0.25, torch.arange(1000), 0)
    assert scale.shape == (1000, 1, 1, 1)
    assert set(scale.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_masks_of_different_branches_are_independent():
    masks = keep_masks(0.5, range(24)).double() - 0.5
    correlation = 4 * masks @ masks.T / NUM_KEYS
    assert (correlation - torch.eye(24)).abs().max() < 2 * FIVE_SIGMA


@pytest.mark.parametrize("distance", [1, 2, 64, 4096])
def test_masks_of_neighbouring_keys_are_independent(distance):
    keys = torch.arange(NUM_KEYS)
    here = keep_masks(0.5, range(8), keys).double() - 0.5
    there = keep_masks(0.5, range(8), keys + distance).double() - 0.5
    assert (4 * (here * there).mean(1)).abs().max() < 2 * FIVE_SIGMA


def test_mask_is_the_same_in_every_dtype():
    keys = torch.arange(500)
    masks = [
        drop_path_scale(torch.zeros(500, 1, dtype=dtype), 0.3, keys, 7) > 0
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_without_keys_the_masks_come_from_torchs_generator():
    x = torch.zeros(NUM_KEYS, 1)
    torch.manual_seed(3)
    first = drop_path_scale(x, 0.3, None, 0)
    assert not torch.equal(drop_path_scale(x, 0.3, None, 0), first)
    torch.manual_seed(3)
    assert torch.equal(drop_path_scale(x, 0.3, None, 0), first)
    assert abs((first > 0).double().mean().item() - 0.7) < FIVE_SIGMA


def test_rates_rise_linearly_over_the_blocks_and_every_branch_has_its_own_index():
    model = build(drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [block.index for block in blocks] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_outside_of_zero_to_one_is_refused(rate):
    with pytest.raises(ValueError, match="drop_path_rate"):
        build(drop_path_rate=rate)


def test_a_samples_output_in_training_does_not_depend_on_its_batch_mates_or_its_place():
    model = build(drop_path_rate=0.5).double().train()
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    keys = torch.tensor([5, 9, 2**32 - 1, 7, 1234567, 0])
    assert model.grouping(32, 32)[0].mode == "grouped"
    with torch.no_grad():
        whole = model(x, keys)
        order = torch.tensor([4, 0, 2])
        torch.testing.assert_close(model(x[order], keys[order]), whole[order], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(x, keys + 1), whole)


def test_a_dropped_sample_passes_through_the_block_with_its_position_embedding_only():
    block = dgt.models.DGTBlock(32, build().arch, index=3, drop_path=0.5).double().train()
    keys = torch.arange(64)
    x = torch.randn(64, 4, 4, 32, generator=torch.Generator().manual_seed(1)).double()
    attn_kept, ffn_kept = keep_masks(0.5, range(6, 8), keys)
    with torch.no_grad():
        y = block(x, keys)
        shortcut = x + block.cpe(x)
    untouched = (y == shortcut).flatten(1).all(1)
    assert torch.equal(untouched, ~attn_kept & ~ffn_kept)
    assert 0 < untouched.sum() < 64


def test_keys_are_ignored_in_evaluation_and_without_drop_path():
    x = torch.randn(2, 3, 32, 32)
    keys = torch.tensor([1, 2])
    model = build(drop_path_rate=0.5).eval()
    assert torch.equal(model(x, keys), model(x))
    model = build().train()
    assert torch.equal(model(x, keys), model(x))


def test_forward_intermediates_takes_the_keys_too():
    model = build(drop_path_rate=0.5).train()
    x, keys = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    final, _ = model.forward_intermediates(x, sample_keys=keys)
    assert torch.equal(final, model.forward_features(x, keys))


def test_a_bfloat16_branch_is_scaled_by_the_exact_factor() -> None:
    keys = torch.arange(64)
    x = torch.ones(64, 2, dtype=torch.bfloat16)
    scale = drop_path_scale(x, 0.1, keys, 0)
    assert scale.dtype == torch.float32
    assert scale.max().item() == torch.tensor(1 / 0.9, dtype=torch.float32).item()
