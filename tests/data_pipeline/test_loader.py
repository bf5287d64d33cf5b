from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import AugmentConfig, Batch, Batching, DataConfig, DataError, Loader, SyntheticConfig, build_loader
from data_pipeline.order import EpochOrder
from data_pipeline.shards import open_source
from data_pipeline.synthetic import SyntheticSource

EVERYTHING = AugmentConfig(
    scale=(0.3, 1.0), rand_augment="rand-m9-n2-mstd0.5-inc1", random_erasing=0.5, horizontal_flip=0.5
)

Sample = tuple[int, int, bytes]
"""(id, label, pixels) of a served sample"""


@pytest.fixture
def config(shard_folder: Path) -> DataConfig:
    """24 training and 11 validation images, with every kind of augmentation."""
    return DataConfig(path=str(shard_folder), num_classes=3, image_size=20, num_threads=0, augment=EVERYTHING)


def open_loader(config: DataConfig, batch_size: int = 4, rank: int = 0, world_size: int = 1, seed: int = 0) -> Loader:
    split = config.train_split
    return build_loader(
        config, split, train=True, global_batch_size=batch_size, rank=rank, world_size=world_size, seed=seed
    )


def samples(batches: Iterable[Batch]) -> list[Sample]:
    """The valid samples of batches, in the order in which they are served."""
    return [
        (int(batch.ids[place]), int(batch.labels[place]), batch.images[place].numpy().tobytes())
        for batch in batches
        for place in range(len(batch.ids))
        if batch.valid[place]
    ]


def serve(loader: Loader, batches: int) -> list[Sample]:
    """So many batches, over the ends of epochs."""
    served: list[Batch] = []
    while len(served) < batches:
        for batch in loader:
            served.append(batch)
            if len(served) == batches:
                break
    return samples(served)


def global_batch(loaders: list[Loader]) -> list[Sample]:
    return [sample for loader in loaders for sample in serve(loader, 1)]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("consumed", [0, 1, 3, 5, 6, 7, 12])
def test_resumed_run_serves_the_ids_and_pixels_of_an_uninterrupted_one(
    config: DataConfig, consumed: int, num_threads: int
) -> None:
    config = replace(config, num_threads=num_threads)
    with open_loader(config) as loader:
        uninterrupted = serve(loader, 15)  # two and a half epochs of six batches
    with open_loader(config) as loader:
        before = serve(loader, consumed)
        state = through_json(loader.state_dict())
    with open_loader(config) as loader:
        loader.load_state_dict(state)
        after = serve(loader, 15 - consumed)
    assert before + after == uninterrupted


def test_run_may_be_resumed_twice_in_a_row(config: DataConfig) -> None:
    with open_loader(config) as loader:
        uninterrupted = serve(loader, 12)
    served: list[Sample] = []
    state = None
    for batches in (2, 1, 0, 5, 4):
        with open_loader(config) as loader:
            if state is not None:
                loader.load_state_dict(state)
                assert loader.state_dict() == state
            served += serve(loader, batches)
            state = through_json(loader.state_dict())
    assert served == uninterrupted


