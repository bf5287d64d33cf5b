"""Detection as a task: answers in pixels of the stored image, and what an evaluation makes of them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, DetectionDataConfig
from data_pipeline.shards.source import DataError
from data_pipeline.targets import rle
from data_pipeline.targets.objects import ImageObject, ImageObjects
from dgt.models import ModelConfig
from dgt.models.rcnn_config import HeadsConfig
from dgt.tasks import DetectionConfig, Inputs, build_task
from dgt.tasks.detection import Detection
from dgt.tasks.detections import Detected
from dgt.tasks.mask_pasting import encoded, pasted

BOXES = torch.tensor([[4.0, 2.0, 24.0, 32.0], [30.0, 10.0, 50.0, 20.0]])
"""In pixels of what the network sees."""


class Stub(nn.Module):
    """A network that notes what it sees, and always finds two full boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Any]] = []

    def forward(self, images: Tensor, sizes: Any) -> list[dict[str, Tensor]]:
        self.seen.append((images, sizes))
        masks = torch.ones(2, 1, 28, 28)
        masks[1, :, :, 14:] = 0  # the left half of the second box
        scores = torch.tensor([0.9, 0.6])
        return [{"boxes": BOXES, "scores": scores, "labels": torch.tensor([2, 0]), "masks": masks}]


def task_of(**options: Any) -> Detection:
    data = DetectionDataConfig(short_sides=(40, 48), long_side=70, eval_short_side=48)
    task = build_task(DetectionConfig(**options), ModelConfig("dgt_nano"), DataConfig(num_classes=3, detection=data))
    assert isinstance(task, Detection)
    return task


def image_of(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_an_image_is_resized_normalised_and_padded_and_its_answer_is_in_its_own_pixels() -> None:
    task, network, image = task_of(), Stub(), image_of(96, 120)
    found = task.answer(network, image)
    ((pixels, sizes),) = network.seen
    assert sizes == [(48, 60)]
    assert pixels.shape == (1, 3, 64, 64)
    resized = functional.resize(image.permute(2, 0, 1), [48, 60], antialias=True)
    expected = functional.normalize(resized.float() / 255, list(task.data.mean), list(task.data.std))
    torch.testing.assert_close(pixels[0, :, :48, :60], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.boxes, [[8, 4, 48, 64], [60, 20, 100, 40]], rtol=1e-6)
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert found.labels.tolist() == [2, 0]
    whole = np.zeros((2, 96, 120), bool)
    whole[0, 4:64, 8:48] = whole[1, 20:40, 60:80] = True
    assert found.masks is not None
    assert np.array_equal(np.stack([rle.decode(mask) for mask in found.masks]), whole)


def test_a_long_image_is_shrunk_until_its_long_side_fits() -> None:
    task, network = task_of(), Stub()
    found = task.answer(network, image_of(31, 140))
    assert network.seen[0][1] == [(16, 70)]
    assert network.seen[0][0].shape == (1, 3, 32, 96)
    np.testing.assert_allclose(found.boxes, BOXES * torch.tensor([140 / 70, 31 / 16, 140 / 70, 31 / 16]), rtol=1e-6)


def test_a_mask_is_looked_up_as_grid_sample_does_it_over_the_whole_image() -> None:
    rng = torch.Generator().manual_seed(0)
    size = (50, 70)
    boxes = [(-3.0, 5.2, 20.7, 61.0), (10.25, 3.5, 13.0, 40.0), (0.0, 0.0, 70.0, 50.0), (66.1, 47.3, 69.9, 49.9)]
    for box in boxes:
        mask = torch.rand(28, 28, generator=rng)
        left, top, right, bottom = box
        x = 2 * (torch.arange(size[1]) + 0.5 - left) / (right - left) - 1
        y = 2 * (torch.arange(size[0]) + 0.5 - top) / (bottom - top) - 1
        grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)[None]
        values = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        found = pasted(mask.numpy(), np.array(box, np.float32), size)
        clear = (values - 0.5).abs() > 1e-5
        assert torch.equal(torch.from_numpy(found).bool()[clear], (values >= 0.5)[clear])
        assert clear.float().mean() > 0.99


def test_a_perfect_mask_of_a_small_object_comes_back_whole() -> None:
    from dgt.models.mask_targets import mask_targets

    y, x = np.mgrid[:14, :11] + 0.5
    ellipse = ((x / 5.5 - 1) ** 2 + (y / 7 - 1) ** 2 < 1).astype(np.uint8)
    box = torch.tensor([[20.0, 8.0, 31.0, 22.0]])
    answer = mask_targets([ellipse], [(8, 20)], (40, 60), box, torch.tensor([0]), 28)[0]
    whole = pasted((answer >= 0.5).float().numpy(), box[0].numpy(), (40, 60))
    assert np.array_equal(whole[8:22, 20:31], ellipse)
    assert whole.sum() == ellipse.sum()


