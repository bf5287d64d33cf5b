from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.grid import Cell, Sheet, _broken, colour_of, draw_samples, draw_sheet, draw_targets
from data_pipeline.shards import set_index
from data_pipeline.shards.source import DataError

GAP, TITLE = 8, 17 + 16


def _pixels(size: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (*size, 3)).copy()


def test_cells_are_placed_row_by_row_and_enlarged_by_a_whole_factor() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    cells = [Cell(_pixels((50, 60), colour), (("name", None),)) for colour in colours]
    sheet = np.asarray(draw_sheet(cells, 2, "title"))
    width, height = 180, 150  # three times as large: 60 is the first side to reach 128
    step = height + 2 * GAP + 17
    assert sheet.shape == (TITLE + 2 * step, GAP + 2 * (width + GAP), 3)
    for number, colour in enumerate(colours):
        left, top = GAP + number % 2 * (width + GAP), TITLE + number // 2 * step
        assert (sheet[top : top + height, left : left + width] == colour).all()
    assert (sheet[TITLE + step :, GAP + width + GAP :] == 250).all(), "there is no fourth"
    below = sheet[TITLE + height : TITLE + step, GAP : GAP + width]
    assert below.min() < 100, "the name stands below the image"


def test_a_caption_that_does_not_fit_is_counted_and_long_names_are_cut() -> None:
    caption = tuple((f"class number {number}", colour_of(number)) for number in range(40))
    sheet = draw_sheet([Cell(_pixels((128, 128), (0, 0, 0)), (("x" * 100, None), *caption))], 1, "t" * 200)
    assert sheet.size == (128 + 2 * GAP, TITLE + 128 + 2 * GAP + 3 * 17)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tench", ["tench"]),
        ("American Staffordshire terrier", ["American ", "Staffordshire terrier"]),
        ("n02093428_american_staffordshire", ["n02093428_", "american_staffordshire"]),
        ("x" * 60, ["x" * 60]),
    ],
)
def test_a_long_name_takes_a_second_line_and_is_broken_between_words(name: str, parts: list[str]) -> None:
    assert _broken(name, 130) == parts
    lines = len(parts)
    assert draw_sheet([Cell(_pixels((130, 130), (0, 0, 0)), ((name, None),))], 1, "").height == (
        TITLE + 130 + 2 * GAP + 17 * lines
    )


def test_classes_have_colours_of_their_own() -> None:
    assert len({colour_of(number) for number in range(150)}) == 150


@pytest.fixture
def plain() -> AugmentConfig:
    """No augmentation: whole images, unless a test says otherwise."""
    return AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.0)


