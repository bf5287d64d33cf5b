"""The parts of R-CNN: anchors, draws, pooled regions, what masks are to be, and the stages of a cascade."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rcnn_small import CANVAS, HEADS, KEYS, RPN, SIZES, TARGETS, build, full_masks, images, instances
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from data_pipeline.targets.instances import Instances
from dgt.models.drop_path import hash_uint32
from dgt.models.mask_targets import mask_targets
from dgt.models.rcnn import truth_of
from dgt.models.region_sampling import KeyedSampler
from dgt.models.roi_align import RegionPool
from dgt.models.roi_heads import Matched, Truth
from dgt.models.rpn import ProposalNetwork, on_image, overlaps


def test_a_sampler_takes_its_share_of_positives_and_fills_up_with_negatives() -> None:
    labels = torch.tensor([1, 0, -1, 2, 0, 0, 3, 0, -1, 0, 5, 0])
    chosen = KeyedSampler(6, 0.5, draw=7).of_image(labels, torch.tensor(5))
    assert len(chosen) == 6
    assert sum(labels[chosen] >= 1) == 3
    assert torch.equal(chosen, chosen.unique())
    few = KeyedSampler(8, 0.25, draw=7).of_image(labels, torch.tensor(5))
    assert sorted(labels[few].tolist())[:6] == [0] * 6
    everything = KeyedSampler(100, 0.5, draw=7).of_image(labels, torch.tensor(5))
    assert torch.equal(everything, torch.where(labels >= 0)[0])


def test_only_the_background_is_not_learned_from_where_an_anchors_centre_lies_beyond_the_image() -> None:
    centres = torch.tensor([[39.0, 63.0], [40.0, 10.0], [10.0, 64.0], [70.0, 70.0], [0.0, 0.0], [50.0, 5.0]])
    anchors = torch.cat([centres - 8, centres + 8], dim=1)
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, -1.0])
    assert on_image(labels, anchors, (64, 40)).tolist() == [0, -1, -1, 1, -1, -1]


def test_proposals_learn_nothing_from_the_padding() -> None:
    net = build(rpn=replace(RPN, anchors_per_image=10_000))
    proposed = net.rpn(net.pyramid(images(1)), [(40, 64)])
    objectness, _ = net.rpn.losses(proposed, [(40, 64)], [torch.zeros(0, 4)], KEYS[:1])
    (gradient,) = torch.autograd.grad(objectness.sum(), proposed.objectness)
    centres = (proposed.anchors[:, :2] + proposed.anchors[:, 2:]) / 2
    within = (centres[:, 0] < 64) & (centres[:, 1] < 40)
    assert 0.2 < float(within.float().mean()) < 0.5
    assert torch.equal(gradient[0] != 0, within)


def test_a_sampler_takes_each_candidate_equally_often_and_by_another_draw_others() -> None:
    labels, keys = torch.zeros(20), torch.arange(2000)
    counts = {}
    for draw in (1, 2):
        sampler = KeyedSampler(5, 0.5, draw)
        counts[draw] = torch.stack([torch.bincount(sampler.of_image(labels, key), minlength=20) for key in keys])
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert all(((count.sum(dim=0) - 500).abs() < 4.5 * deviation).all() for count in counts.values())
    both = (counts[1] * counts[2]).sum(dim=1).double().mean()  # 5 of 20 twice: 1.25 in common
    assert abs(both - 1.25) < 4.5 * 1 / 2000**0.5


@pytest.mark.parametrize("resolution", [7, 28])
def test_mask_targets_are_roi_align_of_each_objects_whole_map(resolution: int) -> None:
    size = (70, 90)
    target = instances(3, 6, size)
    target.boxes[0] = (0, 0, 90, 70)  # as large as the image, so that the border counts
    masks = (np.ones((70, 90), np.uint8), *(target.masks or ())[1:])
    target = Instances(target.boxes, target.labels, masks)
    rng = torch.Generator().manual_seed(0)
    matched = torch.randint(0, 6, (40,), generator=rng)
    boxes = torch.from_numpy(target.boxes)[matched] + 6 * torch.randn(40, 4, generator=rng)
    boxes = boxes.clamp(torch.zeros(4), torch.tensor([90.0, 70.0, 90.0, 70.0]))
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.5)
    boxes[0] = torch.tensor([80.0, 0.0, 89.0, 5.0])  # perhaps none of its object
    rois = torch.cat([matched[:, None].float(), boxes], dim=1)
    expected = roi_align(full_masks(target, size)[:, None].float(), rois, resolution, 1.0, -1, aligned=True)[:, 0]
    corners = [(int(top), int(left)) for left, top, *_ in target.boxes.tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        found = mask_targets(masks, corners, size, boxes, matched, resolution)
    assert 0.1 < float(expected.mean()) < 0.9
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert mask_targets(masks, corners, size, boxes[:0], matched[:0], resolution).shape == (0, resolution, resolution)


def test_regions_are_pooled_on_the_level_for_their_size_as_torchvisions_aligned_roi_align_does_it() -> None:
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 512 // stride, 512 // stride, generator=rng).double() for stride in (4, 8, 16, 32)]
    maps = [level.requires_grad_() for level in maps]
    sides = [20.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0]
    small = torch.tensor([[3.0, 5.0, 3 + side, 5 + side] for side in sides])
    boxes = [torch.tensor([[500.0, -9.0, 515.0, 80.0], [7.0, 7.0, 7.0, 7.0]]).double(), small.double()]
    pooled = RegionPool(7)(maps, boxes)
    expected = []
    for image, own, levels in zip((0, 1), boxes, ([0, 0], [0, 0, 1, 1, 2, 2, 3]), strict=True):
        for box, level in zip(own, levels, strict=True):
            roi = torch.cat([box.new_tensor([image]), box])[None]
            expected.append(roi_align(maps[level], roi, 7, 0.25 / 2**level, 2, aligned=True))
    torch.testing.assert_close(pooled, torch.cat(expected))
    direction = torch.randn(pooled.shape, generator=rng).double()
    gradients = torch.autograd.grad((pooled * direction).sum(), maps)
    torch.testing.assert_close(gradients, torch.autograd.grad((torch.cat(expected) * direction).sum(), maps))
    nothing = RegionPool(14)(maps, [small[:0].double()] * 2)
    assert nothing.shape == (0, 3, 14, 14)
    assert nothing.requires_grad, "else engines that shard reduce the mask head's gradient out of turn, and hang"


class Answer(nn.Module):
    """A box head that says the same of every region."""

    def __init__(self, logits: list[float], deltas: list[float]) -> None:
        super().__init__()
        self.logits, self.deltas = torch.tensor(logits), torch.tensor(deltas)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(pooled), -1), self.deltas.expand(len(pooled), -1)


def test_a_cascades_stage_gets_the_boxes_that_the_one_before_has_refined() -> None:
    heads = build("cascade_mask_rcnn", max_detections=1).roi_heads
    logits = [[0.0, 3.0, 0.0, 1.0], [0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    deltas = [[1.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 15 * np.log(2), 0.0]]
    heads.box_heads = nn.ModuleList(map(Answer, logits, deltas))
    maps = [torch.zeros(1, 16, 64 // 2**i, 128 // 2**i) for i in range(4)]
    box = torch.tensor([[10.0, 20.0, 30.0, 30.0]])
    regions = [own[0] for _, own, *_ in heads.passes(maps, [box], [CANVAS])]
    # 1/10 of the width to the right; then 4/20 of the height down; then twice as wide (with the last stage's 1/15)
    expected = torch.tensor([[10.0, 20.0, 30.0, 30.0], [12.0, 20.0, 32.0, 30.0], [12.0, 22.0, 32.0, 32.0]])
    torch.testing.assert_close(torch.cat(regions), expected)
    found = heads.detections(maps, [box], [CANVAS])[0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[2.0, 22.0, 42.0, 32.0]]))
    scores = torch.tensor(logits).softmax(dim=1).mean(dim=0)[1:]
    torch.testing.assert_close(found["scores"][0], scores.max())
    assert found["labels"][0] == scores.argmax()


def test_a_cascades_stages_ask_for_more_and_more_overlap_and_weigh_less() -> None:
    net = build("cascade_mask_rcnn")
    heads = net.roi_heads
    truth = Truth(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([2]), (), ())
    regions = torch.tensor([[0.0, 0.0, 10.0, side] for side in (10.0, 6.5, 5.5, 4.0)])
    labels = [heads.match([regions], [truth], stage.iou)[0].labels.tolist() for stage in heads.stages]
    assert labels == [[2, 2, 2, 0], [2, 2, 0, 0], [2, 0, 0, 0]]
    total = net(images(1), SIZES[:1], TARGETS[:1], KEYS[:1])["box_class"]
    parts = []
    for i in range(3):
        weights = [float(i == j) for j in range(3)]
        other = build("cascade_mask_rcnn", heads=replace(HEADS, cascade_weights=weights))
        parts.append(other(images(1), SIZES[:1], TARGETS[:1], KEYS[:1])["box_class"])
    torch.testing.assert_close(total, parts[0] + 0.5 * parts[1] + 0.25 * parts[2])
    assert all(part > 0 for part in parts)
    strict = build("cascade_mask_rcnn", heads=replace(HEADS, cascade_ious=(0.5, 0.6, 0.95), cascade_weights=(1, 1, 0)))
    last = build("cascade_mask_rcnn", heads=replace(HEADS, cascade_ious=(0.5, 0.6, 0.95), cascade_weights=(0, 0, 1)))
    losses = [other(images(1), SIZES[:1], TARGETS[:1], KEYS[:1])["box_class"] for other in (strict, last)]
    torch.testing.assert_close(losses[0], parts[0] + parts[1])
    assert not torch.allclose(losses[1], parts[2], rtol=1e-3), "the last stage has learned by its own overlap"


def test_masks_are_learned_from_the_share_of_positive_regions_that_a_draw_of_its_own_takes() -> None:
    heads = build("cascade_mask_rcnn").roi_heads  # 16 regions an image, a quarter of them positive
    maps = [torch.randn(2, 16, 64 // 2**i, 128 // 2**i, generator=torch.manual_seed(3)) for i in range(4)]
    target = TARGETS[0]
    truth = truth_of(target, True, maps[0])
    regions = [truth.boxes.repeat(4, 1) + torch.arange(16)[:, None] / 16, truth.boxes[:2]]
    labels = torch.tensor([0] + [1] * 15)
    matched = [Matched(labels, torch.arange(16) % 4), Matched(torch.ones(2, dtype=torch.int64), torch.arange(2))]
    taken: list[Tensor] = []
    heads.mask_pool.register_forward_pre_hook(lambda module, given: taken.extend(given[1]))
    losses = heads.mask_losses(maps, regions, [CANVAS] * 2, matched, [truth] * 2, KEYS[:2])
    order = hash_uint32(torch.arange(16) ^ hash_uint32(KEYS[0], (1 << 20) + 2), 0)
    first = sorted(range(1, 16), key=lambda i: int(order[i]))[:4]
    assert torch.equal(taken[0], regions[0][sorted(first)])
    assert torch.equal(taken[1], regions[1]), "fewer than the share are all taken"
    one = [
        heads.mask_losses(
            [m[:1] for m in maps],
            [regions[0][[i]]],
            [CANVAS],
            [Matched(labels[[i]], matched[0].objects[[i]])],
            [truth],
            KEYS[:1],
        )
        for i in first
    ]
    torch.testing.assert_close(losses[0], torch.cat(one).mean())


def test_boxes_are_passed_on_without_gradient() -> None:
    net = build("cascade_mask_rcnn")
    maps = net.pyramid(images(1))
    proposed = net.rpn(maps, [CANVAS])
    regions = [own[0] for _, own, *_ in net.roi_heads.passes(maps[:4], [proposed.boxes[0]], [CANVAS])]
    assert len(regions) == 3
    assert proposed.deltas.requires_grad
    assert not any(own.requires_grad for own in regions)


def test_anchors_keep_the_pyramids_strides_where_a_map_has_an_odd_side() -> None:
    generator = ProposalNetwork(16, RPN).anchor_generator
    sizes = [(40, 72), (20, 36), (10, 18), (5, 9), (3, 5)]  # of 160 x 288 pixels
    anchors = generator.of_maps(sizes, torch.float32, torch.device("cpu"))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert len(anchors) == 3 * sum(height * width for height, width in sizes)
    assert centres[-1].tolist() == [4 * 64, 2 * 64]
    assert centres[3 * 40 * 72 - 1].tolist() == [71 * 4, 39 * 4]


def test_of_equally_likely_anchors_the_first_ones_are_proposed() -> None:
    network = ProposalNetwork(16, RPN)
    logits = torch.zeros(2, 300)
    logits[1, 250:] = 1.0
    chosen = network._get_top_n_idx(logits, [200, 100])
    assert chosen[0].tolist() == [*range(60), *range(200, 260)]
    assert chosen[1].tolist() == [*range(60), *range(250, 300), *range(200, 210)]


def test_overlaps_in_pieces_are_those_of_all_anchors() -> None:
    boxes = 50 * torch.rand(70_000, 4)
    boxes[:, 2:] += boxes[:, :2]
    assert torch.equal(overlaps(boxes[:3], boxes), box_iou(boxes[:3], boxes))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_ratios_and_weights_that_are_no_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"^aspect_ratios: "):
        replace(RPN, aspect_ratios=(1.0, wrong))
    with pytest.raises(ValueError, match=r"^cascade_weights: "):
        replace(HEADS, cascade_weights=(1.0, wrong, 0.5))
