"""Python runs this at its start where this folder is on PYTHONPATH: ranks of a real job pause, fail or dawdle by it.

DGT_TEST_HOLD=PLACE:FILE:ATTEMPT,...  rank 0 makes FILE at the place and waits there until FILE.go exists
DGT_TEST_RAISE=STEP:RANK[:ATTEMPT]    that rank raises before that step, in each attempt or in that one
DGT_TEST_STEP_SECONDS=S               every step takes at least so long
DGT_TEST_AWAIT=STEP:ATTEMPT           every rank waits before that step until a signal has asked it to stop

Places: `start` (before the first step), `step-N` (before step N), `evaluation` (within one), `save` (before a
checkpoint gets its name; `save-N`: that of step N), `saved` (after it has it). `begin` (the batch script's first act)
and `health_check` (on the first node), before there are ranks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from typing import Any

PATCHED = "dgt.training.trainer"


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody does, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != PATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def patch(module: Any) -> None:
    """Puts the places into the loop."""
    trainer, keeper, evaluation = module.Trainer, module.Keeper, module.evaluate
    run, step, save, rename = trainer.run, trainer.step, keeper.save, Path.rename

    def started(self: Any) -> Any:
        hold("start")
        return run(self)

    def stepped(self: Any, *arguments: Any) -> Any:
        before = time.monotonic()
        hold(f"step-{self.progress.step + 1}")
        fail(self.progress.step + 1)
        await_signal(self.progress.step + 1, self.interruption)
        result = step(self, *arguments)
        time.sleep(max(0.0, float(os.environ.get("DGT_TEST_STEP_SECONDS", 0)) - (time.monotonic() - before)))
        return result

    def evaluated(*arguments: Any) -> Any:
        hold("evaluation")
        return evaluation(*arguments)

    def saved(self: Any, *arguments: Any, **more: Any) -> Any:
        result = save(self, *arguments, **more)
        hold("saved")
        return result

    def renamed(path: Path, to: Any) -> Any:
        if path.suffix == ".saving":
            hold("save")
            hold(f"save-{int(path.name.split('.')[0].removeprefix('step_'))}")
        return rename(path, to)

    trainer.run, trainer.step, keeper.save, module.evaluate = started, stepped, saved, evaluated
    Path.rename = renamed  # type: ignore[method-assign, assignment]


def is_this_attempt(words: list[str], position: int) -> bool:
    """Whether the attempt that the words name, if they do, is the one that runs."""
    return len(words) <= position or words[position] == os.environ.get("SLURM_RESTART_COUNT", "0")


def hold(place: str) -> None:
    """Waits at a place, the first time that it comes there."""
    for told in os.environ.get("DGT_TEST_HOLD", "::").split(","):
        words = told.split(":")
        is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0"
        if words[0] == place and is_first and is_this_attempt(words, 2) and not Path(words[1]).exists():
            Path(words[1]).touch()
            while not Path(words[1] + ".go").exists():
                time.sleep(0.02)
            return


def fail(step: int) -> None:
    """Raises at a step of a rank."""
    words = os.environ.get("DGT_TEST_RAISE", ":").split(":")
    if words[0] == str(step) and words[1] == os.environ.get("RANK") and is_this_attempt(words, 2):
        raise RuntimeError(f"rank {words[1]} was told to raise at step {step}")


def await_signal(step: int, interruption: Any) -> None:
    """Waits before a step for a signal."""
    words = os.environ.get("DGT_TEST_AWAIT", ":").split(":")
    while words[0] == str(step) and is_this_attempt(words, 1) and not interruption.received:
        time.sleep(0.02)


if any(name.startswith("DGT_TEST_") for name in os.environ):
    sys.meta_path.insert(0, Finder())
    program = [Path(word).stem for word in sys.orig_argv[1:]]
    if program[:1] == ["health_check"]:
        hold("health_check")
    elif program[:1] == ["attempt"]:
        hold(program[-1])
