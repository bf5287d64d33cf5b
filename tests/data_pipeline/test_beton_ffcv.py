"""The ffcv package and this one read each other's files, and tar shards and .beton files give the same batches."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import AugmentConfig, Batch, DataConfig, DataError, Loader, build_loader
from data_pipeline.decode import decode_image
from data_pipeline.prepare import main
from data_pipeline.shards.beton import BetonSource
from data_pipeline.shards.reader import open_source
from data_pipeline.shards.source import DamagedSampleError, RawSample

pytestmark = pytest.mark.ffcv

CLASSES = ("ant", "bee", "cat")
HEIGHT, WIDTH = 30, 40


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory, image_file: Callable[..., bytes]) -> Path:
    """40 images to train on and 11 to validate, all upright 30x40 when they are shown: mostly JPEGs, one of each other
    kind, and one that is cut off."""
    folder = tmp_path_factory.mktemp("source")
    odd: dict[int, bytes] = {
        4: image_file(4, kind="PNG"),
        5: image_file(5, mode="CMYK"),
        6: image_file(6, mode="L"),
        7: _turned(image_file(7, width=HEIGHT, height=WIDTH)),
        8: image_file(8, kind="WEBP"),
        9: image_file(9)[:-90],
        10: _with(image_file(10, kind="PNG"), progressive=True),
        11: _with(image_file(11, kind="PNG"), subsampling=0),
    }
    for split, count in (("train", 40), ("val", 11)):
        for number in range(count):
            path = folder / split / CLASSES[number % 3] / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(odd.get(number) or image_file(number + 100 * len(split)))
    return folder


def _with(image: bytes, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).save(file, "JPEG", **options)
    return file.getvalue()


def _turned(image: bytes) -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return _with(image, exif=exif)


def prepare(source: Path, out: Path, *options: str) -> int:
    return main(["imagefolder", "--src", str(source), "--out", str(out), "--jobs", "1", *options])


@pytest.fixture(scope="module")
def tar_folder(tmp_path_factory: pytest.TempPathFactory, source_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("tar") / "set"
    assert prepare(source_folder, out, "--shard-size", "7") == 3
    return out


@pytest.fixture(scope="module")
def beton_folder(tmp_path_factory: pytest.TempPathFactory, source_folder: Path) -> Path:
    """A quarter of the JPEGs are pixels."""
    out = tmp_path_factory.mktemp("beton") / "set"
    assert prepare(source_folder, out, "--format", "ffcv", "--raw-fraction", "0.25") == 3
    return out


def config(folder: Path, backend: str, threads: int = 1) -> DataConfig:
    return DataConfig(
        backend=backend,  # type: ignore[arg-type]
        path=str(folder), num_classes=3, image_size=20, num_threads=threads, decoding="exact",
        augment=AugmentConfig(scale=(0.3, 1.0), rand_augment="rand-m9-n2-mstd0.5-inc1", random_erasing=0.5),
    )  # fmt: skip


def open_loader(config: DataConfig, batch: int, rank: int = 0, world_size: int = 1, train: bool = True) -> Loader:
    split = config.train_split if train else config.val_split
    return build_loader(
        config, split, train=train, global_batch_size=batch, rank=rank, world_size=world_size, seed=5
    )  # fmt: skip


def served(batches: Iterator[Batch]) -> list[tuple[int, int, bytes]]:
    return [
        (int(batch.ids[place]), int(batch.labels[place]), batch.images[place].numpy().tobytes())
        for batch in batches
        for place in range(len(batch.ids))
        if batch.valid[place]
    ]


def kind(sample: RawSample) -> str:
    return "jpeg" if isinstance(sample.image, bytes) else "pixels"


def test_beton_holds_the_samples_of_the_tars_in_their_order_with_jpegs_untouched(
    tar_folder: Path, beton_folder: Path
) -> None:
    tar, beton = (
        open_source(config(tar_folder, "webdataset"), "train"),
        BetonSource(beton_folder / "train.beton", CLASSES),
    )
    assert len(tar) == len(beton) == 39
    kinds = []
    for number in range(len(tar)):
        expected, found = tar.read(number), beton.read(number)
        assert found.label == expected.label
        kinds.append(kind(found))
        if kinds[-1] == "jpeg":
            assert found.image == expected.image
        else:
            assert np.array_equal(found.image, decode_image(expected.image, "exact"))
    index = json.loads((beton_folder / "index.json").read_text())
    assert index["classes"] == list(CLASSES)
    assert kinds.count("pixels") == index["splits"]["train"]["raw"]
    assert 4 + 4 <= kinds.count("pixels") <= 4 + 14  # PNG, WebP, CMYK and rotated; and about 9 of 35 that are drawn
    assert (beton_folder / "left_out.jsonl").read_text() == (tar_folder / "left_out.jsonl").read_text()


def read_by_ffcv(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 30, 40, 3) and labels (n,) as ffcv's own loader gives them."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = FFCVLoader(
        str(path), batch_size=count, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True, pipelines=pipelines
    )
    ((images, labels),) = [tuple(np.array(part) for part in batch) for batch in loader]
    return images, labels[:, 0]


def test_ffcv_own_loader_reads_what_was_written(beton_folder: Path) -> None:
    """ffcv decodes with libjpeg-turbo's fast DCT and smooth upsampling: the same is asked of simplejpeg here."""
    simplejpeg = pytest.importorskip("simplejpeg")
    source = BetonSource(beton_folder / "train.beton", CLASSES)
    images, labels = read_by_ffcv(beton_folder / "train.beton", len(source))
    for number in range(len(source)):
        sample = source.read(number)
        assert labels[number] == sample.label
        if isinstance(sample.image, bytes):
            assert np.array_equal(images[number], simplejpeg.decode_jpeg(sample.image, "RGB", fastdct=True))
        else:
            assert np.array_equal(images[number], sample.image)


