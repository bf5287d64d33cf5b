"""Decode, random crop, flip for the contestants that leave this work to the user."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch

from benchmarks.data.contestants import SIZE

SCALE, RATIO = [0.08, 1.0], [3 / 4, 4 / 3]


def with_pil(data: bytes) -> Any:
    """PIL throughout, as torchvision's RandomResizedCrop does it (antialiased); uint8 (224, 224, 3)."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        picture = file.convert("RGB")
    top, left, height, width = crop_box(picture.height, picture.width)
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def with_simplejpeg(data: bytes) -> Any:
    """libjpeg-turbo's fast settings, the crop as a view, OpenCV's bilinear filter; uint8 (224, 224, 3)."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)
    pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)
    top, left, height, width = crop_box(*pixels.shape[:2])
    image = cv2.resize(pixels[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(image, 1) if random.random() < 0.5 else image


def crop_box(height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's own draw of a random resized crop: (top, left, height, width)."""
    from torchvision.transforms import RandomResizedCrop

    return RandomResizedCrop.get_params(torch.empty(1, height, width), SCALE, RATIO)


def collate(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One copy into a tensor, which a worker process hands over in shared memory."""
    return torch.from_numpy(np.stack([image for image, _ in samples])), torch.tensor([label for _, label in samples])
