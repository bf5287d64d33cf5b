"""The garbage collector runs at the steps that all ranks agree on, and at no other time."""

from __future__ import annotations

import gc
import weakref

import pytest

from dgt.training.garbage import collect_after, collected_by_hand


class Cycle:
    def __init__(self) -> None:
        self.self = self


def test_cycles_live_until_the_step_of_the_collection() -> None:
    with collected_by_hand(3):
        seen = weakref.ref(Cycle())
        alive = []
        for step in range(1, 4):
            collect_after(step, 3)
            alive.append(seen() is not None)
    assert alive == [True, True, False]


@pytest.mark.parametrize(("every", "within"), [(5, False), (0, True)])
def test_automatic_collection_is_back_afterwards_even_after_an_error(every: int, within: bool) -> None:
    seen = []

    def fail() -> None:
        with collected_by_hand(every):
            seen.append(gc.isenabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [*seen, gc.isenabled()] == [within, True]
