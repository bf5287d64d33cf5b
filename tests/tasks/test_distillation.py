from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import dgt.models  # noqa: F401  (registers the networks with timm)
from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks import Classification, ClassificationConfig, Inputs
from dgt.tasks.distillation import DistillationConfig, Teacher

DATA = DataConfig(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    """A small network that wants another normalisation than the data's, with weights in a file."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=5)
    nn.init.normal_(network.fc.weight)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, path)
    return network.eval(), str(path)


def student(path: str, loss: Any = None, **options: Any) -> Classification:
    distillation = DistillationConfig(teacher="resnet10t", checkpoint_path=path, precision="fp32", **options)
    config = ClassificationConfig(distillation=distillation, **(loss or {}))
    task = Classification(config, ModelConfig(name="dgt_nano"), DATA)
    task.build_model()
    return task


class Fixed(nn.Module):
    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        return self.logits


def answers(network: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))  # type: ignore[index]
    with torch.no_grad():
        return network((pixels - mean) / std)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_the_weighted_sum_of_labels_and_teacher(teacher: tuple[nn.Module, str], kind: Any) -> None:
    network, path = teacher
    torch.manual_seed(1)
    pixels, logits, labels = torch.rand(4, 3, 64, 64), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    images = (pixels - torch.tensor(DATA.mean).view(1, 3, 1, 1)) / torch.tensor(DATA.std).view(1, 3, 1, 1)
    model = Fixed(logits)
    loss = student(path, kind=kind, weight=0.3, temperature=2.0).loss(
        model, Inputs(images, labels, torch.zeros(4, dtype=torch.int64))
    )
    by_label = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    expected = answers(network, pixels)
    if kind == "hard":
        by_teacher = F.cross_entropy(logits, expected.argmax(1), reduction="sum")
    else:
        p, q = (expected / 2).softmax(1), (logits / 2).softmax(1)
        by_teacher = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(loss, 0.7 * by_label + 0.3 * by_teacher, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert model.logits.grad is not None


@pytest.mark.parametrize("summed", [False, True])
def test_a_hard_teacher_is_learned_with_the_binary_loss_that_labels_are(
    teacher: tuple[nn.Module, str], summed: bool
) -> None:
    task = student(teacher[1], {"loss": "bce", "bce_sum": summed, "label_smoothing": 0.0}, weight=0.3)
    assert task.teacher
    logits, images, keys = torch.randn(4, 5), torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64)
    guess, labels = task.teacher.logits(images).argmax(1), torch.tensor([0, 1, 2, 3])
    own, taught = (
        F.binary_cross_entropy_with_logits(logits, F.one_hot(x, 5).float(), reduction="sum") / (1 if summed else 5)
        for x in (labels, guess)
    )
    loss = task.loss(Fixed(logits), Inputs(images, labels, keys))
    torch.testing.assert_close(loss, 0.7 * own + 0.3 * taught)


def test_a_soft_teacher_is_refused_beside_the_binary_loss() -> None:
    soft = DistillationConfig(teacher="resnet10t", checkpoint_path="x.pth", kind="soft")
    with pytest.raises(ValueError, match=r"distillation\.kind: a soft teacher"):
        ClassificationConfig(loss="bce", distillation=soft)


def test_the_teacher_stays_outside_of_the_network_and_learns_nothing(teacher: tuple[nn.Module, str]) -> None:
    task = student(teacher[1])
    network = task.build_model()
    inputs = Inputs(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    task.loss(network, inputs).backward()
    assert task.teacher
    loaded = task.teacher.on(torch.device("cpu"))
    assert not loaded.training
    assert all(p.grad is None and not p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(t, teacher[0].state_dict()[name]) for name, t in loaded.state_dict().items())
    assert all(p.grad is not None for p in network.parameters())
    assert not {id(p) for p in loaded.parameters()} & {id(p) for p in network.parameters()}


def test_mistakes_are_named(teacher: tuple[nn.Module, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_path: must name the teacher's weights"):
        DistillationConfig(teacher="resnet10t")
    none = DistillationConfig(teacher="resnet10t", checkpoint_path=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"task.distillation.checkpoint_path: there is no file .*none.safetensors"):
        Teacher(none, DATA).logits(torch.zeros(1, 3, 32, 32))
    unknown = DistillationConfig(teacher="resnet1", checkpoint_path=teacher[1])
    with pytest.raises(ValueError, match=r"task\.distillation\.teacher: timm knows no model 'resnet1'"):
        Teacher(unknown, DATA).logits(torch.zeros(1, 3, 32, 32))
    known = DistillationConfig(teacher="resnet10t", checkpoint_path=teacher[1])
    with pytest.raises(
        ValueError, match=r"does not fit resnet10t with 6 classes: .* size mismatch for fc\.weight"
    ) as e:
        Teacher(known, replace(DATA, num_classes=6)).logits(torch.zeros(1, 3, 32, 32))
    assert "\n" not in str(e.value)
