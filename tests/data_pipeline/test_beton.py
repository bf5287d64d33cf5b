"""Reading .beton files, made here byte by byte, so that neither the reader nor the ffcv package has a say in them."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import DataConfig, DataError, build_loader
from data_pipeline.decode import DecodeError, decode_image
from data_pipeline.shards.beton import BetonSource, open_beton
from data_pipeline.shards.source import DamagedSampleError, Source

PAGE = 4096
FLOAT, INT, IMAGE, BYTES, CUSTOM = 0, 1, 2, 3, 255
CLASSES = ("ant", "bee", "cat")
HEADER_BYTES, FIELD_BYTES, ENTRY_BYTES = 24, 1041, 24
RECORD_BYTES = 24
"""An image takes 13 bytes, and the label after it begins at a multiple of 8."""


@dataclass(frozen=True)
class Beton:
    """What a file says; `labels` and `images` have one entry per sample."""

    images: Sequence[bytes | np.ndarray]
    labels: Sequence[int]
    fields: tuple[tuple[int, str], ...] = ((IMAGE, "image"), (INT, "label"))
    order: Sequence[int] | None = None
    """In which samples lie in the pages; else one after the other. The table goes by their numbers."""

    def to_bytes(self) -> bytes:
        """A file with at most one image and one label, and 8 bytes for every other field."""
        metadata_at = HEADER_BYTES + FIELD_BYTES * len(self.fields)
        start = -(-(metadata_at + RECORD_BYTES * len(self.fields) * len(self.images)) // PAGE) * PAGE
        pages, table = bytearray(), []
        for index in self.order or range(len(self.images)):
            image = self.images[index]
            data = image.tobytes() if isinstance(image, np.ndarray) else image
            if len(pages) % PAGE + len(data) > PAGE:
                pages += bytes(-len(pages) % PAGE)
            table.append((index, start + len(pages), len(data)))
            pages += data
        pages += bytes(-len(pages) % PAGE)
        offsets = {index: offset for index, offset, _ in table}
        head = struct.pack("<HHIQQ", 2, len(self.fields), PAGE, len(self.images), start + len(pages))
        head += b"".join(struct.pack("<B16s1024s", kind, name.encode(), b"") for kind, name in self.fields)
        for index in range(len(self.images)):
            head += self.record(index, offsets[index])
        entries = b"".join(struct.pack("<QQQ", *entry) for entry in sorted(table))
        return head.ljust(start, b"\0") + pages + entries

    def record(self, index: int, offset: int) -> bytes:
        image, packed = self.images[index], b""
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else decode_image(image).shape[:2]
        for kind, _ in self.fields:
            if kind != IMAGE:
                packed += bytes(-len(packed) % 8)
            packed += {
                IMAGE: struct.pack("<BHHQ", isinstance(image, np.ndarray), width, height, offset),
                INT: struct.pack("<q", self.labels[index]),
                FLOAT: struct.pack("<d", 0.5),
                CUSTOM: bytes(8),
            }[kind]
        return packed + bytes(-len(packed) % 8)


@pytest.fixture(scope="session")
def beton(image_file: Callable[..., bytes]) -> Beton:
    """Nine images, of which numbers 2, 5 and 8 are pixels of 16x21."""
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (9, 16, 21, 3), dtype=np.uint8)
    images = [pixels[n] if n % 3 == 2 else image_file(n, width=30 + n, height=25) for n in range(9)]
    return Beton(images, [n % 3 for n in range(9)])


def opened(folder: Path, content: bytes | Beton, classes: tuple[str, ...] = CLASSES) -> BetonSource:
    path = folder / "train.beton"
    path.write_bytes(content.to_bytes() if isinstance(content, Beton) else content)
    return BetonSource(path, classes)


def config(folder: Path, num_classes: int = 3) -> DataConfig:
    return DataConfig(backend="ffcv", path=str(folder), num_classes=num_classes, image_size=16, num_threads=0)


def test_samples_come_as_they_are_stored_jpeg_as_bytes_and_pixels_as_arrays(tmp_path: Path, beton: Beton) -> None:
    source = opened(tmp_path, beton)
    assert isinstance(source, Source)
    assert len(source) == 9
    for index, (image, label) in enumerate(zip(beton.images, beton.labels, strict=True)):
        sample = source.read(index)
        assert (sample.key, sample.label, sample.shard) == (str(index), label, "train.beton")
        assert type(sample.image) is type(image)
        assert np.array_equal(np.asarray(sample.image), np.asarray(image))
    with pytest.raises(IndexError):
        source.read(9)


def test_samples_are_found_where_several_writers_mixed_pages_and_table(tmp_path: Path, beton: Beton) -> None:
    mixed = replace(beton, order=[7, 0, 3, 8, 1, 2, 6, 5, 4])
    source = opened(tmp_path, mixed)
    for index, image in enumerate(beton.images):
        assert np.array_equal(np.asarray(source.read(index).image), np.asarray(image))


@pytest.mark.parametrize(
    ("fields", "labels_at"),
    [
        (((INT, "label"), (IMAGE, "image")), 0),
        (((FLOAT, "weight"), (IMAGE, "picture"), (INT, "class")), 2),
        (((IMAGE, "image"), (INT, "label"), (FLOAT, "score")), 1),
    ],
)
def test_image_and_label_are_found_among_other_fields(
    tmp_path: Path, beton: Beton, fields: tuple[tuple[int, str], ...], labels_at: int
) -> None:
    assert fields[labels_at][0] == INT
    source = opened(tmp_path, replace(beton, fields=fields))
    assert [source.read(index).label for index in range(9)] == list(beton.labels)
    assert np.array_equal(np.asarray(source.read(4).image), np.asarray(beton.images[4]))


def test_field_named_label_is_the_label_and_not_the_first_integer(tmp_path: Path, beton: Beton) -> None:
    fields = ((INT, "other"), (IMAGE, "image"), (INT, "label"))
    content = bytearray(replace(beton, fields=fields).to_bytes())
    metadata_at = HEADER_BYTES + 3 * FIELD_BYTES
    for index in range(9):  # both hold the label: make the first one something else
        struct.pack_into("<q", content, metadata_at + 32 * index, -7)
    source = opened(tmp_path, bytes(content))
    assert [source.read(index).label for index in range(9)] == list(beton.labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((INT, "label"),), r"no field of images \(RGBImageField\); its fields: label \(IntField\)"),
        (((IMAGE, "image"), (FLOAT, "label")), r"no field of labels \(IntField\); its fields: image .*label \(Float"),
        (((IMAGE, "image"), (INT, "label"), (CUSTOM, "mine")), "field 'mine' is a custom class"),
        (((IMAGE, "image"), (77, "odd")), "field 'odd' is of the unknown type 77"),
    ],
)
def test_file_without_usable_fields_is_refused(
    tmp_path: Path, beton: Beton, fields: tuple[tuple[int, str], ...], message: str
) -> None:
    content = bytearray(replace(beton, fields=((IMAGE, "image"), (INT, "label"), (FLOAT, "x"))).to_bytes())
    struct.pack_into("<H", content, 2, len(fields))
    for place, (kind, name) in enumerate(fields):
        struct.pack_into("<B16s", content, HEADER_BYTES + place * FIELD_BYTES, kind, name.encode())
    with pytest.raises(DataError, match=f"train.beton cannot be used: .*{message}"):
        opened(tmp_path, bytes(content))


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_label_that_is_no_class_is_refused(tmp_path: Path, beton: Beton, label: int) -> None:
    with pytest.raises(DataError, match=rf"train.beton has the label {label}, and the configuration says 3 classes"):
        opened(tmp_path, replace(beton, labels=[0] * 8 + [label]))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, struct.pack("<H", 1), "no .beton of format version 2"),
        (2, struct.pack("<H", 60000), "60000 fields"),
        (4, struct.pack("<I", 3000), "page size of 3000 is no power of 2"),
        (8, struct.pack("<Q", 2**62), "cut short or its header is damaged"),
        (8, struct.pack("<Q", 2**64 - 1), "cut short or its header is damaged"),
        (16, struct.pack("<Q", 0), "never finished"),
        (16, struct.pack("<Q", 2**63), "cut short or its header is damaged"),
    ],
)
def test_impossible_header_is_refused_before_anything_is_allocated(
    tmp_path: Path, beton: Beton, offset: int, value: bytes, message: str
) -> None:
    content = bytearray(beton.to_bytes())
    content[offset : offset + len(value)] = value
    with pytest.raises(DataError, match=message):
        opened(tmp_path, bytes(content))


def test_cut_off_file_is_refused_wherever_it_was_cut(tmp_path: Path, beton: Beton) -> None:
    content = beton.to_bytes()
    for size in (0, 5, HEADER_BYTES, 1500, 2200, PAGE + 1, len(content) - ENTRY_BYTES, len(content) - 1):
        with pytest.raises(DataError, match=r"train\.beton cannot be used"):
            opened(tmp_path, content[:size])


@pytest.mark.parametrize(
    ("field", "offset", "value", "message"),
    [
        ("mode", 0, b"\x07", "stored in an unknown way"),
        ("mode", 0, b"\x01", "pixels do not take"),
        ("offset", 5, struct.pack("<Q", 2**64 - 1), "not where its metadata says"),
        ("offset", 5, struct.pack("<Q", 100), "not where its metadata says"),
    ],
)
def test_sample_that_contradicts_itself_is_damaged_and_others_are_not(
    tmp_path: Path, beton: Beton, field: str, offset: int, value: bytes, message: str
) -> None:
    content = bytearray(beton.to_bytes())
    at = HEADER_BYTES + 2 * FIELD_BYTES + 4 * RECORD_BYTES + offset
    content[at : at + len(value)] = value
    source = opened(tmp_path, bytes(content))
    with pytest.raises(DamagedSampleError, match=f"'4' in shard train.beton: .*{message}"):
        source.read(4)
    assert source.read(3).label == 0
    assert source.read(5).label == 2


@pytest.mark.parametrize("size", [2**64 - 1, 2**40, PAGE + 1, 2**32 + 16 * 21 * 3])
def test_size_in_the_table_that_leaves_its_page_is_damage(tmp_path: Path, beton: Beton, size: int) -> None:
    """The last of the sizes is right in its lower 32 bits."""
    content = bytearray(beton.to_bytes())
    struct.pack_into("<Q", content, len(content) - ENTRY_BYTES + 16, size)
    source = opened(tmp_path, bytes(content))
    with pytest.raises(DamagedSampleError, match="'8'"):
        source.read(8)
    assert source.read(7).label == 1


def test_record_that_points_at_another_sample_is_damage(tmp_path: Path, beton: Beton) -> None:
    content = bytearray(beton.to_bytes())
    records = HEADER_BYTES + 2 * FIELD_BYTES
    content[records + 5 : records + 13] = content[records + RECORD_BYTES + 5 : records + RECORD_BYTES + 13]
    source = opened(tmp_path, bytes(content))
    with pytest.raises(DamagedSampleError, match="'0'"):
        source.read(0)
    assert source.read(1).label == 1


@pytest.mark.parametrize("offset", [0, 2000])
def test_image_outside_of_the_pages_is_damage_though_the_table_agrees(
    tmp_path: Path, beton: Beton, offset: int
) -> None:
    content = bytearray(beton.to_bytes())
    struct.pack_into("<Q", content, HEADER_BYTES + 2 * FIELD_BYTES + 5, offset)
    struct.pack_into("<Q", content, len(content) - 9 * ENTRY_BYTES + 8, offset)
    with pytest.raises(DamagedSampleError, match=r"'0' .*outside of the file's data"):
        opened(tmp_path, bytes(content)).read(0)


def test_label_that_changes_to_no_class_while_the_file_is_open_is_damage(tmp_path: Path, beton: Beton) -> None:
    source = opened(tmp_path, beton)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(HEADER_BYTES + 2 * FIELD_BYTES + 16)
        file.write(struct.pack("<q", 3))
    with pytest.raises(DamagedSampleError, match=r"'0' .*label 3 is none of the 3 classes"):
        source.read(0)


@pytest.mark.parametrize("index", [7, 8])
def test_file_that_is_cut_off_while_open_damages_samples_and_crashes_nothing(
    tmp_path: Path, beton: Beton, index: int
) -> None:
    source = opened(tmp_path, beton)
    os.truncate(tmp_path / "train.beton", PAGE + 10)
    with pytest.raises(DamagedSampleError, match=f"'{index}' .*cut short"):
        source.read(index)
    os.truncate(tmp_path / "train.beton", 100)
    with pytest.raises(DamagedSampleError, match="cut short"):
        source.read(0)


def test_loader_puts_another_image_in_the_place_of_a_damaged_jpeg(tmp_path: Path, beton: Beton) -> None:
    content = bytearray(beton.to_bytes())
    table = len(content) - 9 * ENTRY_BYTES
    _, offset, size = struct.unpack_from("<QQQ", content, table + 3 * ENTRY_BYTES)
    content[offset + size - 200 : offset + size] = bytes(200)
    opened(tmp_path, bytes(content)).close()
    arguments = {"global_batch_size": 9, "rank": 0, "world_size": 1, "seed": 0}
    with build_loader(config(tmp_path), "train", train=True, **arguments) as loader:
        (batch,) = loader
        assert sorted(batch.ids.tolist()) == list(range(9))
        labels = dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
        assert labels == {n: n % 3 for n in range(9)} | {3: 1}  # the label is that of the substitute, sample 4
        assert loader.stats()["bad_samples"] == 1
    with build_loader(config(tmp_path), "train", train=False, **arguments) as loader:
        (batch,) = loader
        assert batch.valid.tolist() == [n != 3 for n in range(9)]


def test_fingerprint_tells_labels_places_and_sizes_apart_and_repeats(tmp_path: Path, beton: Beton) -> None:
    def fingerprint(name: str, content: Beton) -> str:
        (tmp_path / name).mkdir()
        return opened(tmp_path / name, content).fingerprint

    first = fingerprint("a", beton)
    assert fingerprint("b", beton) == first
    assert fingerprint("c", replace(beton, labels=[*beton.labels[:-1], 0])) != first
    assert fingerprint("d", replace(beton, order=[1, 0, *range(2, 9)])) != first
    assert fingerprint("e", replace(beton, images=[beton.images[1], *beton.images[1:]])) != first


def test_block_order_shuffles_runs_that_lie_together(tmp_path: Path) -> None:
    """Three images fill a page: they are written as pages 0, 2, 1, so that each page is a run."""
    images = list(np.zeros((9, 20, 22, 3), np.uint8))
    order = [0, 1, 2, 6, 7, 8, 3, 4, 5]
    assert opened(tmp_path, Beton(images, [0] * 9, order=order)).shard_sizes.tolist() == [3, 3, 3]
    assert opened(tmp_path, Beton(images, [0] * 9)).shard_sizes.tolist() == [9]
    with build_loader(
        replace(config(tmp_path), order="block", block_shards=1), "train",
        train=True, global_batch_size=9, rank=0, world_size=1, seed=0,
    ) as loader:  # fmt: skip
        assert sorted(next(iter(loader)).ids.tolist()) == list(range(9))


def test_threads_and_forked_processes_read_the_same(tmp_path: Path, beton: Beton) -> None:
    source = opened(tmp_path, beton)
    expected = [np.asarray(image).tobytes() for image in beton.images]

    def read(index: int) -> bytes:
        return np.asarray(source.read(index % 9).image).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(900))) == expected * 100
        child = os.fork()
        if child == 0:
            os._exit(0 if [read(index) for index in range(9)] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [read(index) for index in range(9)] == expected


def test_closing_closes_the_file_and_ends_reading(tmp_path: Path, beton: Beton) -> None:
    before = len(os.listdir("/proc/self/fd"))
    source = opened(tmp_path, beton)
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        source.read(0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "No data set was named"),
        ("s3://bucket/set", "s3://bucket/set is remote, and .beton files are read from a local folder only"),
        ("nowhere", "There is no folder nowhere"),
    ],
)
def test_path_without_beton_files_is_refused(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_beton(DataConfig(backend="ffcv", path=path), "train")


def test_foreign_folder_has_numbered_classes_and_names_its_splits(tmp_path: Path, beton: Beton) -> None:
    opened(tmp_path, beton).close()
    source = open_beton(config(tmp_path, num_classes=4), "train")
    assert source.class_names == ("class_0", "class_1", "class_2", "class_3")
    (tmp_path / "val.beton").mkdir()
    with pytest.raises(DataError, match=r"has no val.beton; its splits: train"):
        open_beton(config(tmp_path), "val")


def test_folder_of_tar_shards_says_which_backend_reads_it(shard_folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds tar shards: set data\.backend to webdataset"):
        open_beton(config(shard_folder), "train")


def read_everything(path: Path) -> None:
    """Opens a file and decodes whatever it gives; documented errors are fine."""
    try:
        source = BetonSource(path, CLASSES)
    except DataError:
        return
    for index in range(min(len(source), 12)):
        try:
            assert decode_image(source.read(index).image).dtype == np.uint8
        except (DamagedSampleError, DecodeError):
            continue
    source.close()


EXTREMES = st.sampled_from([0, 1, 2, 3, 23, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_leads_to_another_error_or_much_memory(
    tmp_path_factory: pytest.TempPathFactory, beton: Beton, data: st.DataObject
) -> None:
    content = bytearray(beton.to_bytes())
    tables = [*range(HEADER_BYTES + 2 * FIELD_BYTES + 9 * RECORD_BYTES), *range(len(content) - 216, len(content))]
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        at = data.draw(st.sampled_from(tables) | st.integers(0, len(content) - 1), "at")
        value = data.draw(EXTREMES.map(lambda number: struct.pack("<Q", number)) | st.binary(max_size=9), "value")
        content[at : at + len(value)] = value
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)), "end")
    path = tmp_path_factory.getbasetemp() / "fuzzed.beton"
    path.write_bytes(content[:end])
    tracemalloc.start()
    try:
        read_everything(path)
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()


def test_many_samples_open_with_few_bytes_each(tmp_path: Path) -> None:
    count = 200_000
    path = tmp_path / "train.beton"
    records = np.zeros(count, np.dtype({"names": ["offset", "label"], "formats": ["<u8", "<i8"], "offsets": [5, 16]}))
    records["label"] = np.arange(count) % 3
    start = -(-(HEADER_BYTES + 2 * FIELD_BYTES + records.nbytes) // PAGE) * PAGE
    records["offset"] = start + np.arange(count) * 16
    table = np.stack([np.arange(count), records["offset"], np.full(count, 16)], axis=1).astype("<u8")
    with open(path, "wb") as file:
        file.write(struct.pack("<HHIQQ", 2, 2, PAGE, count, start + 16 * count))
        file.write(struct.pack("<B16s1024s", IMAGE, b"image", b"") + struct.pack("<B16s1024s", INT, b"label", b""))
        file.write(records.tobytes())
        file.seek(start + 16 * count)
        file.write(table.tobytes())
    tracemalloc.start()
    try:
        source = BetonSource(path, CLASSES)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert kept < 5 * count
    with pytest.raises(DamagedSampleError, match=f"'{count - 1}' .*is none"):  # its 16 zeros are no JPEG
        source.read(count - 1)
