from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import AugmentConfig, Batching, DamagedSampleError, DataConfig, DataError, Loader, RawSample
from data_pipeline.synthetic import SyntheticSource

CONFIG = DataConfig(
    backend="synthetic", num_classes=5, image_size=12, augment=AugmentConfig(rand_augment="rand-m9-inc1"), num_threads=0
)
THREADED = DataConfig(backend="synthetic", num_classes=5, image_size=12, num_threads=3, prefetch=3)
IMAGES = 40
BATCHES_OF_8 = Batching(8)


class Faulty(SyntheticSource):
    """40 synthetic images, some of which fail as told."""

    def __init__(
        self,
        damaged: tuple[int, ...] = (),
        undecodable: tuple[int, ...] = (),
        raising: dict[int, Exception] | None = None,
    ) -> None:
        super().__init__(CONFIG, "train")
        self._num_samples = IMAGES
        self._damaged, self._undecodable, self._raising = damaged, undecodable, raising or {}
        self.closed = 0

    def read(self, index: int) -> RawSample:
        sample = super().read(index)
        if index in self._raising:
            raise self._raising[index]
        if index in self._damaged:
            raise DamagedSampleError(sample.shard, sample.key, "checksum differs")
        if index in self._undecodable:
            return RawSample(sample.key, b"\xff\xd8 no image", sample.label, sample.shard)
        return sample

    def close(self) -> None:
        self.closed += 1


class Unusable(Faulty):
    """Every image is of a type that nothing can decode, which is a mistake in a program and not in the data."""

    def read(self, index: int) -> RawSample:
        sample = super().read(index)
        return RawSample(sample.key, None, sample.label, sample.shard)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert decoding_threads() == []


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data_pipeline")]


def loader(
    source: Faulty, config: DataConfig = CONFIG, batching: Batching = BATCHES_OF_8, train: bool = True
) -> Loader:
    return Loader(source, config, batching, train=train, seed=0)


def served(source: Faulty, config: DataConfig, world_size: int = 1) -> dict[int, tuple[int, bytes]]:
    """Id -> (label, pixels) of one epoch."""
    result = {}
    for rank in range(world_size):
        with loader(source, config, Batching(8, rank, world_size)) as running:
            for batch in running:
                assert batch.valid.all()
                for place, sample in enumerate(batch.ids.tolist()):
                    result[sample] = int(batch.labels[place]), batch.images[place].numpy().tobytes()
    return result


def test_damaged_sample_is_replaced_by_the_next_one_whoever_reads_it() -> None:
    healthy = served(Faulty(), CONFIG)
    threaded = DataConfig(**{**vars(CONFIG), "num_threads": 3})
    first = served(Faulty(damaged=(7, 8), undecodable=(39,)), CONFIG)
    for config, world_size in ((CONFIG, 2), (threaded, 1), (threaded, 4)):
        assert served(Faulty(damaged=(7, 8), undecodable=(39,)), config, world_size) == first
    assert sorted(first) == list(range(IMAGES))
    assert [first[sample][0] for sample in (7, 8, 39)] == [
        9 % 5,
        9 % 5,
        0,
    ]  # labels of samples 9, 9 and, round the end, 0
    assert all(first[sample] == healthy[sample] for sample in range(IMAGES) if sample not in (7, 8, 39))
    # the place keeps its own augmentation: one image, three different sets of pixels
    assert len({first[sample][1] for sample in (7, 8, 9)}) == 3


def test_damaged_samples_are_named_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "data_pipeline"), loader(Faulty(damaged=(7,), undecodable=(20,))) as running:
        for _ in range(2):
            for _ in running:
                pass
        assert running.stats()["bad_samples"] == 4
        assert running.stats()["bad_samples"] == 0
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert messages[0].startswith("sample '00000007' in shard train/synthetic-000000: checksum differs")
    assert messages[1].startswith("sample '00000020' in shard train/synthetic-000000: damaged JPEG")


@pytest.mark.parametrize("num_threads", [0, 2])
def test_more_damaged_samples_than_allowed_end_the_iteration(num_threads: int) -> None:
    config = DataConfig(**{**vars(CONFIG), "max_bad_samples": 2, "num_threads": num_threads})
    with loader(Faulty(damaged=(3, 30)), config) as running:
        assert len(list(running)) == 5
        assert len(list(running)) == 5  # the same two again
    with (
        loader(Faulty(damaged=(3, 17, 30)), config) as running,
        pytest.raises(
            DataError, match=r"3 damaged samples are more than max_bad_samples = 2; the last: sample '000000"
        ),
    ):
        list(running)


def test_many_damaged_samples_in_a_row_are_not_one_sample_s_fault() -> None:
    with (
        loader(Faulty(damaged=tuple(range(10, 30)))) as running,
        pytest.raises(DataError, match=r"9 samples in a row are damaged, from sample 1\d on; the last: sample '000000"),
    ):
        list(running)


