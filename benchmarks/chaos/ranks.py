"""Ranks of one attempt: started quickly, watched, and recorded step by step outside the run's own folder."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.moments import Moments, Order, watch
from dgt.config import Config

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks share few cores here: an idle thread must sleep, not spin

os.environ.setdefault("DS_ACCELERATOR", "cpu")

forkserver = multiprocessing.get_context("forkserver")
PRELOADED = ["dgt.config", "dgt.training.trainer", "dgt.training.parallel.ddp", "dgt.training.parallel.fsdp",
             "dgt.tasks.classification", "torch._dynamo", "benchmarks.chaos.moments", "deepspeed"]  # fmt: skip

Sabotage = Callable[[], None]


@dataclass(frozen=True)
class Attempt:
    """The processes of one attempt, and where they write what they did."""

    processes: list[Any]
    records: Path
    started: float

    def running(self) -> bool:
        """Whether any rank still lives."""
        return any(process.is_alive() for process in self.processes)

    def died(self) -> bool:
        """Whether any rank has ended otherwise than by returning."""
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def waited(self) -> float:
        """Seconds for which threads of the ranks could have run and were not let, all together."""
        files = [path for p in self.processes for path in Path(f"/proc/{p.pid}/task").glob("*/schedstat")]
        waits = []
        for path in files:
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                waits.append(int(path.read_text().split()[1]))
        return sum(waits) / 1e9

    def kill(self) -> None:
        """Ends whoever is left, stopped ones included."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start(config: Config, world_size: int, orders: list[Order], records: Path, sabotage: Sabotage | None) -> Attempt:
    """Starts the ranks; each appends to records/rank-R.jsonl and its log to records/rank-R.log."""
    forkserver.set_forkserver_preload(PRELOADED)
    records.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        if world_size > 1:
            environment |= {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        mine = [order for order in orders if order.rank == rank]
        arguments = (config, rank, environment, mine, records, sabotage)
        processes.append(forkserver.Process(target=body, args=arguments, daemon=True))
        processes[-1].start()
    return Attempt(processes, records, time.monotonic())


def body(
    config: Config, rank: int, environment: dict[str, Any], orders: list[Order], records: Path, sabotage: Sabotage
) -> None:
    """What one rank does."""
    os.environ.update({key: str(value) for key, value in environment.items()})
    record = Record(records / f"rank-{rank}.jsonl")
    log = (records / f"rank-{rank}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from dgt.training.interrupt import Interruption
    from dgt.training.trainer import train

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=log, force=True)
    interruption = Interruption()
    interruption.install()
    record.write(started=True)
    moments = Moments(orders, lambda order: record.write(fired=[order.kind, order.number, order.action]))
    watch(moments, config.run_dir / "checkpoints")
    record.listen()
    if sabotage:
        sabotage()
    try:
        outcome = train(config, interruption)
    except BaseException as error:
        traceback.print_exc()
        record.write(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    record.write(status=outcome.status, at=outcome.step, counts=moments.counts)


class Record:
    """One rank's story as it happens, beyond the reach of faults: a line per step with every number in full."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **line: Any) -> None:
        """One line in one write, so that a kill leaves whole lines."""
        with contextlib.suppress(OSError):  # a limit on the size of files is one of the faults
            os.write(self.descriptor, (json.dumps(line) + "\n").encode())

    def listen(self) -> None:
        """Writes down every step and evaluation of this process's training."""
        from dgt.training.monitor import Monitor
        from dgt.training.trainer import Trainer

        step, reported, evaluated = Trainer.step, Monitor.step, Monitor.evaluation
        ids: list[int] = []

        def with_ids(trainer: Trainer, batch: Any, *rest: Any) -> Any:
            ids[:] = batch.ids.tolist()
            return step(trainer, batch, *rest)

        def with_scalars(
            monitor: Monitor, number: int, seconds: float, waited: float, scalars: Any, *rest: Any
        ) -> None:
            exact = {name: float(value).hex() for name, value in scalars.items() if name.startswith("train/")}
            self.write(step=number, ids=ids, **exact)
            reported(monitor, number, seconds, waited, scalars, *rest)

        def with_metrics(monitor: Monitor, number: int, metrics: Any, *rest: Any) -> None:
            self.write(evaluation=number, metrics={name: float(value).hex() for name, value in metrics.items()})
            evaluated(monitor, number, metrics, *rest)

        Trainer.step, Monitor.step, Monitor.evaluation = with_ids, with_scalars, with_metrics  # type: ignore


def lines(records: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rank and content of every line, rank by rank."""
    for path in sorted(records.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            yield path.stem, json.loads(line)