def test_masks_are_encoded_as_pycocotools_does_it() -> None:
    masks = np.random.default_rng(0).random((3, 28, 28)).astype(np.float32)
    boxes = np.array([[1.5, 2, 30, 40.5], [0, 0, 9, 9], [20, 20, 20.4, 39]], np.float32)
    for found, mask, box in zip(encoded(masks, boxes, (41, 33)), masks, boxes, strict=True):
        assert found["size"] == [41, 33]
        assert isinstance(found["counts"], str)
        assert np.array_equal(rle.decode(found), pasted(mask, box, (41, 33)))
        assert found["counts"] == coco.encode(pasted(mask, box, (41, 33)))["counts"].decode()
    assert encoded(masks[:0], boxes[:0], (41, 33)) == ()


def test_without_pycocotools_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r"dgt\[dense\]"):
        task_of().answer(Stub(), image_of(48, 48))


def truth_of(image_id: int, height: int, width: int) -> ImageObjects:
    segmentation = [[8.0, 4.0, 48.0, 4.0, 48.0, 64.0, 8.0, 64.0]]
    thing = ImageObject(1, 2, (8.0, 4.0, 40.0, 60.0), 2400.0, False, segmentation)
    return ImageObjects(image_id, f"{image_id}.jpg", (height, width), (thing,))


def batch_of(images: list[Tensor], ids: list[int], targets: list[Any]) -> Batch:
    n = len(images)
    return Batch(
        images=images, labels=torch.zeros(n, dtype=torch.int64), ids=torch.tensor(ids),
        copies=torch.zeros(n, dtype=torch.int64), positions=torch.arange(n), valid=torch.tensor(ids) >= 0, changes=[],
        sizes=[(i.shape[0], i.shape[1]) for i in images], targets=targets,
    )  # fmt: skip


def test_an_evaluation_keeps_what_was_found_beside_the_truth_and_computes_in_every_place() -> None:
    task, network = task_of(), Stub()
    images = [image_of(96, 120), image_of(96, 120, seed=1), image_of(20, 20)]
    batch = batch_of(images, [3, 9, -1], [truth_of(30, 96, 120), truth_of(90, 96, 120), None])
    findings = task.found(network, batch, torch.device("cpu"))
    assert len(network.seen) == 3
    assert findings.totals.tolist() == [2.0]
    assert {sample: record.truth.image_id for sample, record in findings.records.items()} == {3: 30, 9: 90}
    assert list(findings.pictures) == [3]
    assert findings.pictures[3].dtype == np.uint8
    metrics = task.metrics(findings.totals, findings.records)
    # the one object is found exactly, and first; the other box is of a class without objects
    assert (metrics["box_ap"], metrics["mask_ap"], metrics["samples"]) == (100.0, 100.0, 2.0)
    assert task.best_metric in metrics
    assert task.confusion(findings.totals) is None


def test_a_detector_without_masks_gives_and_judges_boxes_only() -> None:
    task = task_of(detector="faster_rcnn", fpn_channels=8, heads=HeadsConfig(hidden_features=8))
    network = task.build_model().eval()
    with torch.no_grad():
        found = task.answer(network, image_of(48, 48))
    assert isinstance(found, Detected)
    assert found.masks is None
    assert task.best_metric == "box_ap"
    batch = batch_of([image_of(96, 120)], [0], [truth_of(30, 96, 120)])
    with torch.no_grad():
        findings = task.found(network, batch, torch.device("cpu"))
    assert not any(name.startswith("mask") for name in task.metrics(findings.totals, findings.records))


def test_the_loss_is_the_sum_over_images_and_parts() -> None:
    class Losses(nn.Module):
        def forward(self, images: Tensor, sizes: Any, targets: Any, keys: Tensor) -> dict[str, Tensor]:
            assert (sizes, targets, keys.tolist()) == ([(4, 5)], ["objects"], [7])
            return {"box": torch.tensor([1.0, 2.0]), "mask": torch.tensor([0.25, 0.5])}

    inputs = Inputs(torch.zeros(1), torch.zeros(1), torch.tensor([7]), sizes=[(4, 5)], targets=["objects"])
    assert task_of().loss(Losses(), inputs) == 3.75


def test_the_size_of_training_is_the_largest_that_occurs() -> None:
    assert task_of().train_size(0) == (64, 96)


def test_frozen_parts_and_macs_are_those_of_the_network() -> None:
    data = DataConfig(num_classes=3)
    task = build_task(DetectionConfig(), ModelConfig("dgt_nano", freeze=("backbone",)), data)
    with torch.device("meta"):
        network = task.build_model()
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for head in network.heads() for p in head.parameters())
    assert task.macs(network, 64, 96) == network.macs(64, 96)
    assert task.macs(nn.Linear(1, 1), 64, 96) is None