def test_damaged_sample_is_left_out_of_an_evaluation() -> None:
    with loader(Faulty(damaged=(7,)), CONFIG, Batching(16, tail="mask"), train=False) as running:
        batches = list(running)
        stats = running.stats()
    assert (stats["samples"], stats["bad_samples"]) == (IMAGES - 1, 1)
    counted = [int(sample) for batch in batches for sample in batch.ids[batch.valid]]
    assert counted == [sample for sample in range(IMAGES) if sample != 7]
    assert batches[0].ids.tolist()[7] == 7
    assert not batches[0].images[7].any()


@pytest.mark.parametrize("num_threads", [0, 3])
def test_error_of_the_source_reaches_the_consumer_with_the_sample(num_threads: int) -> None:
    config = DataConfig(**{**vars(THREADED), "num_threads": num_threads})
    cause = OSError("stale file handle")
    with (
        loader(Faulty(raising={11: cause}), config) as running,
        pytest.raises(RuntimeError, match="sample 11 could not be prepared: OSError: stale file handle") as caught,
    ):
        list(running)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("num_threads", [0, 3])
def test_error_after_reading_names_shard_and_key(num_threads: int) -> None:
    config = DataConfig(**{**vars(THREADED), "num_threads": num_threads})
    message = r"sample '\d{8}' in shard train/synthetic-000000 could not be prepared: "
    with loader(Unusable(), config) as running, pytest.raises(RuntimeError, match=message):
        list(running)


def test_missing_shard_is_not_taken_for_a_damaged_sample() -> None:
    with (
        loader(Faulty(raising={11: DataError("shard 3 is gone")}), THREADED) as running,
        pytest.raises(DataError, match=r"^shard 3 is gone$"),
    ):
        list(running)


def test_loader_goes_on_after_an_error_where_it_was() -> None:
    source = Faulty(raising={11: OSError("for a moment")})
    with loader(source, THREADED) as running:
        seen: list[int] = []
        with pytest.raises(RuntimeError, match="for a moment"):
            seen.extend(sample for batch in running for sample in batch.ids.tolist())
        assert running.state_dict()["consumed"] == len(seen)
        source._raising = {}
        seen.extend(sample for batch in running for sample in batch.ids.tolist())
    assert sorted(seen) == list(range(IMAGES))


def test_threads_end_with_the_epoch() -> None:
    with loader(Faulty(), THREADED) as running:
        for _ in running:
            assert decoding_threads() != []
        assert decoding_threads() == []


def test_threads_end_when_the_consumer_stops_early() -> None:
    running = loader(Faulty(), THREADED)
    for _ in running:
        break
    assert decoding_threads() == []
    assert running.state_dict()["consumed"] == 8


def test_threads_end_when_the_consumer_fails() -> None:
    def fail() -> None:
        with loader(Faulty(), THREADED) as running:
            for _ in running:
                raise KeyError("consumer")

    with pytest.raises(KeyError) as caught:
        fail()
    assert decoding_threads() == []
    assert caught.value.args == ("consumer",)


def test_threads_end_when_the_loader_is_forgotten() -> None:
    running = loader(Faulty(), THREADED)
    batches = iter(running)
    next(batches)
    assert decoding_threads() != []
    del running, batches
    gc.collect()
    assert decoding_threads() == []


def test_close_ends_a_running_iteration_and_may_be_repeated() -> None:
    source = Faulty()
    running = loader(source, THREADED)
    batches = iter(running)
    next(batches)
    running.close()
    assert decoding_threads() == []
    assert next(batches, None) is None
    running.close()
    assert source.closed == 2


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(7)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_program_that_ends_within_an_epoch_does_not_hang(ending: str) -> None:
    program = f"""
import os, signal
from data_pipeline import DataConfig, build_loader
config = DataConfig(backend="synthetic", num_classes=5, image_size=12, num_threads=3)
loader = build_loader(config, "train", train=True, global_batch_size=8, rank=0, world_size=1, seed=0)
batches = iter(loader)
next(batches)
{ending}
"""
    # the limit is there to end a hang, which would last forever
    ended = subprocess.run([sys.executable, "-c", program], timeout=300, capture_output=True, text=True, check=False)
    expected = {"pass": 0, "raise SystemExit(7)": 7}.get(ending, -2)
    assert ended.returncode == expected, ended.stderr


