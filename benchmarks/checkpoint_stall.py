"""For how long a checkpoint stops training: python -m benchmarks.checkpoint_stall [--model dgt_tiny] [--check]

Two ranks train a network of the size that is asked for and save its whole state (weights, moments, average), in turns
with and without `checkpoint.asynchronous`, on the same disk, within one run. The stall is what `Saver` reports: for the
synchronous save all of it; for the asynchronous one the copy to host memory and the wait at its conclusion, which comes
once it is done, while steps go on. The slowest rank counts. A step during an asynchronous save is compared with a step
without, because on a CPU both want the same cores. Every other round has the other order; round 0 is not counted: it
fills the buffers. Tables show medians over the rounds with the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this folder must not be taken for the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from benchmarks.data import report

RANKS = 2
TARGET = 0.10
"""Largest share of the synchronous stall that the asynchronous one may have."""
MODES = ("synchronous", "asynchronous")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every engine, prints one table; with --check the exit code is 1 where the target is missed."""
    options = parser().parse_args(arguments)
    facts = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": report.machine(),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "commit": report.commit(),
        "command": shlex.join(["python", "-m", "benchmarks.checkpoint_stall", *sys.argv[1:]]),
        "settings": {
            "model": options.model,
            "ranks": RANKS,
            "rounds": options.rounds,
            "image_size": options.image_size,
        },
    }
    results = []
    for engine in options.engines:
        print(f"{engine}: {options.rounds} rounds", file=sys.stderr, flush=True)
        results.append(summary(engine, measure(engine, options)))
    show(results, options.model)
    if options.out:
        options.out.write_text(json.dumps(facts | {"target": TARGET, "results": results}, indent=1) + "\n")
    return int(options.check and any(result["stall_ratio"]["median"] > TARGET for result in results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--model", default="dgt_tiny", help="default %(default)s")
    add("--engines", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp"), help="default: both")
    add("--rounds", type=int, default=7, help="rounds that are counted; default %(default)s")
    add("--image-size", type=int, default=64, help="of the one image per rank and step; default %(default)s")
    add("--folder", type=Path, default=report.REPOSITORY / "build" / "benchmarks", help="on the disk to measure")
    add("--out", type=Path, metavar="JSON", help="write the machine, versions and every round to this file")
    add(
        "--check",
        action="store_true",
        help=f"exit with 1 where a stall is more than {TARGET:.0%} of a synchronous save",
    )
    return result


def measure(engine: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of one engine, each as the slowest rank had it."""
    options.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        pipe, sender = context.Pipe(duplex=False)
        port = free.getsockname()[1]
        free.close()
        ranks = [
            context.Process(target=rank_main, args=(rank, port, engine, Path(folder), vars(options), sender))
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        sender.close()
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit(f"a rank of {engine} has failed; see its traceback above") from None
        finally:
            for rank in ranks:
                rank.join()


def rank_main(rank: int, port: int, engine: str, folder: Path, options: dict[str, Any], sender: Any) -> None:
    """One rank: trains, saves in turns, and tells the rounds from rank 0."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    from dgt.training.checkpoint import CheckpointConfig
    from dgt.training.saver import Saver
    from dgt.training.world import joined, set_threads

    with joined() as world:
        set_threads(0)
        step, pieces = training(engine, world, options)
        savers = {
            mode: Saver(folder / mode, world, lambda: None, CheckpointConfig(asynchronous=mode == "asynchronous"))
            for mode in MODES
        }
        rounds: list[dict[str, Any]] = []
        for number in range(options["rounds"] + 1):
            found: dict[str, Any] = {
                "step_seconds": statistics.median(timed(lambda: step(lambda: None)) for _ in range(5))
            }
            for mode in MODES if number % 2 else MODES[::-1]:
                found[mode] = one_save(savers[mode], number, step, pieces(), world)
            rounds += [slowest(world.gather(found))] if number else []
            if rank == 0:
                shutil.rmtree(folder)
            world.barrier()
        if rank == 0:
            sender.send(rounds)


def training(
    engine_name: str, world: Any, options: dict[str, Any]
) -> tuple[Callable[[Callable[[], None]], object], Callable[[], Any]]:
    """A function that takes one training step, and one that gives this rank's pieces of the whole state.

    The step calls what it is given before it changes anything.
    """
    import timm
    import torch

    import dgt.models  # noqa: F401  (registers the networks)
    from dgt.training.ema import Ema, EmaConfig
    from dgt.training.optim import OptimizerConfig
    from dgt.training.parallel import EngineConfig, build_engine

    torch.manual_seed(0)
    network = timm.create_model(options["model"], num_classes=1000)
    engine = build_engine(network, world, EngineConfig(name=engine_name, precision="fp32"), OptimizerConfig())
    ema = Ema(engine.weights(), EmaConfig())
    images = torch.randn(1, 3, options["image_size"], options["image_size"], device=world.device)
    steps = 0

    def step(let_change: Callable[[], None]) -> None:
        nonlocal steps

        def accept(loss: float, norm: float) -> bool:
            let_change()
            return True

        engine.train_step([images], lambda model, x: model(x).square().mean() / world.size, 1e-4, accept)
        ema.update(steps)
        steps += 1

    def pieces() -> Any:
        return engine.state() | {f"ema.{name}": piece for name, piece in ema.averages.items()}

    return step, pieces


def timed(act: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def one_save(
    saver: Any, number: int, step: Callable[[Callable[[], None]], object], pieces: Any, world: Any
) -> dict[str, Any]:
    """Saves once, and trains until it is done."""
    world.barrier()
    saver.begin(number, pieces, {"progress": {}})
    steps = []
    while not saver.is_done():
        steps.append(timed(lambda: step(saver.let_change)))
    saved = saver.finish()
    if saved.error:
        raise SystemExit(saved.error)
    size = sum(piece.share().local.nbytes for piece in pieces.values())
    return {"stall": saved.stall, "seconds": saved.seconds, "step_seconds": steps, "bytes": size}


def slowest(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One round of all ranks together."""
    modes = {
        mode: {
            "stall": max(rank[mode]["stall"] for rank in ranks),
            "seconds": max(rank[mode]["seconds"] for rank in ranks),
            "bytes": sum(rank[mode]["bytes"] for rank in ranks),
            "step_seconds": max((rank[mode]["step_seconds"] for rank in ranks), key=sum),
        }
        for mode in MODES
    }
    return {"step_seconds": max(rank["step_seconds"] for rank in ranks)} | modes


def summary(engine: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with the least and the largest, and all rounds."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    during = [statistics.median(r["asynchronous"]["step_seconds"]) for r in rounds if r["asynchronous"]["step_seconds"]]
    return {
        "engine": engine,
        "bytes": rounds[0]["synchronous"]["bytes"],
        "synchronous_stall": spread([r["synchronous"]["stall"] for r in rounds]),
        "asynchronous_stall": spread([r["asynchronous"]["stall"] for r in rounds]),
        "stall_ratio": spread([r["asynchronous"]["stall"] / r["synchronous"]["stall"] for r in rounds]),
        "asynchronous_seconds": spread([r["asynchronous"]["seconds"] for r in rounds]),
        "step_seconds": spread([r["step_seconds"] for r in rounds]),
        "step_seconds_during_save": spread(during) if during else None,
        "rounds": rounds,
    }


def show(results: Sequence[dict[str, Any]], model: str) -> None:
    """One row per engine."""
    table = Table(title=f"a checkpoint of {model}, {RANKS} ranks; seconds: median (least to most)")
    columns = (
        "engine",
        "MB",
        "stall, synchronous",
        "stall, asynchronous",
        "ratio",
        "until commit",
        "step",
        "step during",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "engine" else "right")
    for result in results:
        stalls = [cell(result[f"{mode}_stall"]) for mode in MODES]
        ratio = cell(result["stall_ratio"], 100, 1) + " %"
        others = [result["asynchronous_seconds"], result["step_seconds"], result["step_seconds_during_save"]]
        megabytes = f"{result['bytes'] / 1e6:.0f}"
        table.add_row(result["engine"], megabytes, *stalls, ratio, *(cell(one) if one else "none" for one in others))
    Console(width=160).print(table)


def cell(spread: dict[str, float], factor: float = 1.0, digits: int = 3) -> str:
    """A median and its spread."""
    median, least, most = (f"{spread[name] * factor:.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