def test_samples_are_those_of_the_loader_s_first_batch(
    shard_folder: Path, plain: AugmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import grid
    from data_pipeline.loader import build_loader

    config = DataConfig(path=str(shard_folder), num_classes=3, image_size=128, augment=plain, num_threads=0)
    with build_loader(config, "train", train=True, global_batch_size=6, rank=0, world_size=1, seed=3) as loader:
        loader.set_epoch(2)
        batch = next(iter(loader))
    captions = []
    monkeypatch.setattr(grid, "draw_sheet", lambda cells, columns, title: captions.extend(cells) or title)
    title = draw_samples(config, Sheet("train", rows=2, columns=3, epoch=2, seed=3))
    assert title == f"{shard_folder}, train: epoch 2, seed 3, 128 px"
    assert [cell.caption[0][0] for cell in captions] == [("bird", "cat", "dog")[label] for label in batch.labels]
    assert all((cell.pixels == image).all() for cell, image in zip(captions, batch.images.numpy(), strict=True))


def test_changes_of_a_device_are_drawn_by_the_device_s_operations(
    shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import grid
    from data_pipeline.device_changes import apply_changes
    from data_pipeline.loader import build_loader

    augment = AugmentConfig(three_augment=True, color_jitter=0.4, random_erasing=1.0, place="device")
    config = DataConfig(path=str(shard_folder), num_classes=3, image_size=128, augment=augment, num_threads=0)
    with build_loader(config, "train", train=True, global_batch_size=6, rank=0, world_size=1, seed=0) as loader:
        loader.set_epoch(0)
        batch = next(iter(loader))
    expected = apply_changes(batch.images, batch.changes, config).numpy()
    assert (expected != batch.images.numpy()).any(axis=(1, 2, 3)).all(), "every image is changed after the loader"
    drawn: list[Cell] = []
    monkeypatch.setattr(grid, "draw_sheet", lambda cells, columns, title: drawn.extend(cells))
    draw_samples(config, Sheet("train", rows=2, columns=3))
    assert all((cell.pixels == image).all() for cell, image in zip(drawn, expected, strict=True))


def _prepared(tmp_path: Path, arguments: list[str]) -> Path:
    from data_pipeline.prepare import main

    assert main([*arguments, "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    return tmp_path / "out"


def test_masks_are_drawn_in_the_colours_of_their_classes_and_ignored_pixels_dark(tmp_path: Path, image_file) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 1
    mask[15:, :20] = 255
    for split in ("train", "val"):
        for folder in ("images", "annotations"):
            (tmp_path / "src" / folder / split).mkdir(parents=True)
        (tmp_path / "src" / "images" / split / "one.png").write_bytes(image_file(0, kind="PNG", mode="L"))
        Image.fromarray(mask).save(tmp_path / "src" / "annotations" / split / "one.png")
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    names = ["--class-names", str(tmp_path / "names.txt")]
    out = _prepared(tmp_path, ["segmentation", "--src", str(tmp_path / "src"), *names])
    sheet = np.asarray(draw_targets(out, set_index.load(out), Sheet("train"), 160)).astype(int)
    image = np.asarray(Image.open(tmp_path / "src" / "images" / "train" / "one.png"))[:, :, None]
    expected = {(5, 5): colour_of(0), (5, 30): colour_of(1), (20, 5): (0, 0, 0)}
    for (row, column), colour in expected.items():
        pixel = sheet[TITLE + row * 4 + 2, GAP + column * 4 + 2]
        assert np.abs(pixel - (0.45 * image[row, column] + 0.55 * np.array(colour))).max() < 1.5


def test_objects_are_drawn_where_they_are_and_flat_ones_are_not(tmp_path: Path, image_file) -> None:
    thing = {"image_id": 5, "category_id": 3, "area": 100, "iscrowd": 0}
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    annotations = [
        {**thing, "id": 1, "bbox": [10, 10, 10, 10], "segmentation": [square]},
        {**thing, "id": 2, "bbox": [30, 5, 0, 9], "segmentation": [[30, 5, 30, 9, 30, 14]]},
    ]
    content = {"images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}], "annotations": annotations}
    content["categories"] = [{"id": 3, "name": "thing"}]
    (tmp_path / "src" / "annotations").mkdir(parents=True)
    (tmp_path / "src" / "train").mkdir()
    (tmp_path / "src" / "annotations" / "instances_train.json").write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "src" / "train" / "a.png")
    out = _prepared(tmp_path, ["coco", "--src", str(tmp_path / "src"), "--splits", "train"])
    sheet = np.asarray(draw_targets(out, set_index.load(out), Sheet("train"), 160))
    image = sheet[TITLE : TITLE + 120, GAP : GAP + 160]
    assert (image[60, 40:42] == colour_of(0)).all(), "the box's left side"
    assert np.abs(image[60, 60] - 0.4 * np.array(colour_of(0))).max() < 1.5, "the mask within"
    assert (image[:, 100:] == 0).all(), "the flat box is not drawn"


def test_a_damaged_sample_of_a_dense_set_is_named(tmp_path: Path, image_file, flip) -> None:
    from data_pipeline.shards import shard_index

    for folder in ("images", "annotations"):
        (tmp_path / "src" / folder / "train").mkdir(parents=True)
    (tmp_path / "src" / "images" / "train" / "one.jpg").write_bytes(image_file(0))
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "src" / "annotations" / "train" / "one.png")
    (tmp_path / "names.txt").write_text("sky\n")
    names = ["--class-names", str(tmp_path / "names.txt"), "--splits", "train"]
    out = _prepared(tmp_path, ["segmentation", "--src", str(tmp_path / "src"), *names])
    record = shard_index.load(out / "train" / "shard-000000.idx").records[0]
    target = int(record["offset"]) + int(record["size"]) + int(record["target_gap"])
    flip(out / "train" / "shard-000000.tar", target + 30)
    with pytest.raises(DataError, match=r"'one' in shard train/shard-000000.tar: .*data_pipeline.verify"):
        draw_targets(out, set_index.load(out), Sheet("train"), 160)
