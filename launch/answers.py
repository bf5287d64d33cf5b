"""What a network says of one image, in the three forms of launch/predict.py: a picture, JSON, and lines of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from dgt.config import Config
    from dgt.tasks.detections import Detected
    from dgt.training.evaluate import Inference

LONGEST = 1600
"""Pixels of the longest side of an image in a picture; class maps and JSON are for the image as it is."""
SHOWN = 10
"""Most objects, and classes of a map, that are printed for an image."""


@dataclass(frozen=True)
class Labels:
    """What classes are called."""

    names: tuple[str, ...]
    """() where that is not known."""
    category_ids: tuple[int, ...]
    """Of detection: the id of each class in the data set."""

    def name(self, label: int) -> str:
        """Of a class; its number where it has none."""
        return self.names[label] if label < len(self.names) else str(label)


class Answer(Protocol):
    """What was said of one image."""

    @property
    def image(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        ...

    def picture(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        ...

    def content(self) -> dict[str, Any]:
        """For JSON."""
        ...

    def lines(self) -> list[str]:
        """For the screen."""
        ...


@dataclass(frozen=True)
class Classified:
    """The most likely classes of an image."""

    image: np.ndarray
    scores: tuple[tuple[int, str, float], ...]
    """(class, name, probability), the most likely first."""

    def picture(self) -> np.ndarray:
        """The image above its classes."""
        from dgt.tasks import drawing

        return drawing.guesses(self.image, [(name, score) for _, name, score in self.scores], LONGEST)

    def content(self) -> dict[str, Any]:
        """The classes with their probabilities."""
        return {"labels": [{"class": label, "name": name, "score": score} for label, name, score in self.scores]}

    def lines(self) -> list[str]:
        """One for each class."""
        return [f"{100 * score:6.2f} %  {name}" for _, name, score in self.scores]


@dataclass(frozen=True)
class Segmented:
    """A class for each pixel."""

    image: np.ndarray
    classes: np.ndarray
    """uint8 (H, W)."""
    labels: Labels

    def picture(self) -> np.ndarray:
        """The classes over the image, above a legend."""
        from dgt.tasks import drawing

        return drawing.class_map(self.image, self.classes, self.labels.names, LONGEST)

    def present(self) -> list[dict[str, Any]]:
        """The classes of the map, the most frequent first."""
        counts = np.bincount(self.classes.ravel())
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-counts[c], c))
        return [
            {
                "class": c,
                "name": self.labels.name(c),
                "pixels": int(counts[c]),
                "share": float(counts[c] / self.classes.size),
            }
            for c in order
        ]

    def content(self) -> dict[str, Any]:
        """The classes with their pixels."""
        return {"classes": self.present()}

    def lines(self) -> list[str]:
        """One for each of the most frequent classes."""
        present = self.present()
        lines = [f"{100 * row['share']:6.2f} %  {row['name']}" for row in present[:SHOWN]]
        return lines + ([f"and {len(present) - SHOWN} classes more"] if len(present) > SHOWN else [])


@dataclass(frozen=True)
class Found:
    """The objects of an image."""

    image: np.ndarray
    detected: Detected
    labels: Labels

    def picture(self) -> np.ndarray:
        """The objects over the image, above a legend."""
        from dgt.tasks import drawing

        return drawing.detections(self.image, self.detected, self.labels.names, 0.0, LONGEST)

    def content(self) -> dict[str, Any]:
        """The objects as in COCO's results, without the image's id."""
        boxes = self.detected.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        masks = self.detected.masks
        return {
            "objects": [
                {
                    "category_id": self.labels.category_ids[label],
                    "name": self.labels.name(label),
                    "bbox": box,
                    "score": score,
                    **({} if masks is None else {"segmentation": masks[i]}),
                }
                for i, (label, box, score) in enumerate(
                    zip(self.detected.labels.tolist(), boxes.tolist(), self.detected.scores.tolist(), strict=True)
                )
            ]
        }

    def lines(self) -> list[str]:
        """One for each of the most likely objects."""
        objects = self.content()["objects"]
        lines = []
        for one in objects[:SHOWN]:
            left, top, width, height = one["bbox"]
            lines.append(
                f"{100 * one['score']:6.2f} %  {one['name']}  {width:.0f} x {height:.0f} at {left:.0f}, {top:.0f}"
            )
        return lines + ([f"and {len(objects) - SHOWN} more"] if len(objects) > SHOWN else []) or ["nothing found"]


def answering(
    config: Config, task: Any, inference: Inference, labels: Labels, *, top: int, threshold: float
) -> Callable[[bytes], Answer]:
    """What makes an answer of an image file's bytes, the way in which the task evaluates.

    Args:
        config: the configuration.
        task: that which `build_task` makes of it.
        inference: its network on its device.
        labels: of the classes.
        top: classes that classification names.
        threshold: least score of an object.

    The function raises data_pipeline.decode.DecodeError for a file that is damaged or no image.
    """
    import torch

    from data_pipeline.decode import decode_image
    from dgt.tasks.detections import Detected

    inference.network.eval()

    @torch.no_grad()
    def classification(data: bytes) -> Answer:
        probabilities = class_probabilities(config, inference, data)
        order = np.argsort(-probabilities, kind="stable")[:top].tolist()
        scores = tuple((c, labels.name(c), float(probabilities[c])) for c in order)
        return Classified(decode_image(data), scores)

    @torch.no_grad()
    def dense(data: bytes) -> Answer:
        image = decode_image(data, config.data.decoding)
        with inference.arithmetic():
            answer = task.answer(inference.network, torch.from_numpy(image).to(inference.world.device))
        if not isinstance(answer, Detected):
            return Segmented(image, answer.cpu().numpy(), labels)
        likely = np.flatnonzero(answer.scores >= threshold)
        masks = None if answer.masks is None else tuple(answer.masks[i] for i in likely)
        return Found(image, Detected(answer.boxes[likely], answer.scores[likely], answer.labels[likely], masks), labels)

    return classification if task.kind == "classification" else dense


def class_probabilities(config: Config, inference: Inference, data: bytes) -> np.ndarray:
    """(classes,) float32: the softmax of what the network says of an image file, resized and cut as in evaluation."""
    import torch

    from data_pipeline.decode import open_image
    from data_pipeline.transforms import eval_transform, normalize

    side = config.data.image_size
    pixels = np.empty((side, side, 3), np.uint8)
    eval_transform(config.data)(open_image(data, config.data.decoding), np.random.default_rng(0), pixels)
    batch = normalize(torch.from_numpy(pixels)[None].to(inference.world.device), config.data.mean, config.data.std)
    with inference.arithmetic():
        logits = inference.network(batch).float()
    return logits.softmax(dim=1)[0].cpu().numpy()
