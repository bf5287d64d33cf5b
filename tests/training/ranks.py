"""Starts real ranks (gloo) quickly: they are forked from a server that has imported torch but never computed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Ranks share few cores here: an idle thread must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "dgt.config",
        "dgt.training.trainer",
        "dgt.training.parallel.ddp",
        "dgt.training.parallel.fsdp",
        "torch.utils.tensorboard",
        "torch._dynamo",
        "pydantic",
    ]
)


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    exitcode: int
    value: Any
    error: str


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, check: bool = True, kill_others: bool = True
) -> list[RankResult]:
    """Calls `function(*args)` in `world_size` ranks; when one dies the others are killed, or left to what they meet.

    With `check`, a rank that did not return normally fails the test with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(sender, environment, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results = collect(pipes, processes, kill_others)
    if check:
        problems = [r.error or f"exit code {r.exitcode}" for r in results if r.exitcode != 0 or r.error]
        assert not problems, "\n".join(problems)
    return results


def collect(pipes: Sequence[Any], processes: Sequence[Any], kill_others: bool) -> list[RankResult]:
    """Waits for every rank; kills the rest as soon as one has died abnormally, if so asked."""
    results: dict[int, tuple[Any, str]] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        for pipe in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(pipe)
            try:
                results[rank] = pickle.loads(pipe.recv_bytes())
                has_died = bool(results[rank][1])
            except EOFError:
                results[rank] = (None, "")
                has_died = True
            if kill_others and has_died:
                for process in processes:
                    process.kill()
    for process in processes:
        process.join()
    return [RankResult(p.exitcode, *results[rank]) for rank, p in enumerate(processes)]


def rank_main(sender: Any, environment: dict[str, Any], function: Callable[..., Any], args: Sequence[Any]) -> None:
    """Body of one rank."""
    os.environ.update({key: str(value) for key, value in environment.items()})
    try:
        value, error = function(*args), ""
    except BaseException:
        value, error = None, traceback.format_exc()
        print(error, file=sys.stderr)
    sender.send_bytes(pickle.dumps((value, error)))  # plain pickle: tensors travel by value
    sender.close()


def kill_self() -> None:
    """What a crash, a power failure or the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