def test_world_size_and_threads_may_change_at_a_resume(config: DataConfig) -> None:
    with open_loader(config, batch_size=6) as loader:
        uninterrupted = serve(loader, 8)
    served: list[Sample] = []
    state = None
    for world_size, num_threads, batches in ((1, 0, 2), (3, 4, 3), (2, 1, 3)):
        loaders = [
            open_loader(replace(config, num_threads=num_threads), 6, rank, world_size) for rank in range(world_size)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(batches):
            served += global_batch(loaders)
        states = [through_json(loader.state_dict()) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    assert served == uninterrupted


def test_batch_size_may_change_at_a_resume_anywhere(config: DataConfig) -> None:
    with open_loader(config, batch_size=1) as loader:
        one_by_one = serve(loader, 24)
    with open_loader(config, batch_size=5) as loader:
        served = serve(loader, 1)
        state = loader.state_dict()
    with open_loader(config, batch_size=4) as loader:
        loader.load_state_dict(state)  # 19 left: four batches of 4, three samples dropped with this epoch
        rest = samples(loader)
        assert loader.epoch == 1
    assert served + rest == one_by_one[:21]
    source = open_source(config, "train")
    with Loader(source, config, Batching(4, tail="mask"), train=True, seed=0) as loader:
        loader.load_state_dict(state)
        assert served + samples(loader) == one_by_one


def test_state_saved_with_the_last_batch_stays_in_its_epoch_and_serves_nothing_twice(config: DataConfig) -> None:
    with open_loader(config) as loader:
        for _ in loader:
            last = loader.state_dict()
        end = loader.state_dict()
        next_epoch = serve(loader, 6)
    assert (last["epoch"], last["consumed"]) == (0, 24)
    assert (end["epoch"], end["consumed"]) == (1, 0)
    with open_loader(config) as loader:
        loader.load_state_dict(last)
        assert list(loader) == []
        assert loader.state_dict() == end
        assert samples(loader) == next_epoch


def test_samples_decoded_ahead_are_not_consumed(config: DataConfig) -> None:
    with open_loader(replace(config, num_threads=2, prefetch=4)) as loader:
        for count, _ in enumerate(loader, start=1):
            assert loader.state_dict()["consumed"] == 4 * count
            if count == 2:
                break
        assert loader.state_dict()["consumed"] == 8
        rest = samples(loader)
    with open_loader(config) as loader:
        assert serve(loader, 6)[8:] == rest


def test_state_is_six_small_values(config: DataConfig) -> None:
    with open_loader(config, seed=3) as loader:
        serve(loader, 2)
        state = loader.state_dict()
    assert set(state) == {"version", "seed", "epoch", "consumed", "order", "fingerprint"}
    assert (state["seed"], state["epoch"], state["consumed"], state["order"]) == (3, 0, 8, "global")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "another"}, "the data set has changed since it was saved: fingerprint"),
        ({"seed": 1}, "seed is 0 now and was 1"),
        ({"order": "block/16"}, "order is 'global' now and was 'block/16'"),
        ({"version": 0}, "another version of the data pipeline"),
        ({"consumed": 25}, "consumed 25 is no place in a data set of 24 samples"),
        ({"consumed": -1}, "consumed -1 is no place"),
        ({"epoch": None}, "epoch None"),
    ],
)
def test_state_that_would_continue_elsewhere_is_refused(
    config: DataConfig, change: dict[str, Any], message: str
) -> None:
    with open_loader(config) as loader:
        serve(loader, 1)
        state = loader.state_dict()
        with pytest.raises(DataError, match=message):
            loader.load_state_dict({**state, **change})
        assert loader.state_dict() == state


def test_changed_data_set_is_refused() -> None:
    config = DataConfig(backend="synthetic", num_classes=4, image_size=8, num_threads=0)
    with open_loader(config) as loader:
        state = loader.state_dict()
    for other in (SyntheticConfig(train_samples=1025), SyntheticConfig(seed=1)):
        with (
            open_loader(replace(config, synthetic=other)) as loader,
            pytest.raises(DataError, match="the data set has changed"),
        ):
            loader.load_state_dict(state)


