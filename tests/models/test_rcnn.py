"""R-CNN: against torchvision's own, as a pure function of each sample, and the masks' targets against RoIAlign."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import box_iou, roi_align

from data_pipeline.targets.instances import Instances
from dgt.models import ModelConfig
from dgt.models.mask_targets import mask_targets
from dgt.models.rcnn import RCNN, group_norm
from dgt.models.rcnn_config import HeadsConfig, RCNNConfig, RPNConfig
from dgt.models.region_sampling import KeyedSampler
from dgt.models.roi_align import RegionPool
from dgt.models.roi_heads import Truth
from dgt.models.rpn import ProposalNetwork, overlaps

CLASSES = 3
CANVAS = (64, 128)
DETECTORS = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")
RPN = RPNConfig(anchor_sizes=(8, 16, 32, 64, 128), pre_nms=60, post_nms=40, anchors_per_image=32)
HEADS = HeadsConfig(rois_per_image=16, hidden_features=24, mask_convs=1, mask_channels=8)


def build(detector: Any = "mask_rcnn", drop_path_rate: float = 0.0, **options: Any) -> RCNN:
    torch.manual_seed(0)
    config = RCNNConfig(**({"detector": detector, "fpn_channels": 16, "rpn": RPN, "heads": HEADS} | options))
    return RCNN(ModelConfig(name="dgt_nano", drop_path_rate=drop_path_rate), CLASSES, config)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, *CANVAS, generator=torch.Generator().manual_seed(1))


def instances(seed: int, count: int, size: tuple[int, int]) -> Instances:
    """Ellipses somewhere in the image, with boxes that are no whole numbers."""
    rng = np.random.default_rng(seed)
    height, width = size
    corners = rng.uniform(0, 0.6, (count, 2)) * (width, height)
    far = np.minimum(corners + rng.uniform(6, 40, (count, 2)), (width, height))
    boxes = np.concatenate([corners, far], axis=1).astype(np.float32)
    masks = []
    for left, top, right, bottom in boxes.tolist():
        y, x = np.mgrid[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] + 0.5
        along = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        masks.append((along[0] ** 2 + along[1] ** 2 < 1).astype(np.uint8))
    return Instances(boxes, rng.integers(0, CLASSES, count), tuple(masks))


def full_masks(target: Instances, size: tuple[int, int]) -> Tensor:
    """(k, H, W) uint8."""
    whole = torch.zeros(len(target), *size, dtype=torch.uint8)
    assert target.masks is not None
    for k, ((left, top, _, _), mask) in enumerate(zip(target.boxes.tolist(), target.masks, strict=True)):
        whole[k, int(top) : int(top) + mask.shape[0], int(left) : int(left) + mask.shape[1]] = torch.from_numpy(mask)
    return whole


SIZES = [(64, 128), (50, 128), (64, 90)]
TARGETS = [instances(0, 4, SIZES[0]), instances(1, 0, SIZES[1]), instances(2, 7, SIZES[2])]
KEYS = torch.tensor([11, 2**32 - 1, 987654321])


class TheirSampler:
    """Ours with torchvision's interface."""

    def __init__(self, sampler: KeyedSampler, keys: Tensor) -> None:
        self.sampler, self.keys = sampler, keys

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [torch.zeros_like(own, dtype=torch.bool) for own in labels]
        for own, at in zip(chosen, self.sampler(labels, self.keys), strict=True):
            own[at] = True
        positive = [own & (label >= 1) for own, label in zip(chosen, labels, strict=True)]
        return positive, [own & ~more for own, more in zip(chosen, positive, strict=True)]


