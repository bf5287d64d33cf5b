"""Photograph-like JPEGs made from a seed."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import decode_image
from data_pipeline.prepare import main
from data_pipeline.prepare.synthetic_jpegs import Recipe, draw_jpeg
from data_pipeline.shards import set_index, shard_index

RECIPE = Recipe(width=500, height=375, vary=False, classes=10, seed=0)
SMALL = ("--images", "60", "--val-images", "20", "--classes", "7", "--size", "64x48")


def _prepare(out: Path, *more: str) -> int:
    return main(["synthetic", "--out", str(out), "--jobs", "1", *SMALL, *more])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes_and_parts(tmp_path: Path) -> None:
    chosen = ("--num-shards", "4", "--vary")
    assert _prepare(tmp_path / "one", *chosen) == 0
    assert _prepare(tmp_path / "two", *chosen, "--jobs", "2") == 0
    for number in (2, 1):
        assert _prepare(tmp_path / "parts", *chosen, "--part", f"{number}/2") == 0
    assert _prepare(tmp_path / "parts", *chosen, "--merge") == 0
    whole = _contents(tmp_path / "one")
    assert _contents(tmp_path / "two") == whole
    assert _contents(tmp_path / "parts") == whole
    assert _prepare(tmp_path / "other", *chosen, "--seed", "1") == 0
    assert set_index.load(tmp_path / "other").fingerprint("train") != set_index.load(tmp_path / "one").fingerprint(
        "train"
    )


def test_labels_go_round_the_classes_and_every_image_is_another(tmp_path: Path) -> None:
    assert _prepare(tmp_path / "out", "--num-shards", "1") == 0
    index = set_index.load(tmp_path / "out")
    assert index.classes == tuple(f"class-{label:05d}" for label in range(7))
    checksums: set[int] = set()
    for split, count in (("train", 60), ("val", 20)):
        shard = shard_index.load(tmp_path / "out" / split / "shard-000000.idx")
        assert {key: int(label) for key, label in zip(shard.keys, shard.records["label"], strict=True)} == {
            f"{number:08d}": number % 7 for number in range(count)
        }
        checksums |= set(shard.records["crc32"].tolist())
    assert len(checksums) == 80


def test_more_images_leave_the_first_ones_as_they_are() -> None:
    assert draw_jpeg(RECIPE, "train", 3) == draw_jpeg(RECIPE, "train", 3)
    different = {draw_jpeg(RECIPE, split, number) for split in ("train", "val") for number in (3, 13)}
    different.add(draw_jpeg(dataclasses.replace(RECIPE, seed=1), "train", 3))
    assert len(different) == 5


def test_files_are_about_as_large_as_photographs_of_that_size_and_of_their_kind() -> None:
    files = [draw_jpeg(RECIPE, "train", number) for number in range(24)]
    sizes = sorted(map(len, files))
    assert 80_000 < np.mean(sizes) < 100_000
    assert sizes[-1] > 1.2 * sizes[0]
    for file in files[:3]:
        with Image.open(io.BytesIO(file)) as image:
            assert (image.size, image.mode, image.format) == ((500, 375), "RGB", "JPEG")
            assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


def test_detail_falls_with_frequency_as_in_photographs() -> None:
    """Amplitude as 1 / frequency means equal contrast in every octave: a power spectrum that falls with exponent 2."""
    spectrum = np.zeros((256, 256))
    for number in range(16):
        grey = decode_image(draw_jpeg(RECIPE, "train", number))[60:316, 100:356].mean(axis=-1)
        window = np.outer(np.hanning(256), np.hanning(256))
        spectrum += np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    bands = [(4 / 256, 8 / 256), (8 / 256, 16 / 256), (16 / 256, 32 / 256), (32 / 256, 64 / 256)]
    power = [spectrum[(frequency >= low) & (frequency < high)].mean() for low, high in bands]
    exponent = -np.polyfit(np.log2([low for low, _ in bands]), np.log2(power), 1)[0]
    assert 1.4 < exponent < 2.6


def test_hue_tells_the_class() -> None:
    """Classes 0 and 5 differ in hue alone (red, and a violet blue), and the background has none on average."""
    recipe = dataclasses.replace(RECIPE, width=96, height=96)
    red_over_blue = {}
    for label in (0, 5):
        pixels = [decode_image(draw_jpeg(recipe, "train", label + 10 * number)) for number in range(20)]
        red, _, blue = np.mean(pixels, axis=(0, 1, 2))
        red_over_blue[label] = red - blue
    assert red_over_blue[0] > 8
    assert red_over_blue[5] < -8


def test_varied_sizes_differ_in_shape_and_have_about_the_pixels_asked_for(tmp_path: Path) -> None:
    assert _prepare(tmp_path / "out", "--vary", "--num-shards", "1") == 0
    records = shard_index.load(tmp_path / "out" / "train" / "shard-000000.idx").records
    widths, heights = records["width"].astype(float), records["height"].astype(float)
    assert len(set(zip(widths, heights, strict=True))) > 40
    assert 0.85 < np.mean(widths * heights) / (64 * 48) < 1.15
    assert (widths > heights).sum() > 10
    assert (widths < heights).sum() > 5


def test_a_continued_run_draws_only_what_is_missing(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_pipeline.prepare import synthetic_jpegs

    chosen = ("--shard-size", "20")
    assert _prepare(tmp_path / "out", *chosen, "--part", "1/2") == 0
    drawn = []
    real = synthetic_jpegs.draw_jpeg

    def counted(recipe: Recipe, split: str, number: int) -> bytes:
        drawn.append((split, number))
        return real(recipe, split, number)

    monkeypatch.setattr(synthetic_jpegs, "draw_jpeg", counted)
    capsys.readouterr()
    assert _prepare(tmp_path / "out", *chosen) == 0
    assert "2 shards written, 2 kept" in capsys.readouterr().out
    assert len(drawn) == len(set(drawn)) == 40
    drawn.clear()
    assert _prepare(tmp_path / "out", *chosen) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert drawn == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "500"), "--size 500: give width x height, 32 to 8192, such as 500x375"),
        (("--size", "16x16"), "--size 16x16: give width x height"),
        (("--images", "0"), "--images must be 1 or more, not 0"),
        (("--val-images", "-1"), "--val-images must be 1 or more, not -1"),
        (("--classes", "0"), "--classes must be 1 or more, not 0"),
    ],
)
def test_sizes_and_numbers_that_make_no_image_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert _prepare(tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
