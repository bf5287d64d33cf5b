"""The chaos harness itself: every kind of fault really happens, nothing is lost to it, and a loss would be seen."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import faults, ranks, record
from benchmarks.chaos.faults import ENDING, PASSING, Fault, Scene
from benchmarks.chaos.runs import WORLD_SIZE, small_run
from benchmarks.chaos.trial import Reference, Trial, undisturbed
from data_pipeline.loader import Loader
from dgt.training.keeper import Keeper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 5


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("chaos")
    try:
        with chaos.small_disk(folder / "disk") as mounted:
            yield mounted
    except SystemExit as cannot:
        pytest.skip(str(cannot))


@pytest.fixture(scope="module")
def reference(disk: Path) -> Reference:
    out = disk.parent
    return undisturbed(small_run(out / "undisturbed", "ddp"), WORLD_SIZE, out / "undisturbed-records", disk / "run")


def trial_on(disk: Path, reference: Reference, sabotage: ranks.Sabotage | None = None) -> Trial:
    config = dataclasses.replace(small_run(disk, "ddp"), name="run")
    shutil.rmtree(config.run_dir, ignore_errors=True)
    records = disk.parent / "records"
    shutil.rmtree(records, ignore_errors=True)
    return Trial(config, reference, records, sabotage)


def until_it_happens(kind: Callable[[random.Random, Scene], Fault], disk: Path, reference: Reference) -> list[Fault]:
    """Kills the run, and goes on under this one kind of fault until it has happened; and on to the end."""
    rng = random.Random(f"{SEED} {kind.__name__}")
    met: list[Fault] = []
    for _ in range(4):
        trial = trial_on(disk, reference)
        trial.go_on([Fault("SIGKILL", [faults.Order("step", 7, 0)])], rng)
        while not (trial.finished or trial.trouble or met):
            trial.go_on([kind(rng, reference.scene)], rng)
            met = [fault for fault in trial.rounds[-1] if fault.happened]
        trial.conclude()
        assert trial.trouble == ""
        if met:
            break
    return met


@pytest.mark.parametrize("kind", sorted({*ENDING, *PASSING}, key=lambda kind: kind.__name__), ids=lambda k: k.__name__)
def test_a_fault_of_each_kind_happens_and_costs_nothing(
    disk: Path, reference: Reference, kind: Callable[[random.Random, Scene], Fault]
) -> None:
    assert until_it_happens(kind, disk, reference)


def skip_a_batch() -> None:
    """A resume that forgets one batch."""
    load = Loader.load_state_dict

    def forgetful(self: Loader, state: dict[str, Any]) -> None:
        load(self, state)
        if next(iter(self), None) is None:  # the end of an epoch
            next(iter(self))

    Loader.load_state_dict = forgetful  # type: ignore[method-assign]


def lose_a_bit() -> None:
    """A resume that changes one bit of one average, which no step shows."""
    resume = Keeper.resume

    def inexact(self: Keeper) -> bool:
        found = resume(self)
        if found and self.ema:
            average = next(iter(self.ema.averages.values())).local
            first = (0,) * average.ndim
            average[first] = average[first].nextafter(average[first] + 1)
        return found

    Keeper.resume = inexact  # type: ignore[method-assign]


@pytest.mark.parametrize(("sabotage", "sign"), [(skip_a_batch, "instead of"), (lose_a_bit, "'evaluation'")])
def test_a_run_that_resumes_wrongly_is_lost(
    disk: Path, reference: Reference, sabotage: ranks.Sabotage, sign: str
) -> None:
    trial = trial_on(disk, reference, sabotage)
    trial.go_on([Fault("SIGKILL", [faults.Order("step", 8, 1)])], random.Random(SEED))
    trial.conclude()
    assert [fault.happened for fault in trial.met] == [True]
    assert sign in trial.trouble


def test_a_death_that_no_fault_explains_is_a_loss(disk: Path, reference: Reference) -> None:
    trial = trial_on(disk, reference)
    trial.go_on([Fault("harmless", [faults.Order("step", 3, 0)], may_end=False)], random.Random(SEED))
    assert "ended without a cause" in trial.trouble


def test_the_record_adds_sessions_up(tmp_path: Path) -> None:
    counter = record.Counter
    first = record.session(1, 90.0, 3, counter({"a full disk": 2, "SIGKILL": 4}), counter())
    second = record.session(2, 30.0, 1, counter({"SIGKILL": 1}), counter({"SIGKILL": 2}))
    path = tmp_path / "record.json"
    record.add(path, first)
    assert record.totals(record.add(path, second)) == (7, 2)
    assert record.read(path)[0]["faults"] == {
        "SIGKILL": {"survived": 4, "lost": 0},
        "a full disk": {"survived": 2, "lost": 0},
    }
