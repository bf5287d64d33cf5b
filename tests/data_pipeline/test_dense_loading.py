"""What holds for both dense tasks: order, resume, ranks, threads, damage."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import (
    contents,
    detection_config,
    detection_set,
    jpeg,
    png,
    segmentation_config,
    segmentation_set,
)
from PIL import Image
from servers import serving

from data_pipeline.batch import Batch
from data_pipeline.config import AugmentConfig, CacheConfig, DataConfig, Kind
from data_pipeline.dense_geometry import fitted
from data_pipeline.loader import Loader, build_loader, open_split
from data_pipeline.order import Batching
from data_pipeline.prepare import main as prepare
from data_pipeline.shards import shard_index
from data_pipeline.shards.reader import open_source
from data_pipeline.shards.shard_index import load as load_index
from data_pipeline.shards.source import DataError, RawSample

KINDS: tuple[Kind, ...] = ("segmentation", "detection")
BATCH = 4


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, DataConfig]:
    segmentation = segmentation_config(segmentation_set(tmp_path_factory.mktemp("seg")), photometric_distortion=True)
    return {
        "segmentation": segmentation,
        "detection": detection_config(detection_set(tmp_path_factory.mktemp("det"))),
    }


def _open(config: DataConfig, kind: Kind, rank: int = 0, world_size: int = 1, **more: Any) -> Loader:
    settings = {"train": True, "global_batch_size": BATCH, "seed": 11} | more
    split = "train" if settings["train"] else "val"
    return build_loader(config, split, kind=kind, rank=rank, world_size=world_size, **settings)


def _serve(loader: Loader, count: int) -> list[Batch]:
    served: list[Batch] = []
    while len(served) < count:
        served += itertools.islice(loader, count - len(served))
    return served


def _serve_ranks(
    config: DataConfig, kind: Kind, world_size: int, count: int, state: dict[str, Any] | None = None
) -> tuple[list[list[Any]], dict[str, Any]]:
    """What each of `count` global batches holds, by position, put together from all ranks; and the state after it."""
    parts, states = [], []
    for rank in range(world_size):
        with _open(config, kind, rank, world_size) as loader:
            if state is not None:
                loader.load_state_dict(state)
            parts.append([contents(batch) for batch in _serve(loader, count)])
            states.append(json.loads(json.dumps(loader.state_dict())))
    assert all(found == states[0] for found in states)
    whole = [sorted(itertools.chain(*batch), key=lambda place: place[0]) for batch in zip(*parts, strict=True)]
    return whole, states[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_other_ranks_with_other_threads_serves_the_same_pixels_and_targets(configs, kind) -> None:
    config = configs[kind]
    uninterrupted, _ = _serve_ranks(config, kind, 1, 9)  # two epochs and more: 3 batches each, or 4
    assert len({repr(batch) for batch in uninterrupted}) == 9
    served: list[Any] = []
    state = None
    for world_size, num_threads, count in ((1, 0, 2), (4, 3, 2), (2, 1, 5)):
        part, state = _serve_ranks(replace(config, num_threads=num_threads), kind, world_size, count, state)
        served += part
    assert served == uninterrupted


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_with_the_last_batch_goes_on_with_the_next_epoch(configs, kind) -> None:
    with _open(configs[kind], kind) as loader:
        uninterrupted = [contents(batch) for batch in _serve(loader, len(loader) + 2)]
    with _open(configs[kind], kind) as loader:
        _serve(loader, len(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    with _open(configs[kind], kind) as loader:
        loader.load_state_dict(state)
        after = [contents(batch) for batch in _serve(loader, 2)]
    assert after == uninterrupted[-2:]


def test_a_batch_of_another_size_goes_on_for_segmentation_and_is_refused_for_detection(configs) -> None:
    with _open(configs["segmentation"], "segmentation") as loader:
        uninterrupted = [contents(batch) for batch in loader]
        loader.set_epoch(0)
        _serve(loader, 1)
        state = loader.state_dict()
    with _open(configs["segmentation"], "segmentation", global_batch_size=8) as loader:
        loader.load_state_dict(state)
        rest = [place[1:] for batch in loader for place in contents(batch)]
    assert rest == [place[1:] for batch in uninterrupted[1:] for place in batch]
    with _open(configs["detection"], "detection") as loader:
        state = loader.state_dict()
    assert state["order"] == "global/aspect B 4 [0.7, 1.0, 1.4]"
    with (
        _open(configs["detection"], "detection", global_batch_size=2) as loader,
        pytest.raises(DataError, match=r"order is 'global/aspect B 2 .* was 'global/aspect B 4 .*Restore the former"),
    ):
        loader.load_state_dict(state)
    with (
        _open(detection_config(Path(configs["detection"].path), aspect_bounds=()), "detection") as loader,
        pytest.raises(DataError, match="the order of samples would change"),
    ):
        loader.load_state_dict(state)


def test_detection_shows_each_image_once_and_batches_of_one_range_share_a_canvas(configs) -> None:
    config = configs["detection"]
    sizes = open_source(config, "train", "detection").sizes()
    for epoch in range(2):
        with _open(config, "detection") as loader:
            loader.set_epoch(epoch)
            batches = list(loader)
        ids = [number for batch in batches for number in batch.ids.tolist()]
        assert len(set(ids)) == len(ids) == 16
        aspects = [(sizes[batch.ids, 1] / sizes[batch.ids, 0]).tolist() for batch in batches]
        ranges = [{int(np.searchsorted((0.7, 1.0, 1.4), aspect, side="right")) for aspect in one} for one in aspects]
        assert sorted(len(found) == 1 for found in ranges) == [False, True, True, True], "4, 6 and 4 of three ranges"
        assert {batch.short_side for batch in batches} <= {32, 48}
        for batch in batches:
            for number, size in zip(batch.ids.tolist(), batch.sizes, strict=True):
                assert size == fitted(tuple(sizes[number].tolist()), batch.short_side, 80)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_serves_each_image_once_at_its_own_size_on_any_number_of_ranks(configs, kind) -> None:
    served = {}
    for world_size, num_threads in ((1, 0), (2, 2)):
        config, found = replace(configs[kind], num_threads=num_threads), []
        for rank in range(world_size):
            with _open(config, kind, rank, world_size, train=False) as loader:
                batches = list(loader)
            assert len(batches) == 2
            found += [place for batch in batches for place in contents(batch)]
        served[world_size] = sorted((place[1:] for place in found if place[2]), key=lambda place: place[0])
        assert len(found) == 8
    assert served[1] == served[2]
    assert [place[0] for place in served[1]] == [0, 1, 2, 3, 4]


def test_evaluation_of_segmentation_gives_classes_at_the_stored_size(configs) -> None:
    with _open(configs["segmentation"], "segmentation", train=False) as loader:
        first, second = loader
    for image, size, target in zip(first.images, first.sizes, first.targets, strict=True):
        assert tuple(image.shape) == (*size, 3)
        assert target.shape == size
        assert set(np.unique(target)) == {0, 1, 2, 3, 255}
        assert np.array_equal(image[:, :, 0].numpy() == 250, target == 255)
    assert second.valid.tolist() == [True, False, False, False]
    assert second.targets[1:] == [None] * 3
    assert second.sizes[1:] == [(64, 64)] * 3


@pytest.mark.parametrize("train", [True, False])
def test_images_decoded_into_reused_memory_stay_what_they_were(tmp_path: Path, train: bool) -> None:
    """JPEGs, which a thread decodes into the same memory one after another."""
    config = segmentation_config(segmentation_set(tmp_path, val=5, encoded=jpeg))
    served = []
    for global_batch_size in (4, 1):
        with _open(config, "segmentation", train=train, global_batch_size=global_batch_size) as loader:
            # alone in its batch, an image is looked at before the next is decoded
            places = [place[1:] for batch in loader for place in contents(batch)]
        served.append([place for place in places if place[1]])
    assert served[0] == served[1]
    assert len({place[3] for place in served[0]}) == len(served[0]) == (12 if train else 5)


class _Changed:
    """A source whose targets are changed on the way, as if they had been written so."""

    def __init__(self, source: Any, change: Callable[[int, bytes], bytes | None]) -> None:
        self._source, self._change = source, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> RawSample:
        sample = self._source.read(index)
        return replace(sample, target=self._change(index, sample.target))


WRONG: dict[str, tuple[Kind, Callable[[int, bytes], bytes | None], str]] = {
    "mask of another size": (
        "segmentation",
        lambda index, data: png(np.zeros((9, 9), np.uint8)) if index == 3 else data,
        "the mask is 9x9 and the image",
    ),
    "no annotations": ("detection", lambda index, data: b"[" if index == 3 else data, "the annotations are damaged"),
    "no target": ("detection", lambda index, data: None if index == 3 else data, "it has no target"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_sample_with_a_wrong_target_is_replaced_in_training_and_left_out_in_evaluation(
    configs, case: str, tmp_path: Path
) -> None:
    kind, change, reason = WRONG[case]
    config, listed = configs[kind], tmp_path / "quarantine.jsonl"

    def load(train: bool, **more: Any) -> Loader:
        source = _Changed(open_split(config, "train" if train else "val", kind), change)
        batching = Batching(BATCH, tail="drop" if train else "mask")
        return Loader(source, config, batching, train=train, seed=11, kind=kind, **more)

    with _open(config, kind) as sound, load(True, quarantine=listed) as wrong:
        expected = [place for batch in sound for place in contents(batch)]
        found = [place for batch in wrong for place in contents(batch)]
        assert wrong.stats()["bad_samples"] == 1
    assert [place[1] for place in expected] == [place[1] for place in found]
    different = [one[1] for one, other in zip(expected, found, strict=True) if one != other]
    assert different == [3]
    assert all(place[5] is not None for place in found)
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert reason in entry["reason"]
    assert entry["sample"] == 3
    with load(False) as loader:
        places = [place for batch in loader for place in contents(batch)]
    assert [place[2] for place in places] == [True, True, True, False, True, False, False, False]
    assert (places[3][3], places[3][5]) == ((64, 64), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_of_a_target_is_found_by_its_checksum(configs, kind, tmp_path: Path, flip) -> None:
    folder = shutil.copytree(configs[kind].path, tmp_path / "copy")
    index = load_index(folder / "val" / "shard-000000.idx")
    record = index.records[1]
    flip(folder / "val" / "shard-000000.tar", int(record["offset"] + record["size"] + record["target_gap"]) + 40)
    with _open(replace(configs[kind], path=str(folder)), kind, train=False, quarantine=tmp_path / "found") as loader:
        batch = next(iter(loader))
    assert batch.valid.tolist() == [True, False, True, True]
    assert "the target's bytes were changed" in (tmp_path / "found").read_text()


def test_the_stand_in_of_another_shape_becomes_as_small_as_the_canvas(tmp_path: Path) -> None:
    """All images are wide but one, which is tall and stands in for a wide one."""
    config = detection_config(
        detection_set(tmp_path, [(20, 60)] * 8 + [(60, 20)]), short_sides=(32,), long_side=320, aspect_bounds=(1.0,)
    )
    source = open_split(config, "train", "detection")
    sizes = source.sizes()  # type: ignore[attr-defined]
    tall = int(np.flatnonzero(sizes[:, 0] == 60)[0])
    lost = (tall - 1) % 9
    changed = _Changed(source, lambda index, data: None if index == lost else data)
    with Loader(changed, config, Batching(4), train=True, seed=1, kind="detection") as loader:
        places = [
            place for batch in loader for place in zip(batch.ids.tolist(), batch.images, batch.sizes, strict=True)
        ]
    shapes = {number: (tuple(image.shape[:2]), size) for number, image, size in places}
    assert {shape for number, shape in shapes.items() if number != lost} == {((32, 96), (32, 96))}
    assert shapes[lost] == ((32, 96), (32, 11))  # 20 of 60 columns, at 32 of 60 rows: 10.67


def test_sizes_are_those_of_upright_images(tmp_path: Path) -> None:
    (tmp_path / "source" / "images" / "train").mkdir(parents=True)
    (tmp_path / "source" / "annotations" / "train").mkdir(parents=True)
    upright = {}
    for number, orientation in enumerate((1, 3, 6, 8)):
        image, exif = Image.new("RGB", (40 + number, 30)), Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "source" / "images" / "train" / f"{number}.jpg", exif=exif)
        size = (30, 40 + number) if orientation < 5 else (40 + number, 30)
        upright[str(number)] = size
        (tmp_path / "source" / "annotations" / "train" / f"{number}.png").write_bytes(png(np.zeros(size, np.uint8)))
    command = ["segmentation", "--src", str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--splits", "train"]
    assert prepare([*command, "--class-names", "a,b", "--shard-size", "3", "--jobs", "1"]) == 0
    source = open_source(DataConfig(path=str(tmp_path / "set"), num_classes=2), "train", "segmentation")
    sizes = source.sizes()
    assert (sizes.shape, sizes.dtype) == ((4, 2), np.int32)
    assert {source.read(number).key: tuple(size) for number, size in enumerate(sizes.tolist())} == upright


def test_sizes_of_a_remote_set_are_read_from_its_indexes_alone(configs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    config = configs["detection"]
    with serving(Path(config.path)) as server:
        cache = CacheConfig(folder=str(tmp_path / "cache"))
        with contextlib.closing(
            open_source(replace(config, path=server.url, cache=cache), "train", "detection")
        ) as source:
            sizes = source.sizes()
    assert sizes.tolist() == open_source(config, "train", "detection").sizes().tolist()
    fetched = sorted(path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix in (".idx", ".tar"))
    assert fetched == [".idx"] * 4


def test_the_index_of_another_shard_is_refused_when_sizes_are_read(configs, tmp_path: Path) -> None:
    folder = shutil.copytree(configs["segmentation"].path, tmp_path / "copy")
    shutil.copyfile(folder / "train" / "shard-000000.idx", folder / "train" / "shard-000001.idx")
    source = open_source(replace(configs["segmentation"], path=str(folder)), "train", "segmentation")
    with pytest.raises(DataError, match=r"train/shard-000001.idx belongs to another shard: prepare or copy"):
        source.sizes()


def test_an_index_without_sizes_is_refused_where_they_are_needed(configs, tmp_path: Path) -> None:
    folder = shutil.copytree(configs["detection"].path, tmp_path / "copy")
    path = folder / "train" / "shard-000001.idx"
    index = load_index(path)
    records, header = index.records.copy(), index.header
    records["width"][2] = 0
    keys, rows = ["0000"] * len(records), [np.empty(0, shard_index.ROW)] * len(records)
    path.write_bytes(shard_index.pack(records, keys, rows, header.tar_bytes, header.tar_sha256))
    with pytest.raises(DataError, match=r"train/shard-000001.idx does not say how large its images are: prepare the"):
        open_source(replace(configs["detection"], path=str(folder)), "train", "detection").sizes()


def test_settings_and_sources_that_do_not_fit_are_refused(configs) -> None:
    with pytest.raises(ValueError, match=r"data.order 'block': detection puts images of similar shapes together"):
        _open(replace(configs["detection"], order="block"), "detection")
    with pytest.raises(ValueError, match=r"data.augment.repeats 2: detection serves each image once"):
        _open(replace(configs["detection"], augment=AugmentConfig(repeats=2)), "detection")
    with pytest.raises(DataError, match="backend 'synthetic' has nothing for segmentation: use webdataset"):
        _open(DataConfig(backend="synthetic"), "segmentation")
    with pytest.raises(DataError, match="is a set for detection, and one for segmentation is needed"):
        _open(replace(configs["detection"], num_classes=2), "segmentation")


def test_repeats_serve_an_image_of_segmentation_again_with_other_draws(tmp_path: Path) -> None:
    config = segmentation_config(segmentation_set(tmp_path, 40, 1), photometric_distortion=True)
    with _open(replace(config, augment=AugmentConfig(repeats=3)), "segmentation") as loader:
        places = [place for batch in loader for place in contents(batch)]
    ids = [place[1] for place in places]
    assert ids[32:] == ids[:8], "copies follow in turns of 32"
    assert len(set(ids)) == 32
    assert len({place[4] for place in places}) == 40, "no two alike"


def test_segmentation_may_be_served_in_blocks(configs) -> None:
    config = replace(configs["segmentation"], order="block", block_shards=2)
    with _open(config, "segmentation") as loader:
        ids = [number for batch in loader for number in batch.ids.tolist()]
        assert loader.state_dict()["order"] == "block/2"
    assert sorted(ids) == list(range(12))
    assert ids != sorted(ids)


def test_no_library_starts_threads_beside_the_loader_s(configs) -> None:
    def serve() -> None:
        for kind, train in itertools.product(KINDS, (True, False)):
            changes: dict[str, Any] = {"short_sides": (512,), "long_side": 1024}
            if kind == "segmentation":
                changes = {"crop_size": 512, "short_side": 512, "long_side": 512}
            section = replace(getattr(configs[kind], kind), **changes)
            with _open(replace(configs[kind], **{kind: section}), kind, train=train) as loader:
                _serve(loader, len(loader))
        found.append(len(os.listdir("/proc/self/task")))

    found: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # what a team would have that torch started for the thread
    try:
        before = len(os.listdir("/proc/self/task"))
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [before + 1]


def test_images_and_targets_belong_to_whoever_holds_them(configs) -> None:
    for kind in KINDS:
        with _open(replace(configs[kind], num_threads=2), kind) as loader:
            batches = list(loader)
            first = [contents(batch) for batch in batches]
            _serve(loader, 4)
            assert [contents(batch) for batch in batches] == first
            assert all(isinstance(batch.images, torch.Tensor) for batch in batches)
