from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_sets import detection_config, detection_set, segmentation_config, segmentation_set
from PIL import Image

from data_pipeline.grid import Sheet, colour_of
from data_pipeline.grid_dense import draw_training
from data_pipeline.inspect import main as inspect
from data_pipeline.loader import build_loader

TITLE, GAP = 17 + 2 * 8, 8  # of a sheet, in pixels, as data_pipeline.grid draws it


def _first_batch(config, kind: str, count: int):
    kwargs = {"train": True, "global_batch_size": count, "rank": 0, "world_size": 1, "seed": 3}
    with build_loader(config, "train", kind=kind, **kwargs) as loader:
        loader.set_epoch(2)
        return next(iter(loader))


def test_crops_are_drawn_under_the_colours_of_the_classes_that_training_is_told(tmp_path: Path) -> None:
    config = segmentation_config(segmentation_set(tmp_path), crop_size=128, short_side=96, long_side=200)
    sheet = np.asarray(draw_training(config, "segmentation", Sheet("train", 1, 2, epoch=2, seed=3)))
    batch = _first_batch(config, "segmentation", 2)
    colours = np.array([colour_of(number) for number in range(256)])
    colours[255] = 0
    for place in range(2):
        left = GAP + place * (128 + GAP)
        drawn = sheet[TITLE : TITLE + 128, left : left + 128]
        expected = 0.45 * batch.images[place].numpy() + 0.55 * colours[batch.targets[place]]
        assert np.abs(drawn - expected).max() <= 0.5


def test_canvases_are_drawn_with_masks_and_boxes(tmp_path: Path) -> None:
    config = detection_config(detection_set(tmp_path), short_sides=(128,), long_side=256)
    sheet = np.asarray(draw_training(config, "detection", Sheet("train", 1, 2, epoch=2, seed=3))).astype(int)
    batch = _first_batch(config, "detection", 2)
    height, width = batch.images.shape[1:3]
    outlined = 0
    for place, target in enumerate(batch.targets):
        drawn = sheet[TITLE : TITLE + height, GAP + place * (width + GAP) :][:, :width]
        for box, label in zip(target.boxes, target.labels.tolist(), strict=True):
            left, top, right, bottom = np.rint(box).astype(int)
            middle = (top + bottom) // 2, (left + right) // 2
            expected = 0.45 * batch.images[place].numpy()[middle] + 0.55 * np.array(colour_of(label))
            assert np.abs(drawn[middle] - expected).max() <= 0.5, "the mask"
            outlined += (np.abs(drawn[middle[0], left - 1 : left + 2] - colour_of(label)).max(axis=1) == 0).any()
    assert outlined == sum(map(len, batch.targets)) > 0, "the left side of every box"


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_inspect_draws_a_dense_set_as_training_sees_it(kind: str, tmp_path: Path, capsys) -> None:
    folder = segmentation_set(tmp_path) if kind == "segmentation" else detection_set(tmp_path)
    settings = ["segmentation.crop_size=150", "detection.short_sides=[150]", "detection.long_side=150"]
    command = [str(folder), "--grid", str(tmp_path / "grid.png"), "--training", "--rows", "1", "--columns", "1"]
    assert inspect([*command, "--set", *settings, "detection.eval_short_side=150"]) == 0, capsys.readouterr().err
    width = Image.open(tmp_path / "grid.png").width - 2 * GAP
    assert width == 150 if kind == "segmentation" else width in (96, 128, 160)
    assert inspect([*command, "--set", "order=block", "--split", "nothing"]) == 1
    assert "has no split 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--image-size", "64"], "--image-size has no meaning for segmentation as training sees it: set its sizes"),
        (["--evaluation"], "argument --evaluation: not allowed with argument --training"),
    ],
)
def test_inspect_refuses_options_that_training_would_not_follow(option, message: str, tmp_path: Path, capsys) -> None:
    command = [str(segmentation_set(tmp_path, 1, 1)), "--grid", str(tmp_path / "grid.png"), "--training", *option]
    try:
        status = inspect(command)
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status > 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()
