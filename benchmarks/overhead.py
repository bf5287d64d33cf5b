"""What the training loop costs beside a bare PyTorch loop: python -m benchmarks.overhead [--check] [--json FILE]

Both train the same network on the same batches of the same loader with the same optimizer, clipping, mixing, schedule
and average; `bare` is the least code that does so, `loop` is `dgt.training.trainer` with its reports, guard, watchdog
and signal handling as they are by default. They take turns step by step within one process, so that whatever else the
machine does meets both, and share allocator and caches; each round is a fresh process of one rank on the CPU. A step is
timed from its beginning until the next batch is there, for the loop with all that it does between steps. The first
steps, and checkpoints and evaluations, are not in it.

CPU seconds of the process are what is compared, as they do not count the time in which other programs have the cores.
They hold all threads: the loop's watchdog and reports, and each loader's, which prepares its next batch while the other
contestant computes. Wall seconds are given beside them, for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this folder must not be taken for the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dgt.config import Config

TARGET = 0.02
"""Largest share of the bare loop's time that the loop may cost."""
CONTESTANTS = ("bare", "loop")
WARM_UP = 5
"""Steps that are not counted."""


def configuration(folder: Path, options: argparse.Namespace) -> Config:
    """The run: everything as it is by default but its size."""
    from data_pipeline.config import DataConfig, SyntheticConfig
    from dgt.models import ModelConfig
    from dgt.training.checkpoint import CheckpointConfig
    from dgt.training.parallel import EngineConfig
    from dgt.training.steps import StepsConfig

    total = options.steps + WARM_UP + 1
    return Config(
        name="overhead",
        output_dir=str(folder),
        model=ModelConfig(name=options.model, drop_path_rate=0.1),
        data=DataConfig(
            backend="synthetic", num_classes=10, image_size=options.image_size, num_threads=1,
            synthetic=SyntheticConfig(train_samples=total * options.batch, val_samples=1),
        ),
        steps=StepsConfig(
            epochs=1, global_batch_size=options.batch, micro_batch_size=options.batch, evaluate_every_epochs=0
        ),
        engine=EngineConfig(precision="fp32", threads=1),
        checkpoint=CheckpointConfig(every_steps=10**9),
    )  # fmt: skip


def clocks() -> tuple[float, float]:
    """CPU seconds of this process, and wall seconds."""
    return time.process_time(), time.perf_counter()


def since(begun: tuple[float, float]) -> tuple[float, float]:
    """What both clocks have gone on by."""
    cpu, wall = clocks()
    return cpu - begun[0], wall - begun[1]


def bare(config: Config) -> Iterator[None]:
    """The least code that trains alike; each `next` but the first takes a step, and fetches the batch that follows."""
    import torch

    from data_pipeline.loader import build_loader
    from dgt.tasks import build_task
    from dgt.training.ema import decay_at
    from dgt.training.inputs import StepInputs
    from dgt.training.optim import build_optimizer, set_learning_rate
    from dgt.training.schedule import learning_rate

    task = build_task(config.task, config.model, config.data)
    network = task.build_model().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(network, config.optimizer)
    weights = list(network.parameters())
    averages = [weight.detach().clone() for weight in weights]
    size, cpu = config.steps.global_batch_size, torch.device("cpu")
    with build_loader(
        config.data, "train", train=True, global_batch_size=size, rank=0, world_size=1, seed=config.seed
    ) as loader:
        for step, batch in enumerate(loader):
            yield
            set_learning_rate(
                optimizer,
                learning_rate(
                    step, peak=config.optimizer.lr, total_steps=len(loader), steps_per_epoch=len(loader),
                    config=config.schedule,
                ),
            )  # fmt: skip
            inputs = StepInputs(config, step, cpu, 0)(batch, slice(0, size))
            loss = task.loss(network, inputs) / size
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, config.optimizer.clip_grad_norm, foreach=True)
            if not (loss.isfinite() and norm.isfinite()):
                raise RuntimeError(f"the loss is {float(loss)} at step {step}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - decay_at(step, config.ema))


def measure_here(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CPU and wall seconds of a step of each contestant in this process, means over the counted steps."""
    from dgt.training.trainer import Trainer, train

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), options)
        other, real, begun = bare(config), Trainer.step, clocks()

        def step(self: Trainer, *args: Any) -> bool:
            nonlocal begun
            times["loop"].append(since(begun))  # of the step before, and what came after it
            begun = clocks()
            next(other)
            times["bare"].append(since(begun))
            begun = clocks()
            return real(self, *args)

        Trainer.step = step  # type: ignore[method-assign]
        train(config)
        other.close()  # type: ignore[attr-defined]
    result = {}
    for name, first in (("bare", WARM_UP), ("loop", WARM_UP + 1)):
        counted = times[name][first : first + options.steps]
        cpu, wall = (statistics.fmean(clock) for clock in zip(*counted, strict=True))
        result[name] = {"cpu": cpu, "wall": wall}
    return result


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every round's seconds of both."""
    rounds = []
    for _ in range(options.rounds):
        command = [sys.executable, "-m", "benchmarks.overhead", "--here"]
        for name in ("model", "image_size", "batch", "steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        rounds.append(json.loads(ended.stdout.splitlines()[-1]))
    return rounds


def overhead(rounds: Sequence[dict[str, Any]], clock: str) -> list[float]:
    """Each round's cost of the loop as a share of the bare one, in order of size."""
    return sorted(found["loop"][clock] / found["bare"][clock] - 1 for found in rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints one table; with --check the exit code is 1 where the target is missed."""
    options = parser().parse_args(arguments)
    if options.here:
        print(json.dumps(measure_here(options)))
        return 0
    from rich.console import Console
    from rich.table import Table

    from benchmarks.data import report

    rounds = measure(options)
    table = Table(title=f"{options.model} at {options.image_size} px, batch {options.batch}, {options.rounds} rounds")
    for column in ("clock", "bare ms/step", "loop ms/step", "overhead", "spread", "target"):
        table.add_column(column, justify="right")
    for clock in ("cpu", "wall"):
        shares = overhead(rounds, clock)
        middle = [f"{1e3 * statistics.median(r[name][clock] for r in rounds):.1f}" for name in CONTESTANTS]
        spread = f"{100 * shares[0]:+.1f} to {100 * shares[-1]:+.1f} %"
        target = f"{100 * TARGET:.0f} %" if clock == "cpu" else ""
        table.add_row(clock, *middle, f"{100 * statistics.median(shares):+.2f} %", spread, target)
    Console().print(table)
    if options.json:
        facts = {
            "machine": report.machine(),
            "versions": {name: version(name) for name in ("torch", "timm")},
            "commit": report.commit(),
            "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]]),
        }
        options.json.write_text(json.dumps({**facts, "rounds": rounds}, indent=1) + "\n")
    return int(options.check and statistics.median(overhead(rounds, "cpu")) > TARGET)


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="dgt_nano")
    result.add_argument("--image-size", type=int, default=64)
    result.add_argument("--batch", type=int, default=64, help="default: that of the smallest recipe, dgt_nano_digits")
    result.add_argument("--steps", type=int, default=50, help="counted steps of a process; default %(default)s")
    result.add_argument("--rounds", type=int, default=8, help="processes; default %(default)s")
    result.add_argument("--check", action="store_true", help="exit with 1 where the target is missed")
    result.add_argument("--json", type=Path, help="write all numbers and the machine to this file")
    result.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # how it starts itself
    return result


if __name__ == "__main__":
    sys.exit(main())