class _Foreign:
    """450 images of a few sizes and kinds of blocks, with what else a field may hold."""

    def __len__(self) -> int:
        return 450

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return np.zeros(place % 3, np.uint8), 0.5, self.pixels(place), place % 3, np.arange(3, dtype="f4")

    def pixels(self, place: int) -> np.ndarray:
        blocks = np.random.Generator(np.random.PCG64(int(place))).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        return np.kron(blocks, np.ones((12 + place % 5, 16, 1), np.uint8))


@pytest.mark.parametrize(
    ("mode", "options", "page_bytes"),
    [
        ("jpg", {"jpeg_quality": 90}, 1 << 21),
        ("raw", {}, 1 << 21),
        ("smart", {"smart_threshold": 48_000}, 1 << 22),
        ("proportion", {"compress_probability": 0.5}, 1 << 23),
    ],
)
def test_files_that_ffcv_wrote_are_read(tmp_path: Path, mode: str, options: dict[str, Any], page_bytes: int) -> None:
    """By two processes, whose pages alternate; with fields before and after that are not of interest."""
    from ffcv.fields import BytesField, FloatField, IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    path, foreign = tmp_path / "train.beton", _Foreign()
    image = RGBImageField(write_mode=mode, **options)
    fields = {"text": BytesField(), "weight": FloatField(), "picture": image, "class": IntField()}
    fields["vector"] = NDArrayField(np.dtype("f4"), (3,))
    DatasetWriter(str(path), fields, page_size=page_bytes, num_workers=2).from_indexed_dataset(foreign, chunksize=7)

    source = BetonSource(path, CLASSES)
    assert len(source) == 450
    assert source.shard_sizes.sum() == 450
    kinds = set()
    for number in range(450):
        sample = source.read(number)
        assert sample.label == number % 3
        kinds.add(kind(sample))
        pixels, expected = decode_image(sample.image), foreign.pixels(number)
        assert pixels.shape == expected.shape
        if kind(sample) == "pixels":
            assert np.array_equal(pixels, expected)
        else:  # blocks of one colour with 4:2:0 chroma: only their edges suffer
            assert np.abs(pixels.astype(int) - expected).mean() < 12
    assert kinds == {"jpg": {"jpeg"}, "raw": {"pixels"}}.get(mode, {"jpeg", "pixels"})


