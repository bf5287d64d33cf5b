"""The plan's memory against what training holds: python -m benchmarks.plan_memory [--json FILE]

Each case builds the engine and the average and takes two optimizer steps with real numbers, in one process per rank on
the CPU. What torch's allocator hands out and takes back is recorded by torch.profiler from before the network is built;
its peak during the steps is compared with `launch.memory.estimate`, which has seen no numbers. Not in it on either
side: the interpreter, libraries, and what oneDNN allocates for itself. The resident memory beside it holds all of that,
less what the process held before the network was built.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgt.config import Config
from tests.training.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str
    engine: str
    ranks: int
    micro_batch: int
    image_size: int = 64
    checkpointing: str = "none"
    precision: str = "fp32"
    accumulation: int = 1

    def config(self) -> Config:
        """The configuration of a run."""
        from data_pipeline.config import DataConfig
        from dgt.models import ModelConfig
        from dgt.training.parallel import EngineConfig
        from dgt.training.steps import StepsConfig

        engine: Any = {"activation_checkpointing": self.checkpointing, "precision": self.precision, "threads": 1}
        return Config(
            model=ModelConfig(name=self.model, drop_path_rate=0.1),
            data=DataConfig(backend="synthetic", num_classes=10, image_size=self.image_size),
            steps=StepsConfig(
                global_batch_size=self.ranks * self.micro_batch * self.accumulation, micro_batch_size=self.micro_batch
            ),
            engine=EngineConfig(name=self.engine, **engine),  # type: ignore[arg-type]
        )


CASES = [
    Case("dgt_nano", "ddp", 1, 4),
    Case("dgt_nano", "ddp", 1, 16),
    Case("dgt_nano", "ddp", 1, 64),
    Case("dgt_nano", "ddp", 1, 16, checkpointing="selective"),
    Case("dgt_nano", "ddp", 1, 16, checkpointing="full"),
    Case("dgt_nano", "ddp", 1, 16, precision="bf16"),
    Case("dgt_nano", "ddp", 1, 16, accumulation=2),
    Case("dgt_nano", "ddp", 2, 4),
    Case("dgt_nano", "ddp", 2, 16),
    Case("dgt_nano", "fsdp", 2, 4),
    Case("dgt_nano", "fsdp", 2, 16),
    Case("dgt_nano", "fsdp", 2, 16, checkpointing="full"),
    Case("dgt_nano", "fsdp", 2, 16, precision="bf16"),
    Case("dgt_nano", "fsdp", 2, 16, accumulation=2),
    Case("dgt_tiny", "ddp", 1, 2, 224),
    Case("dgt_tiny", "ddp", 1, 8, 224),
    Case("dgt_tiny", "ddp", 1, 8, 224, "selective"),
    Case("dgt_tiny", "ddp", 1, 8, 224, "full"),
    Case("dgt_tiny", "ddp", 2, 2, 224),
    Case("dgt_tiny", "fsdp", 2, 2, 224),
    Case("dgt_tiny", "fsdp", 2, 2, 224, "full"),
]


def measure(config: Config) -> tuple[int, int]:
    """Peak bytes of this rank's tensors in two steps, and the growth of its resident memory."""
    from data_pipeline.loader import Batch
    from dgt.tasks import build_task
    from dgt.training.ema import Ema
    from dgt.training.inputs import StepInputs
    from dgt.training.parallel import build_engine
    from dgt.training.world import joined, set_threads

    with joined() as world:
        set_threads(config.engine.threads)
        before = resident("VmRSS")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            task = build_task(config.task, config.model, config.data)
            engine = build_engine(task.build_model(), world, config.engine, config.optimizer)
            average = Ema(engine.weights(), config.ema)
            share, side, steps = config.steps.share(world.size), config.data.image_size, config.steps
            order = torch.arange(share)
            pixels = torch.randint(256, (share, side, side, 3), dtype=torch.uint8)
            batch = Batch(pixels, order % 10, order, order * 0, order, order >= 0, [])
            parts = [slice(i, i + steps.micro_batch_size) for i in range(0, share, steps.micro_batch_size)]
            for step in range(2):
                prepare = StepInputs(config, step, world.device, epoch=0)
                with torch.profiler.record_function("step"):
                    engine.train_step(
                        parts,
                        lambda model, part, prepare=prepare: (  # type: ignore[misc]
                            task.loss(model, prepare(batch, part)) / steps.global_batch_size
                        ),
                        1e-3,
                        lambda loss, norm: True,
                    )
                average.update(step)
    return peak_in(profile, "step"), resident("VmHWM") - before


def peak_in(profile: torch.profiler.profile, name: str) -> int:
    """Most bytes that the allocator had handed out at one moment within the record functions called `name`."""
    kineto: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(kineto.events(), key=lambda event: event.start_ns())
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == name]
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if any(start <= event.start_ns() <= end for start, end in spans):
                peak = max(peak, held)
    return peak


def resident(name: str) -> int:
    """Resident memory of this process in bytes: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def compare(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes of rank 0."""
    from launch import checks, memory

    config = case.config()
    predicted = memory.estimate(config, checks.network(config), case.ranks).total
    measured, grown = run_ranks(case.ranks, measure, config)[0].value
    return {**vars(case), "predicted": predicted, "measured": measured, "resident": grown,
            "error": predicted / measured - 1}  # fmt: skip


def main() -> None:
    """Measures every case and prints one table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    table = Table(title=f"memory of rank 0, {platform.machine()}, torch {torch.__version__}")
    names = ("model", "engine", "ranks", "micro", "px", "checkpointing", "precision", "accumulation")
    for column in (*names, "plan MB", "measured MB", "error", "resident MB"):
        table.add_column(column, justify="right")
    results = []
    for case in CASES:
        found = compare(case)
        results.append(found)
        numbers = [f"{found[name] / 1e6:.1f}" for name in ("predicted", "measured")]
        error, grown = f"{100 * found['error']:+.1f} %", f"{found['resident'] / 1e6:.0f}"
        table.add_row(*map(str, vars(case).values()), *numbers, error, grown)
        print(found, flush=True)
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
