"""Dense tasks, interrupted and resumed: bit for bit what an undisturbed run gives, its evaluations included."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dense_small import HELD_OUT, TASKS, dense_config
from ranks import RankResult, kill_self, run_ranks

from benchmarks.chaos.evidence import differences, final
from dgt.config import Config
from dgt.training.interrupt import Interruption
from dgt.training.trainer import Trainer, train

WORLD_SIZE = 2
ENGINES = {"segmentation": "fsdp", "detection": "ddp"}


def free_ports(count: int) -> list[int]:
    """A port for each of several runs in one process: a store of ranks cannot be joined twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def attempt(configs: list[Config], ends: list[str], ports: list[int]) -> list[dict[str, Any]]:
    """One attempt of each run in one rank; how each `ends`: "done", or "asked" or "killed" after its third step."""
    found = []
    original = Trainer.step
    for config, end, port in zip(configs, ends, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        interruption, served = Interruption(), []

        def step(
            self: Trainer, batch: Any, waited: float, end: str = end,
            interruption: Interruption = interruption, served: list[Any] = served,
        ) -> bool:  # fmt: skip
            taken = original(self, batch, waited)
            served.append((self.progress.step, batch.ids.tolist(), tuple(batch.images.shape)))
            if self.progress.step == 3 and self.world.rank == 1:
                if end == "killed":
                    kill_self()
                elif end == "asked":
                    interruption.note(signal.SIGTERM, None)
            return taken

        Trainer.step = step  # type: ignore[method-assign]
        outcome = train(config, interruption)
        found.append({"status": outcome.status, "served": served, "metrics": outcome.metrics})
    return found


def test_interrupted_runs_of_both_tasks_come_to_the_same_weights_and_evaluations(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    def run(name: str, ends: list[str], check: bool = True) -> tuple[list[Path], list[RankResult]]:
        configs = [dense_config(task, tmp_path / name, shapes[task], ENGINES[task]) for task in TASKS]
        ranks = run_ranks(WORLD_SIZE, attempt, configs, ends, free_ports(len(ends)), check=check)
        return [config.run_dir for config in configs], ranks

    expected, whole = run("undisturbed", ["done", "done"])
    # Segmentation stops before its evaluation of step 3, detection goes back to step 2, which is within an epoch.
    _, ended = run("disturbed", ["asked", "killed"], check=False)
    assert -9 in [rank.exitcode for rank in ended]
    disturbed, last = run("disturbed", ["done", "done"])
    for rank in range(WORLD_SIZE):
        for found, undisturbed, first in zip(last[rank].value, whole[rank].value, (4, 3), strict=True):
            assert found["status"] == undisturbed["status"] == "finished"
            assert found["metrics"] == undisturbed["metrics"]
            assert found["metrics"]["samples"] == HELD_OUT
            assert found["served"] == [entry for entry in undisturbed["served"] if entry[0] >= first]
    for folder, of_undisturbed in zip(disturbed, expected, strict=True):
        assert differences(folder, of_undisturbed) == []
        assert {"model", "optimizer", "ema"} <= {name.split(".")[0] for name in final(folder)[1]}