@pytest.mark.parametrize(("world_size", "threads"), [(1, 1), (1, 8), (2, 4), (3, 2), (8, 1), (8, 3)])
def test_tar_and_beton_give_the_same_batches_for_any_ranks_and_threads(
    tar_folder: Path, beton_folder: Path, world_size: int, threads: int
) -> None:
    """Two epochs, compared with one rank's, one thread, from tars."""
    reference = open_loader(config(tar_folder, "webdataset"), 24)
    expected = [served(iter([batch])) for _ in range(2) for batch in reference]
    ranks = [open_loader(config(beton_folder, "ffcv", threads), 24, rank, world_size) for rank in range(world_size)]
    found: list[list[tuple[int, int, bytes]]] = []
    for _ in range(2):
        for batches in zip(*ranks, strict=True):
            placed = sorted(
                (int(position), sample)
                for batch in batches
                for position, sample in zip(batch.positions, served(iter([batch])), strict=True)
            )
            found.append([sample for _, sample in placed])
    assert found == expected


def test_evaluation_is_the_same_from_tar_and_beton(tar_folder: Path, beton_folder: Path) -> None:
    tar = open_loader(config(tar_folder, "webdataset"), 4, train=False)
    beton = open_loader(config(beton_folder, "ffcv"), 4, train=False)
    expected = served(iter(tar))
    assert len(expected) == 10
    assert served(iter(beton)) == expected


