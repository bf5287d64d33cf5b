"""R-CNN as a whole: against torchvision's own, and as a pure function of each sample."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from rcnn_small import CANVAS, DETECTORS, HEADS, KEYS, RPN, SIZES, TARGETS, build, full_masks, images, instances
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import roi_align

from data_pipeline.targets.instances import Instances
from dgt.models import ModelConfig
from dgt.models.rcnn import PADDING, RCNN, group_norm
from dgt.models.rcnn_config import RCNNConfig
from dgt.models.region_sampling import KeyedSampler
from dgt.models.roi_align import RegionPool
from dgt.models.rpn import ProposalNetwork


class TheirSampler:
    """Ours with torchvision's interface, on candidates that are all `allowed`, or a mask of those that are."""

    def __init__(self, sampler: KeyedSampler, keys: Tensor, allowed: Tensor | None = None) -> None:
        self.sampler, self.keys, self.allowed = sampler, keys, allowed

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.allowed is not None:
            labels = [own.where(self.allowed | (own > 0), -1) for own in labels]
        chosen = [torch.zeros_like(own, dtype=torch.bool) for own in labels]
        for own, at in zip(chosen, self.sampler(labels, self.keys), strict=True):
            own[at] = True
        positive = [own & (label >= 1) for own, label in zip(chosen, labels, strict=True)]
        return positive, [own & ~more for own, more in zip(chosen, positive, strict=True)]


def torchvisions(
    net: RCNN, keys: Tensor, size: tuple[int, int] = CANVAS
) -> tuple[RegionProposalNetwork, torchvision_heads.RoIHeads]:
    """torchvision's own network of proposals and its heads, with the weights, RoIAlign and draws of `net`."""
    options = net.options
    rpn = RegionProposalNetwork(
        AnchorGenerator(tuple((side,) for side in RPN.anchor_sizes), (RPN.aspect_ratios,) * 5), net.rpn.head,
        0.7, 0.3, options.rpn.anchors_per_image, 0.5, {"training": RPN.pre_nms, "testing": RPN.pre_nms // 2},
        {"training": RPN.post_nms, "testing": RPN.post_nms}, RPN.nms_threshold,
    )  # fmt: skip
    at = [(x * stride, y * stride) for stride in (4, 8, 16, 32, 64)
          for y in range(64 // stride) for x in range(128 // stride) for _ in RPN.aspect_ratios]  # fmt: skip
    centres = torch.tensor(at)
    within = (centres[:, 0] < size[1]) & (centres[:, 1] < size[0])
    rpn.fg_bg_sampler = TheirSampler(net.rpn.fg_bg_sampler, keys, within)
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
    image[..., size[0] :, :] = image[..., size[1] :] = PADDING
    ours = net(image, [size], [target], keys)
    rpn, heads = torchvisions(net, keys, size)
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