def torchvisions(net: RCNN, keys: Tensor) -> tuple[RegionProposalNetwork, torchvision_heads.RoIHeads]:
    """torchvision's own network of proposals and its heads, with the weights, RoIAlign and draws of `net`."""
    options = net.options
    rpn = RegionProposalNetwork(
        AnchorGenerator(tuple((side,) for side in RPN.anchor_sizes), (RPN.aspect_ratios,) * 5), net.rpn.head,
        0.7, 0.3, options.rpn.anchors_per_image, 0.5, {"training": RPN.pre_nms, "testing": RPN.pre_nms // 2},
        {"training": RPN.post_nms, "testing": RPN.post_nms}, RPN.nms_threshold,
    )  # fmt: skip
    rpn.fg_bg_sampler = TheirSampler(net.rpn.fg_bg_sampler, keys)
    ours = net.roi_heads
    assert ours.mask_head is not None

    def pooled(pool: RegionPool) -> Any:
        return lambda maps, boxes, _: pool(list(maps.values())[:4], boxes)

    class WithBackground(nn.Module):
        """Masks of all classes behind one of the background."""

        def forward(self, masks: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1)

    heads = torchvision_heads.RoIHeads(
        pooled(ours.box_pool), ours.box_heads[0].head, ours.box_heads[0].predictor, 0.5, 0.5,
        options.heads.rois_per_image, options.heads.positive_share, None,
        options.score_threshold, options.nms_threshold, options.max_detections,
        pooled(ours.mask_pool), ours.mask_head, WithBackground(),
    )  # fmt: skip
    heads.fg_bg_sampler = TheirSampler(ours.sampler, keys)
    return rpn, heads


@pytest.mark.parametrize(("number", "draws"), [(0, 16), (2, 5000)], ids=["some drawn", "more drawn than there are"])
def test_an_images_losses_are_torchvisions_where_the_same_anchors_and_regions_are_drawn(
    number: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_heads, "roi_align", partial(roi_align, aligned=True))
    net = build(rpn=replace(RPN, anchors_per_image=draws), heads=replace(HEADS, rois_per_image=draws))
    size, target, keys = SIZES[number], TARGETS[number], KEYS[number : number + 1]
    image = images(1)
    image[..., size[0] :, :] = image[..., size[1] :] = 0
    ours = net(image, [size], [target], keys)
    rpn, heads = torchvisions(net, keys)
    maps = {str(i): level for i, level in enumerate(net.pyramid(image, keys))}
    truth = {
        "boxes": torch.from_numpy(target.boxes),
        "labels": torch.from_numpy(target.labels) + 1,
        "masks": full_masks(target, size),
    }
    proposals, theirs = rpn(ImageList(image, [size]), maps, [truth])
    _, more = heads(maps, proposals, [size], [truth])
    theirs |= more
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "box_class": "loss_classifier",
        "box": "loss_box_reg",
        "mask": "loss_mask",
    }
    assert ours.keys() == names.keys()
    for name, theirs_name in names.items():
        assert ours[name].shape == (1,)
        assert ours[name].dtype == torch.float32
        assert float(ours[name].detach()) > 0
        torch.testing.assert_close(ours[name][0], theirs[theirs_name], rtol=1e-5, atol=1e-6)


def test_detections_are_torchvisions() -> None:
    net = build(score_threshold=0.2, max_detections=30).eval()
    image, size = images(1), CANVAS
    with torch.no_grad():
        ours = net(image, [size])[0]
        rpn, heads = torchvisions(net, KEYS)
        rpn.eval()
        heads.eval()
        maps = {str(i): level for i, level in enumerate(net.pyramid(image))}
        proposals, _ = rpn(ImageList(image, [size]), maps)
        (theirs,), _ = heads(maps, proposals, [size])
    assert 5 < len(ours["boxes"]) <= 30
    torch.testing.assert_close(ours["boxes"], theirs["boxes"])
    torch.testing.assert_close(ours["scores"], theirs["scores"])
    torch.testing.assert_close(ours["masks"], theirs["masks"])
    assert torch.equal(ours["labels"] + 1, theirs["labels"])