def test_resume_without_any_of_the_values_names_what_is_missing(config: DataConfig) -> None:
    with open_loader(config) as loader, pytest.raises(DataError, match="version is 1 now and was None"):
        loader.load_state_dict({})


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 18])
def test_every_sample_is_evaluated_exactly_once(config: DataConfig, world_size: int, batch_size: int) -> None:
    served: list[Sample] = []
    counts = set()
    for rank in range(world_size):
        with build_loader(
            config, "val", train=False, global_batch_size=batch_size, rank=rank, world_size=world_size, seed=rank
        ) as loader:
            batches = list(loader)
        assert len(batches) == len(loader)
        counts.add(len(batches))
        served += samples(batches)
        for batch in batches:
            assert batch.images.shape == (batch_size // world_size, 20, 20, 3)
            assert (batch.ids[~batch.valid] == -1).all()
            assert not batch.images[~batch.valid].any()
    assert counts == {-(-11 // batch_size)}
    assert sorted(sample for sample, _, _ in served) == list(range(11))
    with build_loader(config, "val", train=False, global_batch_size=11, rank=0, world_size=1, seed=0) as loader:
        assert sorted(samples(loader)) == sorted(served)


@pytest.mark.parametrize("order", ["global", "block"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_is_trained_on_exactly_once_under_mask(config: DataConfig, order: str, world_size: int) -> None:
    config = replace(config, order=order, block_shards=2)  # type: ignore[arg-type]
    for epoch in (0, 1):
        served: list[int] = []
        for rank in range(world_size):
            source = open_source(config, "train")
            with Loader(
                source, config, Batching(60 // world_size * world_size, rank, world_size, "mask"), train=True, seed=0
            ) as loader:
                loader.set_epoch(epoch)
                served += [sample for sample, _, _ in samples(loader)]
        assert sorted(served) == list(range(24))


def test_loader_serves_the_order_of_the_epoch(config: DataConfig) -> None:
    for order in ("global", "block"):
        config = replace(config, order=order, block_shards=2)  # type: ignore[arg-type]
        with open_loader(config, batch_size=5, seed=9) as loader:
            loader.set_epoch(4)
            served = [sample for sample, _, _ in samples(loader)]
        expected = EpochOrder(order, (6, 6, 6, 6), 9, 4, block_shards=2)  # type: ignore[arg-type]
        assert served == expected.ids(0, 20).tolist()


def test_seed_0_epoch_1_differs_from_seed_1_epoch_0(config: DataConfig) -> None:
    served = []
    for seed, epoch in ((0, 1), (1, 0)):
        with open_loader(config, batch_size=24, seed=seed) as loader:
            loader.set_epoch(epoch)
            served.append(serve(loader, 1))
    assert [sample for sample, _, _ in served[0]] != [sample for sample, _, _ in served[1]]
    pixels = [{sample: image for sample, _, image in epoch} for epoch in served]
    assert all(pixels[0][sample] != pixels[1][sample] for sample in range(24))


def test_augmentation_of_a_sample_changes_with_the_epoch_and_with_the_seed(config: DataConfig) -> None:
    pixels = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        with open_loader(config, batch_size=24, seed=seed) as loader:
            loader.set_epoch(epoch)
            pixels.append({sample: image for sample, _, image in serve(loader, 1)})
    for sample in range(24):
        assert len({epoch[sample] for epoch in pixels}) == 3


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 2), (1, 0), (1, 1), (4, 1), (4, 9)])
def test_threads_and_prefetching_do_not_change_what_is_served(
    config: DataConfig, num_threads: int, prefetch: int
) -> None:
    with open_loader(config) as loader:
        expected = serve(loader, 8)
    with open_loader(replace(config, num_threads=num_threads, prefetch=prefetch)) as loader:
        assert serve(loader, 8) == expected


def test_batch_is_never_written_again(config: DataConfig) -> None:
    kept, copies = [], []
    with open_loader(replace(config, num_threads=2, prefetch=3)) as loader:
        for batch in loader:
            kept.append(batch)
            copies.append((batch.images.clone(), batch.labels.clone(), batch.ids.clone()))
    assert len(kept) == 6
    for batch, (images, labels, ids) in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.ids, ids)


def test_positions_are_the_places_in_the_global_batch(config: DataConfig) -> None:
    for rank in range(3):
        with open_loader(config, 6, rank, 3) as loader:
            for batch in loader:
                assert batch.positions.tolist() == [2 * rank, 2 * rank + 1]
                assert batch.positions.dtype == batch.ids.dtype == batch.labels.dtype == torch.int64
                assert batch.images.dtype == torch.uint8
                assert batch.images.is_contiguous()


def test_labels_are_those_of_the_stored_samples(config: DataConfig) -> None:
    source = open_source(config, "train")
    stored = [source.read(index).label for index in range(24)]
    source.close()
    with open_loader(config) as loader:
        assert all(label == stored[sample] for sample, label, _ in serve(loader, 6))


def test_set_epoch_ends_a_running_iteration_and_starts_at_the_beginning(config: DataConfig) -> None:
    with open_loader(replace(config, num_threads=2)) as loader:
        running = iter(loader)
        next(running)
        loader.set_epoch(3)
        assert next(running, None) is None
        assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (3, 0)
        third = serve(loader, 2)
        loader.set_epoch(3)
        assert serve(loader, 2) == third


def test_new_iteration_takes_over_where_the_former_was(config: DataConfig) -> None:
    with open_loader(config) as loader:
        expected = serve(loader, 4)
        loader.set_epoch(0)
        first = iter(loader)
        served = samples([next(first), next(first)])
        second = iter(loader)
        served += samples([next(second), next(second)])
        assert next(first, None) is None
    assert served == expected


def test_length_is_the_number_of_batches_and_an_epoch_without_any_is_refused(config: DataConfig) -> None:
    with open_loader(config, batch_size=5) as loader:
        assert len(loader) == len(list(loader)) == 4
    with pytest.raises(DataError, match="has 24 samples, fewer than one global batch of 25; lower"):
        open_loader(config, batch_size=25)
    with pytest.raises(ValueError, match="a global batch of 5 cannot be shared evenly by 2 ranks"):
        open_loader(config, batch_size=5, world_size=2)


def test_block_order_needs_shards(config: DataConfig) -> None:
    class Unsharded(SyntheticSource):
        shard_sizes = None  # type: ignore[assignment]

    config = replace(config, order="block")
    with (
        Loader(Unsharded(config, "train"), config, Batching(4), train=True, seed=0) as loader,
        pytest.raises(DataError, match="use order 'global'"),
    ):
        next(iter(loader))


def test_stats_count_since_the_last_call(config: DataConfig) -> None:
    with open_loader(replace(config, num_threads=2)) as loader:
        serve(loader, 3)
        stats = loader.stats()
        assert stats["samples"] == 12
        assert stats["bad_samples"] == 0
        assert stats["decode_seconds"] > 0
        assert stats["wait_seconds"] > 0
        assert set(loader.stats().values()) == {0}


def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.loader import _resolve_threads

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert _resolve_threads(-1) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert _resolve_threads(-1) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert _resolve_threads(-1) == 1
    assert _resolve_threads(0) == 0
    assert _resolve_threads(7) == 7