@pytest.mark.parametrize("consumed", [1, 3, 7])
def test_run_on_beton_resumes_exactly_with_another_number_of_ranks(beton_folder: Path, consumed: int) -> None:
    whole = served(iter(open_loader(config(beton_folder, "ffcv"), 4)))
    loader = open_loader(config(beton_folder, "ffcv", threads=2), 4)
    running = iter(loader)
    before = served(next(running) for _ in range(consumed))
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    ranks = [open_loader(config(beton_folder, "ffcv", threads=3), 4, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    after = [sample for batches in zip(*ranks, strict=True) for sample in served(iter(batches))]
    assert sorted(before + after) == sorted(whole)
    assert before == whole[: 4 * consumed]


def test_state_of_the_tars_is_refused_by_the_beton(tar_folder: Path, beton_folder: Path) -> None:
    state = open_loader(config(tar_folder, "webdataset"), 4).state_dict()
    with pytest.raises(DataError, match="the data set has changed"):
        open_loader(config(beton_folder, "ffcv"), 4).load_state_dict(state)


def test_same_source_gives_the_same_bytes_with_any_number_of_processes(
    tmp_path: Path, source_folder: Path, beton_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    options = ("--format", "ffcv", "--raw-fraction", "0.25")
    assert prepare(source_folder, out, *options, "--jobs", "2") == 3
    names = ("train.beton", "train.crc32", "val.beton", "val.crc32", "index.json", "left_out.jsonl", "prepare.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        assert (out / name).read_bytes() == (beton_folder / name).read_bytes()

    times = {name: (out / name).stat().st_mtime_ns for name in names}
    assert prepare(source_folder, out, *options) == 3
    assert "was complete already" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in names} == times

    (out / "val.beton").unlink()  # and what a killed run leaves behind
    (out / ".unfinished-val.beton-host-1").write_bytes(b"half")
    assert prepare(source_folder, out, *options) == 3
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        assert (out / name).read_bytes() == (beton_folder / name).read_bytes()

    assert prepare(source_folder, out, "--format", "ffcv", "--raw-fraction", "0.5") == 1
    assert "raw-fraction was 0.25, now 0.5" in capsys.readouterr().err


def test_finished_set_whose_source_changed_is_left_alone_and_named(
    tmp_path: Path, source_folder: Path, image_file: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "set"
    shutil.copytree(source_folder, source)
    assert prepare(source, out, "--format", "ffcv") == 3
    before = (out / "train.beton").read_bytes()
    path = source / "train" / "ant" / "0003.jpg"
    later = (out / "train.beton").stat().st_mtime + 10
    os.utime(path, (later, later))  # touched, and the same
    assert prepare(source, out, "--format", "ffcv") == 3
    path.write_bytes(image_file(999))
    os.utime(path, (later, later))
    assert prepare(source, out, "--format", "ffcv") == 1
    assert "has changed since that was finished (train/ant/0003.jpg)" in capsys.readouterr().err
    assert (out / "train.beton").read_bytes() == before


def test_changed_pixels_are_noticed_by_their_checksum(tmp_path: Path, beton_folder: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(beton_folder, folder)
    source = BetonSource(folder / "train.beton", CLASSES)
    number = next(number for number in range(len(source)) if kind(source.read(number)) == "pixels")
    content = bytearray((folder / "train.beton").read_bytes())
    content[content.index(np.asarray(source.read(number).image).tobytes()) + 1000] ^= 1
    (folder / "train.beton").write_bytes(content)
    with open_loader(config(folder, "ffcv"), 39) as loader, pytest.raises(DamagedSampleError, match="checksum differs"):
        loader.source.read(number)
    assert kind(BetonSource(folder / "train.beton", CLASSES).read(number)) == "pixels"  # nobody knows without index


def test_checksums_that_are_missing_or_of_another_file_are_refused(tmp_path: Path, beton_folder: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(beton_folder, folder)
    (folder / "train.crc32").write_bytes(bytes((folder / "train.crc32").stat().st_size))
    with pytest.raises(DataError, match=r"train\.crc32 is not the one that .*index\.json describes"):
        open_loader(config(folder, "ffcv"), 4)
    (folder / "train.crc32").unlink()
    with pytest.raises(DataError, match=r"train\.crc32 cannot be read: No such file"):
        open_loader(config(folder, "ffcv"), 4)


def test_index_of_another_file_is_refused(tmp_path: Path, beton_folder: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(beton_folder, folder)
    content = bytearray((folder / "train.beton").read_bytes())
    records = 24 + 2 * 1041
    content[records + 16] ^= 1  # the first label: 0, 1 or 2 becomes 1, 0 or 3
    (folder / "train.beton").write_bytes(content)
    with pytest.raises(DataError, match=r"is not the file that .*index.json describes|has the label 3"):
        open_loader(config(folder, "ffcv"), 4)


def test_beton_opened_as_tar_shards_says_which_backend_reads_it(beton_folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds .beton files, not tar shards: set data\.backend to ffcv"):
        open_loader(config(beton_folder, "webdataset"), 4)


def test_image_larger_than_a_page_makes_pages_larger(tmp_path: Path, image_file: Callable[..., bytes]) -> None:
    """The pixels of a PNG, of a few bytes, that take 12 MB; as JPEG it stays JPEG, whatever part shall be raw."""
    for name, format in (("a.png", "PNG"), ("b.jpg", "JPEG")):
        path = tmp_path / "source" / "train" / "ant" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2000, 2000), (9, 99, 199)).save(path, format)
    (path.parent / "c.jpg").write_bytes(image_file(1))
    out = tmp_path / "set"
    options = ("--splits", "train", "--format", "ffcv", "--raw-fraction", "1")
    assert prepare(tmp_path / "source", out, *options) == 0
    source = BetonSource(out / "train.beton", ("ant",))
    images = [source.read(number).image for number in range(3)]
    assert sorted(np.asarray(image).nbytes for image in images if not isinstance(image, bytes)) == [3600, 12_000_000]
    assert [len(image) < 10**6 for image in images if isinstance(image, bytes)] == [True]
    assert (out / "train.beton").read_bytes()[4:8] == (1 << 24).to_bytes(4, "little")


def test_full_disk_is_said_and_leaves_no_half_file(
    tmp_path: Path, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may have at most 5 MB, a page has 8: the system writes a part of it and then none."""
    out = tmp_path / "set"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        assert prepare(source_folder, out, "--format", "ffcv") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "The disk is full" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["prepare.json"]
    assert prepare(source_folder, out, "--format", "ffcv") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "ffcv", "--part", "1/2"), "--part does not apply"),
        (("--format", "ffcv", "--shard-size", "9"), "--shard-size does not apply"),
        (("--raw-fraction", "0.5"), "--raw-fraction is for --format ffcv"),
        (("--format", "ffcv", "--raw-fraction", "1.5"), "no part of the images"),
    ],
)
def test_options_that_do_not_fit_the_format_are_wrong_usage(
    tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        prepare(tmp_path, tmp_path / "set", *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_reading_needs_no_ffcv(beton_folder: Path) -> None:
    """In a process in which neither ffcv nor numba can be imported."""
    program = (
        "import sys; sys.modules['ffcv'] = sys.modules['numba'] = None\n"
        "from data_pipeline import DataConfig, build_loader\n"
        f"config = DataConfig(backend='ffcv', path={str(beton_folder)!r}, num_classes=3, image_size=20)\n"
        "loader = build_loader(config, 'train', train=True, global_batch_size=4, rank=0, world_size=1, seed=0)\n"
        "print(sum(len(batch.ids) for batch in loader))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert result.stdout == "36\n", result.stderr
