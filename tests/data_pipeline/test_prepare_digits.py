from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.shards import open_source

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "set"
    assert main(["digits", "--out", str(out), "--jobs", "1"]) == 0
    return out


def test_each_digit_is_in_one_split_with_its_own_label_and_picture(digits: Path) -> None:
    bunch = datasets.load_digits()
    config = DataConfig(path=str(digits), num_classes=10)
    seen = []
    for split, count in (("train", 1437), ("val", 360)):
        source = open_source(config, split)
        assert (len(source), source.class_names) == (count, tuple("0123456789"))
        for index in range(count):
            sample = source.read(index)
            number = int(sample.key.removeprefix("digit-"))
            assert sample.label == bunch.target[number]
            seen.append(number)
            if index % 20 == 0:
                with Image.open(io.BytesIO(sample.image)) as image:
                    assert (image.format, image.size) == ("JPEG", (64, 64))
                    pixels = np.asarray(image.convert("L"), dtype=float)
                blocks = pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3))
                assert np.corrcoef(blocks.ravel(), bunch.images[number].ravel())[0, 1] > 0.98
    assert sorted(seen) == list(range(1797))


def test_every_class_is_held_out_in_proportion(digits: Path) -> None:
    labels = datasets.load_digits().target
    source = open_source(DataConfig(path=str(digits), num_classes=10), "val")
    held = np.bincount([source.read(index).label for index in range(360)], minlength=10)
    assert np.abs(held - np.bincount(labels) * 360 / 1797).max() < 1
