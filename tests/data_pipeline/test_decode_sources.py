"""The same pixels from a set of shards with restart rows as from one without, through the whole loader."""

from __future__ import annotations

import shutil
from pathlib import Path

import jpegs
import numpy as np
import pytest

from data_pipeline.config import AugmentConfig, DataConfig, Decoding
from data_pipeline.jpeg import parse_header
from data_pipeline.loader import build_loader
from data_pipeline.restart_rows import insert
from data_pipeline.shards import set_index
from data_pipeline.shards.writer import EncodedSample, write_shard

pytest.importorskip("simplejpeg")
if shutil.which("jpegtran") is None:
    pytest.skip("jpegtran is not installed (package libjpeg-turbo-progs)", allow_module_level=True)

SIZE = 32


def _write(folder: Path, rows: bool) -> Path:
    """A set of one shard: JPEGs of all kinds, and larger ones of which parts are decoded at a reduced size."""
    (folder / "train").mkdir(parents=True)
    samples = []
    large = [jpegs.encoded(jpegs.textured(301, 411, seed), subsampling=seed) for seed in range(3)]
    for number, data in enumerate([*map(jpegs.of_kind, jpegs.KINDS), *large]):
        image, offsets = insert(data) if rows else (data, ())
        header = parse_header(image)
        size = (header.width, header.height)
        samples.append(
            EncodedSample(
                f"k{number}", "jpg", image, number % 3, *size, "other", header.orientation, restart_rows=offsets
            )
        )
    written = write_shard(folder / "train" / "s.tar", samples)
    columns = [np.array([value]) for value in (written.samples, written.tar_bytes, written.index_bytes)]
    split = set_index.SplitIndex(("s.tar",), *columns, (written.sha256,), 0)
    (folder / "index.json").write_bytes(set_index.to_bytes(set_index.SetIndex(("a", "b", "c"), {"train": split})))
    return folder


def _served(folder: Path, decoding: Decoding, train: bool, threads: int) -> dict[int, np.ndarray]:
    config = DataConfig(
        path=str(folder),
        num_classes=3,
        image_size=SIZE,
        num_threads=threads,
        decoding=decoding,
        val_split="train",
        augment=AugmentConfig(scale=(0.05, 1.0)),
    )
    served = {}
    with build_loader(config, "train", train=train, global_batch_size=7, rank=0, world_size=1, seed=3) as loader:
        for batch in loader:
            assert batch.valid.sum() == (batch.ids >= 0).sum()
            served |= {int(key): image.numpy().copy() for key, image in zip(batch.ids, batch.images, strict=True)}
    served.pop(-1, None)
    return served


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("decoding", ["fast", "exact"])
def test_restart_rows_change_no_pixel_of_what_is_served(tmp_path: Path, decoding: Decoding, train: bool) -> None:
    plain, rows = _write(tmp_path / "plain", rows=False), _write(tmp_path / "rows", rows=True)
    expected = _served(plain, decoding, train, threads=0)
    assert len(expected) >= len(jpegs.KINDS) - 4
    for folder, threads in [(plain, 3), (rows, 0), (rows, 4)]:
        found = _served(folder, decoding, train, threads)
        assert found.keys() == expected.keys()
        for key, image in found.items():
            np.testing.assert_array_equal(image, expected[key], err_msg=f"sample {key}")
    assert all(image.std() > 5 for image in expected.values())


def test_a_damaged_row_is_reported_with_shard_and_key_and_only_where_it_is_needed(tmp_path: Path) -> None:
    folder = _write(tmp_path / "rows", rows=True)
    sound = _served(folder, "exact", train=False, threads=0)
    path = folder / "train" / "s.tar"
    data = bytearray(path.read_bytes())
    image, offsets = insert(jpegs.of_kind("4:2:0"))
    place = data.index(image) + offsets[4] + 3
    data[place] ^= 0x10
    path.write_bytes(data)
    config = DataConfig(path=str(folder), num_classes=3, image_size=SIZE, val_split="train", num_threads=2)
    notes = tmp_path / "quarantine.jsonl"
    build = {"global_batch_size": 7, "rank": 0, "world_size": 1, "seed": 0, "quarantine": notes}
    with build_loader(config, "train", train=False, **build) as loader:
        invalid = [int(key) for batch in loader for key in batch.ids[~batch.valid] if key >= 0]
    assert invalid == [jpegs.KINDS.index("4:2:0")]
    assert "train/s.tar" in notes.read_text()
    assert "checksum of a restart row differs" in notes.read_text()
    assert len(sound) == len(jpegs.KINDS) + 3
