from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError
from data_pipeline.synthetic import SyntheticSource


def test_synthetic_samples_are_a_function_of_their_id() -> None:
    config = DataConfig(backend="synthetic", num_classes=10, image_size=16)
    sources = [SyntheticSource(config, "train") for _ in range(2)]
    for index in (0, 7, 1023):
        first, second = (source.read(index) for source in sources)
        assert np.array_equal(first.image, second.image)
        assert first.label == second.label == index % 10
    images = {sources[0].read(index).image.tobytes() for index in range(0, 100, 10)}  # type: ignore[union-attr]
    assert len(images) == 10
    assert not np.array_equal(sources[0].read(0).image, SyntheticSource(config, "val").read(0).image)
    assert sum(sources[0].shard_sizes) == len(sources[0]) == 1024
    with pytest.raises(IndexError):
        sources[0].read(1024)
    with pytest.raises(DataError, match="not 'test'"):
        SyntheticSource(config, "test")


def test_synthetic_labels_can_be_learned() -> None:
    config = DataConfig(backend="synthetic", num_classes=10, image_size=32)

    def features(split: str, count: int) -> tuple[Any, Any]:
        read = [SyntheticSource(config, split).read(index) for index in range(count)]
        spectra = [np.abs(np.fft.rfft2(np.asarray(raw.image, float), axes=(0, 1)))[:12, :12].ravel() for raw in read]
        return np.array(spectra), np.array([raw.label for raw in read])

    train, labels = features("train", 200)
    means = np.array([train[labels == label].mean(axis=0) for label in range(10)])
    test, expected = features("val", 100)
    nearest = ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == expected).mean() > 0.95
