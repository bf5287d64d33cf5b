from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from data_pipeline import transforms
from data_pipeline.augment import SampleDraws
from data_pipeline.config import AugmentConfig, DataConfig, Interpolation
from data_pipeline.decode import open_image
from data_pipeline.transforms import eval_transform, normalize, resize, train_transform

Pixels = npt.NDArray[np.uint8]

UNCHANGED = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.0)


@pytest.fixture(params=["opencv", "torch only"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with OpenCV and as if it were not installed."""
    if request.param == "torch only":
        monkeypatch.setattr(transforms, "_cv2", lambda: None)
    return str(request.param)


def picture(height: int, width: int) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([(rows * 7 + columns * 3 + 50 * k) % 256 for k in range(3)], axis=-1).astype(np.uint8)


def smooth(height: int, width: int) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    channels = [128 + 60 * np.sin(rows / 17 + k) + 60 * np.cos(columns / 23) for k in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def applied(augment: AugmentConfig, image: Pixels, sample: int = 0, size: int = 16) -> Pixels:
    out = np.zeros((size, size, 3), np.uint8)
    train_transform(DataConfig(image_size=size, augment=augment))(open_image(image), SampleDraws(0, 0).of(sample), out)
    return out


def test_whole_crop_at_the_right_size_is_the_image_itself() -> None:
    image = picture(16, 16)
    for sample in range(5):
        assert (applied(UNCHANGED, image, sample) == image).all()


def test_flip_mirrors_left_and_right_as_often_as_asked(library: str) -> None:
    image = picture(16, 16)
    always = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=1.0)
    assert (applied(always, image) == image[:, ::-1]).all()
    half = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip=0.5)
    flipped = sum(bool((applied(half, image, sample) == image[:, ::-1]).all()) for sample in range(400))
    assert abs(flipped - 200) < 5 * 10


def test_crop_takes_the_box_that_was_drawn() -> None:
    image = picture(64, 48)
    augment = AugmentConfig(scale=(0.0834, 0.0834), ratio=(1.0, 1.0), horizontal_flip=0.0)  # 16 x 16 of 64 x 48
    windows = {image[top : top + 16, left : left + 16].tobytes() for top in range(49) for left in range(33)}
    served = {applied(augment, image, sample).tobytes() for sample in range(40)}
    assert served <= windows
    assert len(served) > 30


def test_augmentation_touches_no_global_generator() -> None:
    augment = AugmentConfig(rand_augment="rand-m9-n3-p1-mstd0.5-inc1", random_erasing=1.0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    served = [applied(augment, smooth(40, 50), sample) for sample in range(20)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert all((applied(augment, smooth(40, 50), sample) == served[sample]).all() for sample in range(20))


def test_erasing_changes_one_box_only() -> None:
    image = picture(16, 16)
    augment = AugmentConfig(**{**vars(UNCHANGED), "random_erasing": 1.0, "erasing_mode": "const"})
    changed = (applied(augment, image) != image).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert 0 < len(rows) < 16
    box = applied(augment, image)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (box == (124, 116, 104)).all()


def test_unknown_rand_augment_is_refused_when_the_transform_is_made() -> None:
    with pytest.raises(ValueError, match="rand_augment 'rand-z1'"):
        train_transform(DataConfig(augment=AugmentConfig(rand_augment="rand-z1")))


@pytest.mark.parametrize("interpolation", ["antialias", "linear", "area"])
def test_equal_sizes_are_copied_and_flat_colour_stays_flat(interpolation: Interpolation) -> None:
    image, out = picture(9, 11), np.zeros((9, 11, 3), np.uint8)
    resize(image, out, interpolation)
    assert (out == image).all()
    flat, out = np.full((40, 30, 3), (3, 200, 77), np.uint8), np.zeros((16, 16, 3), np.uint8)
    resize(flat, out, interpolation)
    assert (out == (3, 200, 77)).all()


@pytest.mark.parametrize("size", [(16, 16), (90, 70), (37, 120)])
def test_antialiased_resizing_is_that_of_pillow(size: tuple[int, int]) -> None:
    image, out = picture(60, 50), np.zeros((*size, 3), np.uint8)
    resize(image[3:57, 5:49], out, "antialias")  # a crop: rows with gaps between them
    expected = Image.fromarray(image[3:57, 5:49]).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 1  # both compute in fixed point


def test_linear_resizing_needs_no_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    image, outs = smooth(60, 50), [np.zeros((32, 40, 3), np.uint8) for _ in range(2)]
    resize(image, outs[0], "linear")
    assert (outs[0] == cv2.resize(image, (40, 32), interpolation=cv2.INTER_LINEAR)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "_cv2", lambda: None)
        resize(image, outs[1], "linear")
        with pytest.raises(ImportError, match="needs OpenCV: pip install opencv-python"):
            resize(image, outs[1], "area")
    assert np.abs(outs[0].astype(int) - outs[1]).max() <= 1


def test_area_resizing_averages_over_the_pixels_that_fall_on_one() -> None:
    pytest.importorskip("cv2")
    image, out = picture(32, 48), np.zeros((16, 16, 3), np.uint8)
    resize(image, out, "area")
    means = image.reshape(16, 2, 16, 3, 3).mean(axis=(1, 3))
    assert np.abs(out - means).max() <= 0.5 + 1e-3


def test_resizing_reads_arrays_that_may_not_be_written(recwarn: pytest.WarningsRecorder) -> None:
    image, out = picture(20, 20), np.zeros((8, 8, 3), np.uint8)
    image.flags.writeable = False
    for interpolation in ("antialias", "linear"):
        resize(image, out, interpolation)  # type: ignore[arg-type]
    assert not recwarn.list


@pytest.mark.parametrize("interpolation", ["antialias", "linear"])
@pytest.mark.parametrize("size", [(7, 12), (5, 9)])
def test_mirrored_resizing_is_resizing_and_mirroring(
    library: str, interpolation: Interpolation, size: tuple[int, int]
) -> None:
    image, plain, mirrored = picture(7, 12), np.zeros((*size, 3), np.uint8), np.zeros((*size, 3), np.uint8)
    resize(image, plain, interpolation)
    resize(image, mirrored, interpolation, mirrored=True)
    assert (mirrored == plain[:, ::-1]).all()
    assert (mirrored != plain).any()


def test_opencv_starts_no_threads_of_its_own() -> None:
    cv2 = pytest.importorskip("cv2")
    resize(picture(4, 4), np.zeros((2, 2, 3), np.uint8), "linear")
    assert cv2.getNumThreads() <= 1


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((10, 14), slice(1, 9), slice(3, 11)),
        ((15, 10), slice(4, 12), slice(1, 9)),
        ((10, 10), slice(1, 9), slice(1, 9)),
    ],
)
def test_evaluation_takes_the_central_square(size: tuple[int, int], rows: slice, columns: slice) -> None:
    image, out = picture(*size), np.zeros((8, 8, 3), np.uint8)  # 8 / 0.8 = 10 is the short side: nothing is resampled
    eval_transform(DataConfig(image_size=8, eval_crop_pct=0.8))(open_image(image), SampleDraws(0, 0).of(0), out)
    assert (out == image[rows, columns]).all()


def test_evaluation_resizes_the_short_side_and_keeps_the_aspect_ratio() -> None:
    image, out = smooth(100, 150), np.zeros((28, 28, 3), np.uint8)
    eval_transform(DataConfig(image_size=28, eval_crop_pct=0.875))(open_image(image), SampleDraws(0, 0).of(0), out)
    resized = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR))
    assert np.abs(out.astype(int) - resized[2:30, 10:38]).max() <= 1


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (1, 1), (33, 32)])
def test_evaluation_fills_the_square_from_any_shape(size: tuple[int, int]) -> None:
    out = np.zeros((28, 28, 3), np.uint8)
    eval_transform(DataConfig(image_size=28))(
        open_image(np.full((*size, 3), 9, np.uint8)), SampleDraws(0, 0).of(0), out
    )
    assert (out == 9).all()


def centre_of_the_whole_resized(image: Pixels, short_side: int, size: int, interpolation: Interpolation) -> Pixels:
    scale = short_side / min(image.shape[:2])
    resized = np.zeros((*(max(short_side, int(side * scale)) for side in image.shape[:2]), 3), np.uint8)
    resize(image, resized, interpolation)
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("interpolation", ["antialias", "linear"])
@pytest.mark.parametrize(
    ("size", "difference"),
    [
        ((64, 64), 0),
        ((80, 60), 0),
        ((375, 500), 0),
        ((500, 375), 0),
        ((30, 120), 0),
        ((30, 600), 1),
        ((601, 30), 1),
        ((90, 1111), 1),
    ],
)
def test_evaluation_serves_the_centre_of_the_whole_resized_image(
    size: tuple[int, int], difference: int, interpolation: Interpolation
) -> None:
    out = np.zeros((56, 56, 3), np.uint8)
    config = DataConfig(image_size=56, augment=AugmentConfig(interpolation=interpolation))
    eval_transform(config)(open_image(smooth(*size)), SampleDraws(0, 0).of(0), out)
    expected = centre_of_the_whole_resized(smooth(*size), 64, 56, interpolation)
    assert np.abs(out.astype(int) - expected).mean() <= difference


@pytest.mark.parametrize("upright", [False, True])
def test_evaluation_of_a_strip_resizes_its_middle_only(upright: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def noted(image: Pixels, out: Pixels, interpolation: Interpolation) -> None:
        shapes.append((image.shape, out.shape))
        resize(image, out, interpolation)

    monkeypatch.setattr(transforms, "resize", noted)
    strip = np.zeros((2, 6000, 3), np.uint8)
    strip[:, 2999], strip[:, 3000] = 40, 200  # the two columns on either side of the centre
    out = np.zeros((224, 224, 3), np.uint8)
    eval_transform(DataConfig())(
        open_image(strip.transpose(1, 0, 2) if upright else strip), SampleDraws(0, 0).of(0), out
    )
    assert shapes == [((8, 2, 3), (1024, 256, 3)) if upright else ((2, 8, 3), (256, 1024, 3))]
    # Each source column is 128 wide; between the centres of two columns (48 and 176 here) the brightness is linear.
    places = np.arange(224) + 0.5
    expected = np.interp(places, [48 - 128, 48, 176, 176 + 128], [0, 40, 200, 0])
    lines = out if not upright else out.transpose(1, 0, 2)
    assert np.abs(lines - expected[:, None]).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalize_computes_each_channel_and_gives_channels_last(dtype: torch.dtype) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.from_numpy(np.stack([picture(5, 6), picture(5, 6)[::-1].copy()]))
    result = normalize(images, mean, std, dtype)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 5, 6)
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = ((images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    # Values up to 3, after up to four roundings in at least float32 and one to dtype.
    tolerance = 3 * (4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2)
    assert (result.double() - expected).abs().max() < tolerance


def test_normalize_leaves_its_input_alone_and_takes_bytes_only() -> None:
    images = torch.from_numpy(picture(4, 4)[None].copy())
    before = images.clone()
    normalize(images, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(images, before)
    with pytest.raises(TypeError, match="takes uint8 images"):
        normalize(images.float(), (0.5,) * 3, (0.5,) * 3)


_COUNTING = """
import os, sys, threading
import numpy as np, torch
from data_pipeline import transforms
from data_pipeline.decode import open_image
torch.set_num_threads(4)  # what a team would have
if sys.argv[1] == "without OpenCV":
    transforms._cv2 = lambda: None
image, out = np.zeros((900, 900, 3), np.uint8), np.zeros((300, 300, 3), np.uint8)
def count(): return len(os.listdir("/proc/self/task"))
def work():
    for part in (image, image[:, :700]):
        for interpolation in ("antialias", "linear"):
            transforms.resize(part, out.copy(), interpolation, mirrored=True)
    open_image(image).region((0, 0, 9, 9))
    done.wait()
    end.wait()
# once in this thread: what a library starts for the whole process
done = end = threading.Barrier(1)
work()
before = count()
done, end = threading.Barrier(4), threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
done.wait()
print(count() - before)
end.wait()
"""


@pytest.mark.parametrize("library", ["with OpenCV", "without OpenCV"])
def test_a_thread_that_resizes_starts_no_team_of_its_own(library: str) -> None:
    done = subprocess.run([sys.executable, "-c", _COUNTING, library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3
