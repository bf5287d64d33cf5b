"""Memory of one training step of dense tasks, grouped and dense: python -m benchmarks.dense_memory [--check] [--json F]

Each case takes optimizer steps of one micro-batch with random images and made-up targets (as
launch/find_micro_batch.py makes them), in a fresh process on the CPU in float32. The same network is measured twice: as
it is, and with top_k beyond the number of tokens of every stage, where DG-Attention is ordinary attention. Given are

- peak: most bytes that torch's allocator had handed out at one moment of the last step, by torch.profiler: weights,
  gradients, moments (which are there from the beginning, so that one step tells) and activations; what oneDNN
  allocates for itself is in the resident memory alone;
- resident: by how much the process grew at most since before the network was built;
- seconds of the last step, and multiply-accumulates of one image's evaluation.

Torch's ordinary attention on CPUs is fused and keeps no matrix of scores, so that grouping saves time, and need not
save memory. --check exits with 1 where the grouped network does not need less memory than the dense one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this folder must not be taken for the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dgt.config import Config

CASES = ("segmentation", "detection")
ATTENTION = ("grouped", "dense")
BEYOND = 10**9
"""Keys of a group, more than there are tokens."""


def configuration(case: str, attention: str, options: argparse.Namespace) -> Config:
    """UPerNet on 512 x 512 crops of 150 classes, or Mask R-CNN on 800 x 1333 images of 80, with their default heads."""
    from data_pipeline.config import DataConfig
    from data_pipeline.dense_config import DetectionDataConfig, SegmentationDataConfig
    from dgt.models import ModelConfig
    from dgt.tasks import DetectionConfig, SegmentationConfig
    from dgt.training.ema import EmaConfig
    from dgt.training.mixing import MixingConfig
    from dgt.training.parallel import EngineConfig
    from dgt.training.steps import StepsConfig

    small: dict[str, Any] = {}
    if options.scale < 1:  # for a look at the benchmark itself
        crop = round(512 * options.scale / 32) * 32
        sides = round(800 * options.scale / 32) * 32
        small = {
            "segmentation": SegmentationDataConfig(crop_size=crop, short_side=crop),
            "detection": DetectionDataConfig(short_sides=(sides,), long_side=sides * 5 // 3, eval_short_side=sides),
        }
    classes, batch = (150, options.batch) if case == "segmentation" else (80, 1)
    return Config(
        name="dense_memory",
        task=SegmentationConfig() if case == "segmentation" else DetectionConfig(),
        model=ModelConfig(options.model, drop_path_rate=0.1, top_k=BEYOND if attention == "dense" else None),
        data=DataConfig(num_classes=classes, **small),
        steps=StepsConfig(global_batch_size=batch, micro_batch_size=batch),
        mixing=MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
        ema=EmaConfig(decay=0.0),
        engine=EngineConfig(precision="fp32", threads=options.threads, activation_checkpointing=options.checkpointing),
    )


def measure_here(config: Config, steps: int) -> dict[str, Any]:
    """Peaks in bytes, seconds and multiply-accumulates of one configuration, in this process."""
    import torch

    from benchmarks.plan_memory import peak_in
    from dgt.tasks import build_task
    from dgt.training.inputs import StepInputs
    from dgt.training.parallel import build_engine
    from dgt.training.world import joined, set_threads
    from launch.find_micro_batch import made_up_batch, resident
    from launch.traffic import image_size

    size, seconds = config.steps.global_batch_size, 0.0
    with joined() as world:
        set_threads(config.engine.threads)
        before = resident("VmRSS")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.manual_seed(0)
            task = build_task(config.task, config.model, config.data)
            network = task.build_model()
            engine = build_engine(network, world, config.engine, config.optimizer)
            batch = made_up_batch(config, size, image_size(config))
            assert isinstance(batch.images, torch.Tensor)
            batch.images.random_(256)
            for step in range(steps):
                prepare, started = StepInputs(config, step, world.device, 0), time.perf_counter()
                with torch.profiler.record_function(f"step {step}"):
                    engine.train_step(
                        [slice(0, size)],
                        lambda model, part, prepare=prepare: task.loss(model, prepare(batch, part)) / size,  # type: ignore[misc]
                        1e-4,
                        lambda loss, norm: True,
                    )
                seconds = time.perf_counter() - started
    height, width = image_size(config)
    return {
        "size": [size, height, width],
        "peak": peak_in(profile, f"step {steps - 1}"),
        "resident": resident("VmHWM") - before,
        "seconds": seconds,
        "macs": task.macs(network, height, width),
    }


def measure(case: str, attention: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.dense_memory", "--here", case, attention]
    for name in ("model", "batch", "threads", "scale", "checkpointing", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return {"case": case, "attention": attention, **json.loads(ended.stdout.splitlines()[-1])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints one table; with --check the exit code is 1 where grouping does not need less memory."""
    options = parser().parse_args(arguments)
    if options.here:
        print(json.dumps(measure_here(configuration(*options.here, options), options.steps)))
        return 0
    from rich.console import Console
    from rich.table import Table

    from benchmarks.data import report

    rows = [measure(case, attention, options) for case in options.cases for attention in ATTENTION]
    table = Table(title=f"one training step of {options.model}, float32, recomputation: {options.checkpointing}")
    for column in ("task", "images", "attention", "peak GB", "resident GB", "s/step", "GMACs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        count, height, width = row["size"]
        numbers = (f"{row['peak'] / 1e9:.2f}", f"{row['resident'] / 1e9:.2f}", f"{row['seconds']:.1f}")
        table.add_row(
            row["case"], f"{count} x {height} x {width}", row["attention"], *numbers, f"{row['macs'] / 1e9:.1f}"
        )
    Console(width=110).print(table)
    if options.json:
        facts = {
            "machine": report.machine(),
            "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
            "commit": report.commit(),
            "command": shlex.join(["python", "-m", "benchmarks.dense_memory", *sys.argv[1:]]),
        }
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return int(options.check and not all(saves(rows, case) for case in options.cases))


def saves(rows: Sequence[dict[str, Any]], case: str) -> bool:
    """Whether the grouped network of a case has the lower peak."""
    peaks = {row["attention"]: row["peak"] for row in rows if row["case"] == case}
    return peaks["grouped"] < peaks["dense"]


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    result.add_argument("--model", default="dgt_tiny")
    result.add_argument("--batch", type=int, default=2, help="crops of segmentation; detection has one image")
    result.add_argument("--threads", type=int, default=0, help="0: all cores")
    result.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    result.add_argument("--steps", type=int, default=2, help="the last is measured; default %(default)s")
    result.add_argument("--scale", type=float, default=1.0, help="smaller images, to try the benchmark itself")
    result.add_argument("--check", action="store_true", help="exit with 1 where grouping does not need less memory")
    result.add_argument("--json", type=Path, help="write all numbers and the machine to this file")
    result.add_argument("--here", nargs=2, help=argparse.SUPPRESS)  # how it starts itself
    return result


if __name__ == "__main__":
    sys.exit(main())
