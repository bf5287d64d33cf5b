"""N steps equal k steps, SIGKILL, N - k steps, to the last bit, under every engine and every pair of choices.

The moments of the kills are drawn from a seed that is printed; DGT_EXACTNESS_SEED repeats them. `make test` runs the
pairwise matrix with one kill each; `make test-all` (DGT_FULL_MATRIX=1) all combinations, and the pairwise matrix once
more with compiled blocks, with three kills in a row each. Compiling takes far longer than these runs: `make test` has
one run with compiled blocks, without the generation of machine code.
"""

from __future__ import annotations

import datetime
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import matrix
import pytest
from matrix import (
    FACTORS,
    RANKS,
    Case,
    Interruptions,
    Team,
    config_of,
    finish,
    interrupt,
    random_interruptions,
    run_to_the_end,
    teams,
)

from benchmarks.chaos.evidence import differences
from benchmarks.chaos.moments import Order

SEED = int(os.environ.get("DGT_EXACTNESS_SEED", datetime.date.today().toordinal()))
FULL = os.environ.get("DGT_FULL_MATRIX") == "1"
PAIRWISE = matrix.pairwise(FACTORS)
CASES = [*matrix.every(FACTORS), *(case | {"compiled": True} for case in PAIRWISE)] if FULL else PAIRWISE
BACKEND = "inductor" if FULL else "aot_eager"


@pytest.fixture(scope="module")
def team() -> Iterator[Callable[[int], Team]]:
    with teams() as started:
        yield started


def check(case: Case, folder: Path, team: Callable[[int], Team], interruptions: Interruptions) -> int:
    """Runs undisturbed, and with the interruptions; both must leave the same. Returns the number of kills."""
    ranks = RANKS.get(case["engine"], 2)
    undisturbed, disturbed = config_of(case, folder / "undisturbed"), config_of(case, folder / "disturbed")
    print(f"seed {SEED}: killed at {interruptions}")
    run_to_the_end(undisturbed, case["engine"], team, BACKEND)
    kills = interrupt(disturbed, ranks, interruptions, BACKEND)
    run_to_the_end(disturbed, case["engine"], team, BACKEND)
    assert differences(disturbed.run_dir, undisturbed.run_dir) == []
    return kills


@pytest.mark.parametrize("number", range(len(CASES)), ids=[matrix.title(case) for case in CASES])
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path, team: Callable[[int], Team], number: int) -> None:
    case = CASES[number]
    if "zero" in case["engine"]:
        pytest.importorskip("deepspeed")
    rng = random.Random(f"{SEED} {number}")
    times = 3 if FULL else 1
    assert check(case, tmp_path, team, random_interruptions(rng, RANKS.get(case["engine"], 2), times)) >= 1


USUAL: Case = {name: values[0] for name, values in FACTORS.items()} | {"engine": "fsdp", "micro_batches": 3}


def test_three_kills_in_a_row_during_warmup_a_commit_and_an_evaluation(
    tmp_path: Path, team: Callable[[int], Team]
) -> None:
    in_warmup = (Order("loss", 3, 1),)
    in_a_commit = (Order("rename", 2, 0),)  # the first is the manifest's
    in_an_evaluation = (Order("evaluation", 2, 1),)
    assert check(USUAL, tmp_path, team, Interruptions((in_warmup, in_a_commit, in_an_evaluation))) == 3


@pytest.mark.slow
def test_a_killed_run_of_compiled_blocks_ends_as_if_nothing_had_happened(
    tmp_path: Path, team: Callable[[int], Team]
) -> None:
    case = USUAL | {"engine": "ddp", "recompute": "selective", "compiled": True}
    assert check(case, tmp_path, team, Interruptions(((Order("step", 4, 1),),))) == 1


def test_the_matrix_holds_every_pair_of_values() -> None:
    cases = matrix.pairwise(FACTORS)
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        assert {(case[a], case[b]) for case in cases} == set(itertools.product(xs, ys)), f"{a} and {b}"
    assert len(cases) <= 30
    assert all(set(case) == set(FACTORS) for case in cases)


def test_a_difference_of_one_bit_is_seen(tmp_path: Path) -> None:
    """What the comparison is worth: an average that is lost or a sample too few must not go unnoticed."""
    case = USUAL | {"engine": "single"}
    first, second = config_of(case, tmp_path / "first"), config_of(case | {"averaged": False}, tmp_path / "second")
    for config in (first, second):
        assert finish(config) == "finished"
    assert any("ema" in words for words in differences(second.run_dir, first.run_dir))
    assert differences(first.run_dir, first.run_dir) == []
