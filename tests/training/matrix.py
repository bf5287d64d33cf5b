"""Configurations that together hold every pair of the choices that could break exactness, and ranks that run them.

Undisturbed and resumed runs are computed by teams of ranks that are started once. A rank that is to be killed is a
process of its own, forked from the same server.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ranks import context, run_ranks
from small import small_config

from benchmarks.chaos.moments import Moments, Order, watch
from data_pipeline.config import SyntheticConfig
from dgt.config import Config
from dgt.models import DGTBlock, ModelConfig
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import EmaConfig
from dgt.training.mixing import MixingConfig
from dgt.training.parallel.config import DeepSpeedConfig, EngineConfig, FsdpConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train

Case = dict[str, Any]

FACTORS: dict[str, tuple[Any, ...]] = {
    "engine": ("single", "ddp", "fsdp", "hybrid", "zero1", "zero2", "zero3"),
    "recompute": ("none", "selective", "full"),
    "precision": ("fp32", "bf16"),
    "micro_batches": (1, 3),
    "averaged": (True, False),
    "mixed": (True, False),
    "drop_path": (0.2, 0.0),
    "asynchronous": (True, False),
}
"""What is combined. 3 micro-batches are ragged: the last one is smaller."""

RANKS = {"single": 1, "hybrid": 4}
"""Ranks of an engine, where they are not two."""
SHARES = {1: (4, 4), 3: (10, 4)}
"""Samples of a rank and of a micro-batch, by the number of micro-batches."""
STEPS = 6


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Cases such that any two values of any two factors meet in one of them; always the same ones.

    Greedy: each case begins with a pair that is still missing, and then takes for each factor the value that adds most.
    """
    names = list(factors)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }  # fmt: skip
    order = {pair: i for i, pair in enumerate(
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    )}  # fmt: skip
    cases: list[Case] = []
    while missing:
        chosen: Case = dict(min(missing, key=order.__getitem__))
        for name in names:
            if name not in chosen:
                values = (
                    factors[name][len(cases) % len(factors[name]) :] + factors[name][: len(cases) % len(factors[name])]
                )
                chosen[name] = max(values, key=lambda v: len(pairs_of(chosen | {name: v}, names) & missing))
        missing -= pairs_of(chosen, names)
        cases.append({name: chosen[name] for name in names})
    return cases


def pairs_of(chosen: Case, names: Sequence[str]) -> set[Any]:
    """The pairs of values in a case that may still be incomplete."""
    return set(itertools.combinations([(name, chosen[name]) for name in names if name in chosen], 2))


def every(factors: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """All cases."""
    for values in itertools.product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def title(case: Case) -> str:
    """A case in short."""
    return "-".join(f"{name}={value}" for name, value in case.items()).replace("micro_batches", "micro")


def config_of(case: Case, folder: Path) -> Config:
    """Two epochs of three steps; evaluated, and so saved, after each, and saved after every second step."""
    engine, ranks = case["engine"], RANKS.get(case["engine"], 2)
    share, micro = SHARES[case["micro_batches"]]
    batch = share * ranks
    config = small_config(
        folder,
        model=ModelConfig(name="dgt_nano", drop_path_rate=case["drop_path"]),
        steps=StepsConfig(epochs=2, global_batch_size=batch, micro_batch_size=micro),
        mixing=MixingConfig() if case["mixed"] else MixingConfig(prob=0.0),
        ema=EmaConfig(decay=0.9 if case["averaged"] else 0.0),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=3, asynchronous=case["asynchronous"]),
    )
    name = {"single": "ddp", "hybrid": "fsdp"}.get(engine, "deepspeed" if "zero" in engine else engine)
    engine_config = EngineConfig(
        name=name,
        precision=case["precision"],
        activation_checkpointing=case["recompute"],
        compile=case.get("compiled", False),
        fsdp=FsdpConfig(shard_size=2 if engine == "hybrid" else 0),
        deepspeed=DeepSpeedConfig(stage=int(engine[-1]) if "zero" in engine else 2),
        threads=1,
    )
    monitor = replace(config.monitor, tensorboard=False)
    data = replace(config.data, synthetic=SyntheticConfig(train_samples=3 * batch + 2, val_samples=7))
    return replace(config, data=data, monitor=monitor, engine=engine_config)


