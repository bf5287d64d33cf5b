"""A teacher: a trained network whose answers to the same images are learned beside the labels."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.config import DataConfig


@dataclass(frozen=True)
class DistillationConfig:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531; hard: DeiT, 2012.12877, with one head for both)."""

    teacher: str = ""
    """A model name known to timm, with the same classes in the same order; empty = no teacher."""
    checkpoint_path: str = ""
    """The teacher's weights (.safetensors or .pth), such as `launch/export.py` or timm write them."""
    kind: Literal["hard", "soft"] = "hard"
    """"hard": the teacher's first guess is a label, learned with `task.loss` unsmoothed; "soft": its probabilities at
    `temperature` are the target, by their divergence, beside "cross_entropy" only."""
    weight: float = 0.5
    """Share of the loss that is against the teacher; the rest is against the labels."""
    temperature: float = 3.0
    """Divides the logits of both networks under "soft"; the loss is multiplied by its square."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """In which the teacher computes (autocast), whatever the engine's is."""

    def __post_init__(self) -> None:
        if self.teacher and not self.checkpoint_path:
            raise ValueError("checkpoint_path: must name the teacher's weights")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight: must lie in [0, 1], got {self.weight}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {self.temperature}")


class Teacher:
    """Frozen, in evaluation mode, outside of the engine and of the checkpoints; loaded when first asked."""

    def __init__(self, config: DistillationConfig, data: DataConfig):
        self.config = config
        self.data = data
        self.on = lru_cache(maxsize=1)(self.load)

    def load(self, device: torch.device) -> nn.Module:
        """The network on a device.

        Raises ValueError where timm does not know it, and where its weights are missing or do not fit.
        """
        config = self.config
        if not timm.is_model(config.teacher):
            raise ValueError(f"task.distillation.teacher: timm knows no model {config.teacher!r}")
        if not Path(config.checkpoint_path).is_file():
            raise ValueError(f"task.distillation.checkpoint_path: there is no file {config.checkpoint_path}")
        try:
            network = timm.create_model(
                config.teacher, num_classes=self.data.num_classes, checkpoint_path=config.checkpoint_path
            )
        except Exception as error:  # whatever a file of an unknown origin does to its reader
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise ValueError(
                f"task.distillation: {config.checkpoint_path} does not fit {config.teacher} with "
                f"{self.data.num_classes} classes: {reason}"
            ) from None
        return network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(n, classes) float32 for `images` (n, 3, H, W) that are normalised for the student."""
        network = self.on(images.device)
        facts: Any = network.pretrained_cfg
        # What mixing and erasing have done stays as it is: normalisation is affine in each channel.
        old_mean, old_std, mean, std = (
            torch.tensor(values, device=images.device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (self.data.mean, self.data.std, facts["mean"], facts["std"])
        )
        images = (images.float() * old_std + (old_mean - mean)) / std
        if facts.get("fixed_input_size") and images.shape[-2:] != tuple(facts["input_size"][1:]):
            images = F.interpolate(images, facts["input_size"][1:], mode="bicubic", antialias=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return network(images).float()

    def divergences(self, student: Tensor, answers: Tensor) -> Tensor:
        """(n,): of the student's logits (n, classes), float32, from the teacher's `answers`, at the temperature."""
        temperature = self.config.temperature
        expected, given = ((x / temperature).log_softmax(dim=1) for x in (answers, student))
        return F.kl_div(given, expected, reduction="none", log_target=True).sum(dim=1) * temperature**2
