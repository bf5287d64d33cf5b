"""The micro-batch finder: which sizes are tried, and what real children find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dgt.config import load
from launch import find_micro_batch as finder
from launch.find_micro_batch import Tried, candidates, largest


def test_candidates_cut_the_share_into_equal_parts_and_are_even_where_samples_are_paired() -> None:
    assert candidates(24, even=False) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert candidates(24, even=True) == [2, 4, 6, 8, 12, 24]
    assert candidates(6, even=True) == [2, 6]


@pytest.mark.parametrize("limit", range(0, 26))
def test_search_finds_the_largest_that_fits_with_few_trials(limit: int) -> None:
    sizes = candidates(24, even=False)
    best, tried = largest(sizes, lambda size: Tried(size, size <= limit, None))
    assert best == max((size for size in sizes if size <= limit), default=None)
    assert len({entry.micro_batch for entry in tried}) == len(tried), "nothing is tried twice"
    assert len(tried) <= 6


def test_search_grows_like_a_logarithm() -> None:
    sizes = list(range(1, 4097))
    best, tried = largest(sizes, lambda size: Tried(size, size <= 3000, None))
    assert best == 3000
    assert len(tried) <= 2 * 12 + 1


def test_real_children_find_the_size_within_a_limit(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config", str(config), "data.image_size=64", "steps.global_batch_size=96", "engine.name=ddp"]
    options = finder.parser().parse_intermixed_args([*command, "--memory-gb", "1000"])
    peaks = {size: finder.try_in_child(options, size).peak or 0 for size in (2, 96)}
    assert 0 < peaks[2] < 200e6, "without what Python and torch take"
    assert peaks[96] - peaks[2] > 94 * 0.5e6, "a sample's activations take more than half a megabyte"
    limit = sum(peaks.values()) / 2
    monkeypatch.setattr(finder, "candidates", lambda share, even: [2, 96])  # two children are enough
    assert finder.main([*command, "--memory-gb", str(limit / 1e9)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "steps.micro_batch_size=2"
    assert [line.split()[-1] for line in shown[:-1]] == ["fits", "yes", "no"]
    assert [line.split()[1] for line in shown[1:-1]] == ["48", "1"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), finder.OUT_OF_MEMORY),
        (torch.OutOfMemoryError(), finder.OUT_OF_MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            finder.OUT_OF_MEMORY,
        ),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_a_failed_allocation_is_too_large_and_nothing_else_is(
    error: Exception, status: int | None, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(finder, "train_candidate", fail)
    options = finder.parser().parse_intermixed_args(["--config", str(config), "--candidate", "4"])
    if status is None:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            finder.candidate(load(config), options)
    else:
        assert finder.candidate(load(config), options) == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-gb", "0"], "--memory-gb must be above 0, got 0"),
        (["--memory-gb", "1", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--memory-gb", "1", "--ranks", "4", "engine.fsdp.shard_size=3"], "4 ranks do not divide into groups of 3"),
        (["--memory-gb", "1", "model.name=dgt_nanno"], "unknown model 'dgt_nanno'; did you mean dgt_nano"),
        (["--memory-gb", "1", "--ranks", "3"], "8 does not divide by 3 ranks; the nearest that do are 6 and 9"),
    ],
)
def test_wrong_wishes_are_named(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finder.main(["--config", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