class Team:
    """Ranks that stay: each call is one world that they join and leave."""

    def __init__(self, size: int):
        self.members: list[tuple[Any, Any]] = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, size), daemon=True)
            process.start()
            there.close()
            self.members.append((here, process))

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; their values. Fails with the traceback of a rank that raised."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe, _ in self.members:
            pipe.send_bytes(pickle.dumps((port, function, args)))
        results = [pickle.loads(pipe.recv_bytes()) for pipe, _ in self.members]
        errors = [error for _, error in results if error]
        assert not errors, "\n".join(errors)
        return [value for value, _ in results]

    def close(self) -> None:
        """Ends the ranks."""
        for pipe, process in self.members:
            pipe.close()
            process.kill()
            process.join()


def serve(pipe: Any, rank: int, size: int) -> None:
    """Body of a team's rank."""
    import torch._dynamo

    os.environ.update({"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"})
    if size > 1:
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size)})
    while True:
        try:
            port, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        torch._dynamo.reset()  # what an earlier call compiled must not count against this one's limit of graphs
        try:
            value, error = function(*args), ""
        except BaseException:
            value, error = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps((value, error)))


@contextmanager
def teams() -> Iterator[Callable[[int], Team]]:
    """Teams by size, started when they are first asked for."""
    started: dict[int, Team] = {}

    def team(size: int) -> Team:
        if size not in started:
            started[size] = Team(size)
        return started[size]

    try:
        yield team
    finally:
        for member in started.values():
            member.close()


def finish(config: Config, backend: str = "inductor") -> str:
    """Trains to the end; blocks that are compiled are so by torch.compile's `backend`."""
    compile_with(backend)
    return train(config).status


def compile_with(backend: str) -> None:
    """Lets blocks be compiled by `backend` from here on."""
    DGTBlock.compile = functools.partialmethod(compile_block, backend=backend)  # type: ignore[assignment]


compile_block = DGTBlock.compile


def run_to_the_end(config: Config, engine: str, team: Callable[[int], Team], backend: str) -> None:
    """Trains with a team; with new ranks under DeepSpeed, which keeps what belongs to a world that was left."""
    ranks = RANKS.get(engine, 2)
    if "zero" in engine:
        ended = [rank.value for rank in run_ranks(ranks, finish, config, backend)]
    else:
        ended = team(ranks).call(finish, config, backend)
    assert ended == ["finished"] * ranks


def die(config: Config, orders: Sequence[Order], backend: str) -> None:
    """Trains until one of the orders kills this rank, or another."""
    compile_with(backend)
    rank = int(os.environ.get("RANK", 0))
    watch(Moments([order for order in orders if order.rank == rank]), config.run_dir / "checkpoints")
    train(config)


@dataclass(frozen=True)
class Interruptions:
    """Where a run is killed, once or several times in a row."""

    orders: tuple[tuple[Order, ...], ...]

    def __str__(self) -> str:
        return ", then ".join(
            " or ".join(f"{o.kind} {o.number} of rank {o.rank}" for o in each) for each in self.orders
        )


LIKELY = {"loss": 9, "step": 5, "evaluation": 3, "save": 3, "saved": 3, "create": 6, "fsync": 6, "rename": 4, "read": 4}
"""Moments at which a run is killed, and about how often each comes."""


def random_interruptions(rng: random.Random, ranks: int, times: int) -> Interruptions:
    """A random moment on a random rank for each kill, and in case it does not come, the step before the last.

    Moments of files mostly come to rank 0, which writes the manifest.
    """
    chosen = []
    for i in range(times):
        kind = rng.choice(sorted(LIKELY))
        rank = 0 if kind in ("rename", "read") else rng.randrange(ranks)
        number = rng.randint(1, max(1, LIKELY[kind] // (i + 1)))
        chosen.append((Order(kind, number, rank), Order("step", STEPS - 1 if i == 0 else 1, rng.randrange(ranks))))
    return Interruptions(tuple(chosen))


def interrupt(config: Config, ranks: int, interruptions: Interruptions, backend: str) -> int:
    """Starts the run and kills it, as often as ordered; returns how often it was killed."""
    kills = 0
    for orders in interruptions.orders:
        ended = run_ranks(ranks, die, config, orders, backend, check=False)
        killed = -9 in [rank.exitcode for rank in ended]
        kills += killed
        if not killed:
            errors = [rank.error for rank in ended if rank.error]
            assert not errors, "\n".join(errors)
            break  # it was so near its end that it reached it
    return kills
