"""Images made from their sample id: a learnable task for trying the whole system without any data on disk."""

from __future__ import annotations

import colorsys
import hashlib
import json

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.shards.source import DataError, RawSample

_SHARD_SIZE = 100
_ORIENTATIONS = 8
_FREQUENCIES = 4
_CONTRAST = 70.0
_NOISE = 25.0


class SyntheticSource:
    """Coloured gratings whose orientation, spacing and hue tell the class; phase and pixel noise differ by sample.

    Sample i has class i mod num_classes. The images are square, of `config.image_size`. Nothing is stored: a sample is
    a function of (config.synthetic.seed, split, id).
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        """Raises DataError for a split that is neither config.train_split nor config.val_split."""
        samples = {config.val_split: config.synthetic.val_samples, config.train_split: config.synthetic.train_samples}
        if split not in samples:
            raise DataError(f"the synthetic data set has the splits {sorted(samples)}, not '{split}'")
        self._size, self._split, self._num_samples = config.image_size, split, samples[split]
        self.num_classes = config.num_classes
        self.class_names = tuple(f"class_{label}" for label in range(config.num_classes))
        identity = ["synthetic-1", config.synthetic.seed, split, self._num_samples, self._size, config.num_classes]
        digest = hashlib.sha256(json.dumps(identity).encode())
        self.fingerprint = digest.hexdigest()
        self._key = np.frombuffer(digest.digest()[:16], np.uint64)
        rows, columns = np.mgrid[: self._size, : self._size].astype(np.float32) / self._size
        self._rows, self._columns = rows, columns

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each (imagined) shard."""
        whole, rest = divmod(self._num_samples, _SHARD_SIZE)
        return (_SHARD_SIZE,) * whole + ((rest,) if rest else ())

    def __len__(self) -> int:
        return self._num_samples

    def read(self, index: int) -> RawSample:
        """The sample at `index`, pixels uint8 (image_size, image_size, 3). Raises IndexError out of range."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, index]))
        label = index % self.num_classes
        return RawSample(
            key=f"{index:08d}",
            image=self._draw(label, rng),
            label=label,
            shard=f"{self._split}/synthetic-{index // _SHARD_SIZE:06d}",
        )

    def close(self) -> None:
        """Nothing is open."""

    def _draw(self, label: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        angle = np.pi * (label % _ORIENTATIONS) / _ORIENTATIONS
        cycles = 2 + 2 * (label // _ORIENTATIONS % _FREQUENCIES)
        # the golden ratio spreads the hues of any number of classes evenly
        colour = np.asarray(colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.8, 1.0), np.float32)
        along = self._columns * np.float32(np.cos(angle)) + self._rows * np.float32(np.sin(angle))
        wave = np.sin(2 * np.pi * (cycles * along + np.float32(rng.random())), dtype=np.float32)
        image = 128 + _CONTRAST * wave[:, :, None] * colour
        image += _NOISE * rng.standard_normal(image.shape, dtype=np.float32)
        pixels: npt.NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
        return pixels