def loss_and_gradient(net: RCNN, parts: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses (n,) and the gradient of their sum, of all images cut into `parts`."""
    net.zero_grad()
    found = []
    for part in parts:
        losses = net(images(3)[part].double(), [SIZES[i] for i in part], [TARGETS[i] for i in part], KEYS[part])
        torch.stack(list(losses.values())).sum().backward()
        found.append({name: loss.detach() for name, loss in losses.items()})
    whole = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return whole, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
def test_losses_and_gradients_do_not_depend_on_how_a_batch_is_cut(detector: str) -> None:
    net = build(detector, drop_path_rate=0.3, norm="group").double()
    whole, gradient = loss_and_gradient(net, [[0, 1, 2]])
    for parts in ([[0], [1], [2]], [[0, 1], [2]]):
        cut, summed = loss_and_gradient(net, parts)
        for name, losses in whole.items():
            torch.testing.assert_close(cut[name], losses)
        for name, own in gradient.items():
            torch.testing.assert_close(summed[name], own, rtol=1e-6, atol=1e-9, msg=name)


def test_draws_follow_from_the_samples_keys_and_not_from_torchs_generator() -> None:
    net = build()
    torch.manual_seed(1)
    first = net(images(3), SIZES, TARGETS, KEYS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = net(images(3), SIZES, TARGETS, KEYS)
    assert torch.equal(torch.get_rng_state(), state)
    others = net(images(3), SIZES, TARGETS, KEYS + torch.tensor([0, 0, 1]))
    for name, losses in first.items():
        assert torch.equal(again[name], losses)
        assert torch.equal(others[name][:2], losses[:2])
    assert not torch.equal(others["rpn_objectness"][2], first["rpn_objectness"][2])


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


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_parameter_gets_a_gradient_from_images_without_objects(detector: str) -> None:
    net = build(detector, norm="group")
    nothing = [instances(0, 0, size) for size in SIZES[:2]]
    losses = net(images(2), SIZES[:2], nothing, KEYS[:2])
    torch.stack(list(losses.values())).sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == set()
    assert (losses["rpn_box"] == 0).all()
    assert (losses["box"] == 0).all()
    assert (losses["box_class"] > 0).all()
    assert "mask" not in losses or (losses["mask"] == 0).all()
    assert "mask" in losses or detector == "faster_rcnn"


@pytest.mark.parametrize("threshold", [0.05, 0.999])
@pytest.mark.parametrize("detector", DETECTORS)
def test_each_head_is_called_once_per_pass_whatever_is_found(detector: str, threshold: float) -> None:
    net = build(detector, score_threshold=threshold)
    calls: list[int] = []
    for number, head in enumerate(net.heads()):
        head.register_forward_hook(partial(lambda i, *_: calls.append(i), number))
    net(images(2), SIZES[:2], TARGETS[:2], KEYS[:2])
    assert sorted(calls) == list(range(len(net.heads())))
    calls.clear()
    with torch.no_grad():
        found = net.eval()(images(1), SIZES[:1])
    assert sorted(calls) == list(range(len(net.heads())))
    assert (len(found[0]["boxes"]) == 0) == (threshold > 0.9)


def test_what_lies_beyond_an_images_size_is_not_looked_at() -> None:
    net = build()
    noisy = images(3)
    changed = noisy.clone()
    changed[1, :, 50:] = 7.0
    changed[2, :, :, 90:] = -7.0
    for name, losses in net(changed, SIZES, TARGETS, KEYS).items():
        assert torch.equal(losses, net(noisy, SIZES, TARGETS, KEYS)[name])
    with torch.no_grad():
        for found, (height, width) in zip(net.eval()(noisy, SIZES), SIZES, strict=True):
            limits = torch.tensor([width, height, width, height])
            assert ((found["boxes"] >= 0) & (found["boxes"] <= limits)).all()


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


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_network_that_has_diverged_has_a_loss_that_says_so_and_finds_nothing(detector: str) -> None:
    net = build(detector)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(torch.nan)
    targets = [TARGETS[0], instances(0, 0, SIZES[0])]
    losses = net(images(2), SIZES[:1] * 2, targets, KEYS[:2])
    assert losses["rpn_objectness"].isnan().all()
    torch.stack(list(losses.values())).sum().backward()
    with torch.no_grad():
        assert len(net.eval()(images(1), SIZES[:1])[0]["boxes"]) == 0


def test_boxes_are_passed_on_without_gradient() -> None:
    net = build("cascade_mask_rcnn")
    maps = net.pyramid(images(1))
    proposed = net.rpn(maps, [CANVAS])
    regions = [own[0] for _, own, *_ in net.roi_heads.passes(maps[:4], [proposed.boxes[0]], [CANVAS])]
    assert len(regions) == 3
    assert proposed.deltas.requires_grad
    assert not any(own.requires_grad for own in regions)


def test_under_autocast_boxes_and_losses_stay_float32() -> None:
    net = build()
    with torch.autocast("cpu", torch.bfloat16):
        maps = net.pyramid(images(1))
        proposed = net.rpn(maps, [CANVAS])
        losses = net(images(3), SIZES, TARGETS, KEYS)
    assert maps[0].dtype == torch.bfloat16
    anchors = ProposalNetwork(16, RPN).anchor_generator.of_maps([m.shape[-2:] for m in maps], torch.float32, "cpu")
    assert torch.equal(proposed.anchors, anchors)
    assert proposed.deltas.dtype == proposed.boxes[0].dtype == torch.float32
    expected = net(images(3), SIZES, TARGETS, KEYS)
    for name, own in losses.items():
        assert own.dtype == torch.float32
        assert torch.isfinite(own).all()
        if name.startswith("rpn"):  # which asks the same anchors, whatever was proposed
            torch.testing.assert_close(own, expected[name], rtol=0.05, atol=0.02)


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


def test_masks_that_do_not_fit_their_boxes_and_sets_without_masks_are_refused() -> None:
    net, target = build(), TARGETS[0]
    assert target.masks is not None
    wrong = Instances(target.boxes, target.labels, (target.masks[0][:-1], *target.masks[1:]))
    with pytest.raises(ValueError, match="does not fit its box"):
        net(images(1), SIZES[:1], [wrong], KEYS[:1])
    boxes_only = Instances(target.boxes, target.labels, None)
    with pytest.raises(ValueError, match="faster_rcnn"):
        net(images(1), SIZES[:1], [boxes_only], KEYS[:1])
    build("faster_rcnn")(images(1), SIZES[:1], [boxes_only], KEYS[:1])


def test_norms_are_those_configured_and_group_norm_takes_the_largest_divisor() -> None:
    assert [group_norm(channels).num_groups for channels in (256, 64, 48, 10, 7)] == [32, 32, 24, 10, 7]
    kinds = {"none": nn.Identity, "group": nn.GroupNorm, "sync_batch": nn.SyncBatchNorm}
    for name, kind in kinds.items():
        net = build(norm=name)
        parts = [net.fpn, *net.roi_heads.mask_head]
        assert sum(isinstance(module, kind) for part in parts for module in part.modules()) == 9 * (name != "none")
    with pytest.raises(ValueError, match="sync_batch is for CUDA GPUs"):
        net(images(1), SIZES[:1], TARGETS[:1], KEYS[:1])
    buffers = dict(build(norm="frozen_batch").named_buffers())
    assert len([name for name in buffers if name.endswith("running_var")]) == 9


@pytest.mark.parametrize(
    ("variant", "detector", "parameters", "gmacs"),
    [
        ("tiny", "faster_rcnn", 40_348_836, 206.4),
        ("tiny", "mask_rcnn", 42_992_116, 259.4),
        ("small", "mask_rcnn", 71_375_732, 362.8),
        ("base", "mask_rcnn", 110_987_508, 504.8),
        ("tiny", "cascade_mask_rcnn", 70_629_726, 287.0),
        ("small", "cascade_mask_rcnn", 99_013_342, 390.4),
        ("base", "cascade_mask_rcnn", 138_625_118, 532.4),
    ],
)
def test_parameters_and_gmacs_at_800_x_1280(variant: str, detector: Any, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        net = RCNN(ModelConfig(name=f"dgt_{variant}"), 80, RCNNConfig(detector=detector))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.macs(800, 1280) / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.parametrize("detector", DETECTORS)
def test_macs_of_the_heads_are_those_that_torch_counts(detector: str) -> None:
    with torch.device("meta"):
        net = build(detector)
        strides = (4, 8, 16, 32)
        dims = net.backbone.arch.embed_dims
        features = {
            str(i): torch.empty(1, dim, 96 // stride, 160 // stride)
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        }
        with FlopCounterMode(display=False) as counter:
            net.rpn.head(list(net.fpn(features).values()))
            for head in net.roi_heads.box_heads:
                head(torch.empty(1000, 16, 7, 7))
            if net.roi_heads.mask_head is not None:
                net.roi_heads.mask_head(torch.empty(100, 16, 14, 14))
    assert 2 * (net.macs(96, 160) - net.backbone.macs(96, 160)) == counter.get_total_flops()
