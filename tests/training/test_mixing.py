from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config
from timm.data.mixup import mixup_target
from torch.nn import functional as F

from data_pipeline.loader import Batch
from data_pipeline.transforms import normalize
from dgt.training.draws import drop_path_keys
from dgt.training.inputs import StepInputs
from dgt.training.mixing import MixingConfig, PairDraws, boxes, draw_pairs, mix

BATCH = 64


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, 3, 12, 10, generator=rng), torch.randint(0, 7, (BATCH,), generator=rng)


@pytest.mark.parametrize("config", [MixingConfig(), MixingConfig(cutmix_alpha=0.0), MixingConfig(mixup_alpha=0.0)])
def test_any_cut_of_the_batch_into_even_parts_mixes_alike(config: MixingConfig) -> None:
    images, labels = images_and_labels()
    positions = torch.arange(BATCH)
    draws = draw_pairs(1, 5, BATCH, config)
    whole = mix(images, labels, positions, draws)
    for cut in (2, 6, 32):
        parts = [mix(images[i : i + cut], labels[i : i + cut], positions[i : i + cut], draws)
                 for i in range(0, BATCH, cut)]  # fmt: skip
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.share for p in parts]), whole.share)
        assert torch.equal(torch.cat([p.partner_labels for p in parts]), whole.partner_labels)


def test_mixup_is_the_weighted_sum_with_the_neighbour() -> None:
    images, labels = images_and_labels()
    draws = PairDraws(np.full(BATCH // 2, 0.75), np.zeros(BATCH // 2, bool), np.zeros((BATCH // 2, 2)))
    mixed = mix(images, labels, torch.arange(BATCH), draws)
    torch.testing.assert_close(mixed.images[4], 0.75 * images[4] + 0.25 * images[5])
    torch.testing.assert_close(mixed.images[5], 0.75 * images[5] + 0.25 * images[4])
    assert mixed.partner_labels[4] == labels[5]
    assert (mixed.share == 0.75).all()


def test_cutmix_pastes_the_neighbours_box_and_counts_its_clipped_area() -> None:
    images, labels = images_and_labels()
    centre = np.tile([0.0, 0.5], (BATCH // 2, 1))  # at the upper border: half of the box falls outside
    draws = PairDraws(np.full(BATCH // 2, 0.75), np.ones(BATCH // 2, bool), centre)
    mixed = mix(images, labels, torch.arange(BATCH), draws)
    top, bottom, left, right = boxes(draws, 12, 10)[0].tolist()
    assert (top, bottom) == (0, 3)  # sqrt(1 - 0.75) * 12 = 6 rows around row 0
    assert right - left in (4, 5, 6)
    expected = images[0].clone()
    expected[:, top:bottom, left:right] = images[1][:, top:bottom, left:right]
    assert torch.equal(mixed.images[0], expected)
    assert mixed.share[0].item() == pytest.approx(1 - (bottom - top) * (right - left) / 120)


def test_mixture_of_losses_equals_the_loss_of_timms_mixed_target() -> None:
    torch.manual_seed(0)
    logits, labels, share = torch.randn(2, 7), torch.tensor([1, 4]), 0.3
    # timm mixes with the reversed batch, which for two samples is the neighbour.
    target = mixup_target(labels, 7, torch.tensor([[share], [share]]), 0.1)
    expected = -(target * logits.log_softmax(1)).sum(1)
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    partner = F.cross_entropy(logits, labels.flip(0), reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(share * own + (1 - share) * partner, expected)


def test_draws_follow_their_distributions() -> None:
    draws = draw_pairs(0, 0, 20_000, MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.6, switch_prob=0.25))
    mixed = draws.share < 1
    # Binomial and Beta standard errors at 10,000 draws are below 0.006; four of them are allowed.
    assert mixed.mean() == pytest.approx(0.6, abs=0.02)
    assert draws.cutmix.mean() == pytest.approx(0.25, abs=0.02)
    assert draws.share[mixed & ~draws.cutmix].mean() == pytest.approx(0.5, abs=0.025)
    assert draws.share[mixed & ~draws.cutmix].var() == pytest.approx(0.25 / 2.6, abs=0.01)  # Beta(0.8, 0.8)
    assert draws.share[mixed & draws.cutmix].var() == pytest.approx(1 / 12, abs=0.01)  # uniform


def test_draws_depend_on_seed_and_step_alone() -> None:
    first, again = draw_pairs(1, 2, BATCH, MixingConfig()), draw_pairs(1, 2, BATCH, MixingConfig())
    assert (first.share == again.share).all()
    assert (first.share != draw_pairs(2, 1, BATCH, MixingConfig()).share).any()


def test_split_pairs_are_refused() -> None:
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match="whole pairs"):
        mix(images[:3], labels[:3], torch.arange(3), draw_pairs(0, 0, BATCH, MixingConfig()))
    with pytest.raises(ValueError, match="whole pairs"):
        mix(images[1:3], labels[1:3], torch.arange(1, 3), draw_pairs(0, 0, BATCH, MixingConfig()))


def test_drop_path_keys_belong_to_positions_not_to_ranks() -> None:
    whole = drop_path_keys(7, 3, torch.arange(BATCH), BATCH)
    assert torch.equal(drop_path_keys(7, 3, torch.arange(16, 32), BATCH), whole[16:32])
    assert len(set(whole.tolist())) == BATCH
    assert not torch.equal(whole, drop_path_keys(3, 7, torch.arange(BATCH), BATCH))
    assert 0 <= int(whole.min()) <= int(whole.max()) < 2**32


def test_nothing_is_mixed_from_the_off_epoch_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, mixing=MixingConfig(off_epoch=3))
    batch = Batch(
        images=torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8), labels=torch.arange(8) % 4,
        ids=torch.arange(8), positions=torch.arange(8), valid=torch.ones(8, dtype=torch.bool),
        copies=torch.zeros(8, dtype=torch.int64), changes=(),
    )  # fmt: skip
    mixed, last, whole = (StepInputs(config, 5, torch.device("cpu"), e)(batch, slice(0, 8)) for e in (0, 2, 3))
    assert mixed.share is not None
    assert all(x.images.is_contiguous(memory_format=torch.channels_last) for x in (mixed, whole))
    assert torch.equal(mixed.images, last.images)
    assert whole.share is None
    torch.testing.assert_close(whole.images, normalize(batch.images, config.data.mean, config.data.std))
    assert not torch.equal(mixed.images, whole.images)
    assert torch.equal(mixed.sample_keys, whole.sample_keys)
