"""What a run's checkpoints mean to it: returns that no kill forgets, where they lead, and which result is the best."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kills import kill_at
from ranks import run_ranks
from small import small_config

from dgt.training import checkpoint
from dgt.training.checkpoint import CheckpointConfig, CheckpointError
from dgt.training.ema import EmaConfig
from dgt.training.keeper import Keeper
from dgt.training.pieces import Piece
from dgt.training.state import Progress
from dgt.training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def keeper(folder: Path, **settings: Any) -> Keeper:
    """Of a run whose only tensor says which step it is of."""
    settings = {"asynchronous": False, **settings}
    config = small_config(folder, ema=EmaConfig(decay=0.0), checkpoint=CheckpointConfig(**settings))
    pieces = {"model.w": Piece(torch.zeros(3), (3,))}
    engine = SimpleNamespace(state=lambda: pieces, weights=lambda: pieces, adopt=lambda _: None)
    return Keeper(config, ALONE, engine, Progress(), lambda: None)  # type: ignore[arg-type]


def arrive(one: Keeper, step: int, **progress: Any) -> None:
    """What a loop has done up to `step`."""
    one.pieces()["model.w"].local.fill_(step)
    vars(one.progress).update({"step": step, "data": {"consumed": step}, **progress})


def steps(one: Keeper) -> list[int]:
    """Of the committed checkpoints, newest first."""
    return [checkpoint.verify(path).step for path in checkpoint.committed(one.folder)]


def state(one: Keeper) -> tuple[int, float, int, int]:
    """Step, the step that the tensor is of, returns, and position in the data."""
    progress = one.progress
    return progress.step, float(one.pieces()["model.w"].local[0]), progress.rollbacks, progress.data["consumed"]


def go_back(folder: Path) -> None:
    """Resumes at step 6, reads bad batches up to the ninth, and returns to step 2."""
    one = keeper(folder)
    assert one.resume()
    one.progress.data = {"consumed": 9}
    one.return_to(checkpoint.verify(one.folder / "step_00000002"), 1)


def killed_returns(folder: Path, when: str) -> tuple[int, set[tuple[Any, ...]], int]:
    """Returns once per call that changes the disk, killed at that call, and resumes.

    The number of kills, the states after the resumes, and how many returns were saved before they had their end.
    """
    start, states, unfinished = folder / "start", set(), 0
    one = keeper(start)
    for step in (2, 4, 6):
        arrive(one, step)
        assert one.save()
    for call in range(1, 1000):
        place = folder / str(call)
        shutil.copytree(start, place)
        child = os.fork()
        if child == 0:
            kill_at(call, when)
            go_back(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), (call, status)
        again = keeper(place)
        left = steps(again)
        assert again.resume()
        states.add(state(again))
        if state(again)[2]:
            unfinished += left != [2]
            assert steps(again) == [2], "no attempt goes on from what was left behind"
            arrive(again, 4)
            assert again.save()
            later = keeper(place)
            assert later.resume()
            assert state(later) == (4, 4, 1, 4), "a new checkpoint of a step that was left behind counts"
        else:
            assert steps(again) == [6, 4, 2]
        shutil.rmtree(place)
        if status == 0:
            assert left == [2]
            return call - 1, states, unfinished
    raise AssertionError("the return never came to its end")


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_kill_at_any_moment_of_a_return_either_undoes_it_whole_or_forgets_nothing_of_it(
    tmp_path: Path, when: str
) -> None:
    (result,) = run_ranks(1, killed_returns, tmp_path, when)
    kills, states, unfinished = result.value
    assert states == {(6, 6, 0, 6), (2, 2, 1, 9)}
    # The manifest written, flushed, replaced, its folder flushed; two later checkpoints renamed, one of them removed.
    assert kills >= (1 if when == "within" else 8)
    assert unfinished >= (0 if when == "within" else 2), "saved, and the names of later ones not yet taken"


def test_a_second_return_without_a_new_checkpoint_goes_to_an_older_one(tmp_path: Path) -> None:
    one = keeper(tmp_path, keep_last=3)
    for step in (2, 4, 6):
        arrive(one, step)
        assert one.save()
    reached = []
    for rollbacks in (1, 2, 3):
        arrive(one, one.progress.step + 1)  # one good step, and then bad ones
        found = one.return_point()
        assert found is not None
        one.return_to(found, rollbacks)
        reached.append((found.step, steps(one)))
    assert reached == [(6, [6, 4, 2]), (4, [4, 2]), (2, [2])]
    arrive(one, 3)
    found = one.return_point()
    assert found is not None
    assert found.step == 2, "the last one, where there is no other"
    again = keeper(tmp_path)
    assert again.resume()
    assert again.progress.returned_to == 2, "a resume remembers it"
    arrive(again, 5)
    assert again.save()
    arrive(again, 6)
    found = again.return_point()
    assert found is not None
    assert found.step == 5, "a checkpoint since then is as good as any"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_best_result_counts_when_the_save_of_its_step_succeeds_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    one = keeper(tmp_path, asynchronous=asynchronous)
    arrive(one, 1, best_metric=0.1, best_step=1)
    one.save_the_end()
    arrive(one, 2, best_metric=0.5, best_step=2)
    with monkeypatch.context() as full:
        full.setattr(checkpoint.tensor_files, "write", lambda *_: 1 / 0)
        one.save()
        one.conclude()
        assert (one.progress.best_metric, one.progress.best_step) == (0.1, 1), "no checkpoint of it is there"
    one.save_the_end()
    saved = checkpoint.verify(one.folder / "step_00000002").manifest["progress"]
    assert (saved["best_metric"], saved["best_step"]) == (0.5, 2)


def test_a_best_result_counts_where_only_the_manifest_of_its_checkpoint_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = keeper(tmp_path)
    arrive(one, 2)
    one.save_the_end()
    again = keeper(tmp_path)
    assert again.resume()
    vars(again.progress).update(best_metric=0.5, best_step=2, evaluated_at=2)
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "replace_facts", lambda *_: 1 / 0)
        assert not again.save()
    arrive(again, 3)
    again.save_the_end()
    saved = checkpoint.verify(again.folder / "step_00000003").manifest["progress"]
    assert (saved["best_metric"], saved["best_step"]) == (0.5, 2)


def test_a_best_result_whose_checkpoint_has_gone_is_forgotten(tmp_path: Path) -> None:
    one = keeper(tmp_path)
    arrive(one, 1, best_metric=0.1, best_step=1)
    one.save_the_end()
    arrive(one, 2)
    one.save_the_end()
    again = keeper(tmp_path)
    assert again.resume()
    assert (again.progress.best_metric, again.progress.best_step) == (0.1, 1)
    shutil.rmtree(one.folder / "step_00000001")
    again = keeper(tmp_path)
    assert again.resume()
    assert (again.progress.best_metric, again.progress.best_step) == (None, None)
    assert again.saved["best_step"] is None


@pytest.mark.parametrize("change", [{"progress": {"unknown": 1}}, {"progress": {"best_step": "../x"}}, {"progress": 3}])
def test_a_progress_of_another_kind_is_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    one = keeper(tmp_path)
    arrive(one, 1)
    one.save_the_end()
    path = one.folder / "step_00000001"
    checkpoint.write_manifest(path, checkpoint.read_manifest(path) | change)
    with pytest.raises(CheckpointError, match=r"another version|other things than a save writes"):
        keeper(tmp_path).resume()
