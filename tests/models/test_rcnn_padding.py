"""R-CNN: what lies beside an image on its canvas."""

import torch
from torch import nn

from data_pipeline.targets.instances import Instances
from dgt.models import ModelConfig
from dgt.models.rcnn import RCNN
from dgt.models.rcnn_config import HeadsConfig, RCNNConfig, RPNConfig


def first_gradient_norm(canvas: tuple[int, int]) -> float:
    """Of a network as it begins, for one image of 67 x 64 pixels."""
    torch.manual_seed(0)
    rpn = RPNConfig(anchor_sizes=(8, 16, 32, 64, 128), pre_nms=60, post_nms=40, anchors_per_image=32)
    heads = HeadsConfig(rois_per_image=16, hidden_features=24, mask_convs=1, mask_channels=8)
    options = RCNNConfig(detector="faster_rcnn", fpn_channels=16, rpn=rpn, heads=heads, norm="group")
    net = RCNN(ModelConfig(name="dgt_nano"), 3, options)
    images = torch.randn(1, 3, *canvas, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0]]).numpy()
    target = Instances(boxes, torch.tensor([1]).numpy(), None)
    losses = net(images, [(67, 64)], [target], torch.tensor([7]))
    sum(loss.sum() for loss in losses.values()).backward()
    return float(nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))


def test_padding_does_not_blow_up_the_first_gradient() -> None:
    assert first_gradient_norm((96, 64)) < 3 * first_gradient_norm((67, 64))