class Stuck(Faulty):
    """Reading sample 21 does not end before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def read(self, index: int) -> RawSample:
        if index == 21:
            self.release.wait(60)
        return super().read(index)


def test_stuck_thread_ends_the_iteration_with_its_stack_and_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.workers._STOP_SECONDS", 0.05)
    source = Stuck()
    with loader(source, DataConfig(**{**vars(THREADED), "stall_seconds": 0.3})) as running:
        message = (
            r"(?s)nothing was done for 0.3 seconds \(data.stall_seconds\) in epoch 0 at position \d+: .*"
            r"data_pipeline-\d is at sample 21 \(shard 0, counted from 0\).*in read.*self\.release\.wait"
        )
        served: list[int] = []
        with pytest.raises(DataError, match=message):
            served.extend(sample for batch in running for sample in batch.ids.tolist())
        consumed = running.state_dict()["consumed"]
        assert len(served) == consumed < IMAGES
        assert 21 not in served
        source.release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("data_pipeline"):
                thread.join(60)
        rest = [sample for batch in running for sample in batch.ids.tolist()]
    assert len(rest) == IMAGES - consumed


class Fetching(Stuck):
    """Reading sample 21 takes until the source has been asked ten times what it fetched since: something, each time."""

    asked = 0

    def stats(self) -> dict[str, float]:
        self.asked += 1
        if self.asked == 10:
            self.release.set()
        return {"fetched_bytes": 5.0}


def test_waiting_for_shards_that_are_being_fetched_is_no_stall_and_loses_no_count() -> None:
    source = Fetching()
    with loader(source, DataConfig(**{**vars(THREADED), "stall_seconds": 0.02})) as running:
        assert sum(len(batch.ids) for batch in running) == IMAGES
        asked = source.asked
        assert asked >= 10
        assert running.stats()["fetched_bytes"] == 5 * (asked + 1)
        assert running.stats()["fetched_bytes"] == 5


def quarantined(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_damaged_samples_are_listed_once_whoever_and_whenever_meets_them(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # the second time as after a restart
        for rank in (1, 0):
            source, batching = Faulty(damaged=(7,), undecodable=(20,)), Batching(8, rank, 2)
            with Loader(source, THREADED, batching, train=True, seed=0, quarantine=path) as running:
                for _ in range(3):
                    for _ in running:
                        pass
    found = {int(str(entry["sample"])): entry for entry in quarantined(path)}
    assert len(quarantined(path)) == len(found) == 2
    assert found[7] == {
        "shard": "train/synthetic-000000", "key": "00000007", "reason": "checksum differs",
        "sample": 7, "epoch": found[7]["epoch"], "rank": 1,
    }  # fmt: skip
    assert str(found[20]["reason"]).startswith("damaged JPEG")


def test_no_file_is_written_where_nothing_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    with Loader(Faulty(), CONFIG, BATCHES_OF_8, train=True, seed=0, quarantine=path) as running:
        list(running)
    assert not path.exists()


def test_line_that_a_full_disk_has_cut_off_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"shard": "train/syn')
    with Loader(Faulty(damaged=(7,)), CONFIG, BATCHES_OF_8, train=True, seed=0, quarantine=path) as running:
        list(running)
    cut, line = path.read_text().splitlines()
    assert (cut, json.loads(line)["sample"]) == ('{"shard": "train/syn', 7)


def test_line_that_was_cut_off_by_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, path = os.write, tmp_path / "quarantine.jsonl"
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    with Loader(Faulty(damaged=(7,)), CONFIG, BATCHES_OF_8, train=True, seed=0, quarantine=path) as running:
        assert len(list(running)) == 5
    assert f"{path} cannot be written: No space left on device" in caplog.text


@pytest.mark.parametrize("path", ["/dev/full", "/proc/nowhere/quarantine.jsonl"])
def test_quarantine_that_cannot_be_written_ends_nothing(path: str, caplog: pytest.LogCaptureFixture) -> None:
    source = Faulty(damaged=(7, 20))
    with Loader(source, CONFIG, BATCHES_OF_8, train=True, seed=0, quarantine=Path(path)) as running:
        assert len(list(running)) == 5
        assert running.stats()["bad_samples"] == 2
    assert caplog.text.count(f"{path} cannot be written: No ") == 1


def test_loader_made_before_a_fork_serves_the_child_even_from_within_an_iteration(shard_folder: Path) -> None:
    program = f"""
import os, sys
from data_pipeline import DataConfig, build_loader
config = DataConfig(path={str(shard_folder)!r}, num_classes=3, image_size=20, num_threads=2)
loader = build_loader(config, "train", train=True, global_batch_size=4, rank=0, world_size=1, seed=0)
def rest():
    return [(batch.ids.tolist(), int(batch.images.sum())) for batch in loader]
expected = rest()
loader.set_epoch(0)
for iterating in (False, True):
    if iterating:
        running = iter(loader)
        next(running)
    child = os.fork()
    if child == 0:
        sys.exit(0 if rest() == expected[iterating:] else 5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, iterating
assert rest() == expected[1:]
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=300, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_images_of_the_wrong_shape_count_as_damaged() -> None:
    class Gray(Faulty):
        def read(self, index: int) -> RawSample:
            sample = super().read(index)
            image = np.zeros((12, 12), np.uint8) if index == 5 else sample.image
            return RawSample(sample.key, image, sample.label, sample.shard)

    with loader(Gray()) as running:
        assert len(list(running)) == 5
        assert running.stats()["bad_samples"] == 1
