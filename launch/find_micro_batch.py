"""The largest micro-batch that fits: found by really training with ever larger ones, a process for each.

A candidate takes two optimizer steps, on this machine's GPU until CUDA has no more memory, or on the CPU within a limit
that is given. Only sizes that cut a rank's share into equal parts are tried; accumulation keeps the global batch. One
process stands for all ranks and holds the whole state, as under ddp: fsdp has room beyond what is found, and a network
that needs fsdp is judged too strictly; ZeRO's buckets and its copy of the weights are not in it on several ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import checks, program
from launch.runs import LaunchError
from launch.traffic import largest_image_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from data_pipeline.batch import Batch
    from data_pipeline.targets.instances import Instances
    from dgt.config import Config

OBJECTS = 30
"""In each image that detection tries: enough that regions, which take the memory, are as many as configured."""
OUT_OF_MEMORY = 3
"""Exit status of a candidate that has met the device's limit."""


@dataclass(frozen=True)
class Tried:
    """One candidate."""

    micro_batch: int
    fits: bool
    peak: int | None
    """Bytes: allocated by torch on a GPU; on the CPU what the process grew by since before it built the network; None
    where it broke off."""


def candidates(share: int, even: bool) -> list[int]:
    """Micro-batches that cut a rank's `share` into equal parts, in order of size; even where samples are paired."""
    return [size for size in range(1, share + 1) if share % size == 0 and not (even and size % 2)]


def largest(sizes: Sequence[int], try_one: Callable[[int], Tried]) -> tuple[int | None, list[Tried]]:
    """The largest of the rising `sizes` that fits, and all that was tried: doubling, then bisection.

    A larger one never fits where a smaller one does not.
    """
    tried: list[Tried] = []

    def fits(index: int) -> bool:
        tried.append(try_one(sizes[index]))
        return tried[-1].fits

    good, index = -1, 0
    while index < len(sizes) and fits(index):
        good = index
        if index == len(sizes) - 1:
            break
        index = next((i for i, size in enumerate(sizes) if size >= 2 * sizes[index]), len(sizes) - 1)
    else:
        bad = index
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(middle) else (good, middle)
    return (sizes[good] if good >= 0 else None), tried


def try_in_child(options: argparse.Namespace, size: int) -> Tried:
    """Trains with micro-batches of `size` in a process of its own. Raises LaunchError where that fails otherwise."""
    command = [sys.executable, "-m", "launch.find_micro_batch", "--config", options.config, "--candidate", str(size)]
    command += ["--ranks", str(options.ranks), *options.overrides]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if ended.returncode in (OUT_OF_MEMORY, -9):  # -9: ended by the kernel, which has found no more memory
        return Tried(size, False, None)
    if ended.returncode:
        raise LaunchError(f"a micro-batch of {size} could not be tried: {ended.stderr.strip()[-2000:]}")
    peak = int(json.loads(ended.stdout.splitlines()[-1])["peak"])
    return Tried(size, options.memory_gb is None or peak <= options.memory_gb * 1e9, peak)


def train_candidate(config: Config, ranks: int, size: int) -> int:
    """Two steps of one micro-batch of `size` in this process; returns the peak in bytes.

    Raises torch.OutOfMemoryError on a GPU, MemoryError or RuntimeError on the CPU.
    """
    import torch

    from dgt.tasks import build_task
    from dgt.training.ema import Ema
    from dgt.training.inputs import StepInputs
    from dgt.training.parallel import build_engine
    from dgt.training.world import joined, set_threads

    with joined() as world:
        set_threads(config.engine.threads)
        engine_config = dataclasses.replace(config.engine, name="ddp") if ranks > 1 else config.engine
        before = resident("VmRSS")
        task = build_task(config.task, config.model, config.data)
        engine = build_engine(task.build_model(), world, engine_config, config.optimizer)
        average = Ema(engine.weights(), config.ema) if config.ema.enabled else None
        batch = made_up_batch(config, size)
        for step in range(2):
            prepare = StepInputs(config, step, world.device, 0)
            engine.train_step(
                # Where steps accumulate, a second micro-batch finds the gradients of the first.
                [slice(0, size)] * min(2, -(-config.steps.share(ranks) // size)),
                lambda model, part, prepare=prepare: (  # type: ignore[misc]
                    task.loss(model, prepare(batch, part)) / config.steps.global_batch_size
                ),
                0.0,
                lambda loss, norm: True,
            )
            if average is not None:
                average.update(step)
        if world.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - before


def made_up_batch(config: Config, size: int, sides: tuple[int, int] | None = None) -> Batch:
    """`size` images of (height, width) `sides`, with what they teach; dense tasks have many objects in each.

    `sides`: None for the largest that training may meet.
    """
    import torch

    from data_pipeline.batch import Batch

    height, width = sides or largest_image_size(config)
    order = torch.arange(size)
    images = torch.zeros(size, height, width, 3, dtype=torch.uint8)
    targets: list[Any] = []
    if config.task.name == "segmentation":
        targets = [made_up_classes(config, height, width, seed) for seed in range(size)]
    elif config.task.name == "detection":
        targets = [made_up_instances(config, height, width, seed) for seed in range(size)]
    return Batch(
        images, order * 0, order, order * 0, order, order >= 0, [],
        sizes=[(height, width)] * len(targets), targets=targets,
    )  # fmt: skip


def made_up_classes(config: Config, height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """A class for each pixel, drawn at random, (height, width)."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, config.data.num_classes, (height, width), dtype=np.uint8)


def made_up_instances(config: Config, height: int, width: int, seed: int) -> Instances:
    """`OBJECTS` boxes, drawn at random, each all mask."""
    import numpy as np

    from data_pipeline.targets.instances import Instances

    rng = np.random.default_rng(seed)
    sides = np.array([width, height])
    first = rng.integers(0, sides // 2, (OBJECTS, 2))
    last = first + rng.integers(2, np.maximum(sides // 2, 3), (OBJECTS, 2))
    labels = rng.integers(0, config.data.num_classes, OBJECTS)
    masks = tuple(
        np.ones((bottom - top, right - left), np.uint8) for left, top, right, bottom in np.hstack([first, last])
    )
    return Instances(np.hstack([first, last]).astype(np.float32), labels, masks)


def resident(name: str) -> int:
    """Resident memory of this process in bytes: "VmRSS" now, "VmHWM" at most; getrusage would count its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def find(options: argparse.Namespace) -> int:
    """Tries candidates, prints a table and the override to use."""
    import torch

    from dgt.config import load
    from launch.wording import grid

    config = load(options.config, options.overrides)
    if options.ranks < 1:
        raise LaunchError(f"--ranks must be at least 1, got {options.ranks}")
    network = checks.network(config)
    checks.batches(config, options.ranks)
    checks.engine(config, network, options.ranks)
    checks.teacher(config)
    if options.candidate:
        return candidate(config, options)
    if options.memory_gb is None and not torch.cuda.is_available():
        raise LaunchError("there is no GPU here, and no limit to keep on the CPU: give one with --memory-gb")
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise LaunchError(f"--memory-gb must be above 0, got {options.memory_gb:g}")
    share = config.steps.share(options.ranks)
    best, tried = largest(candidates(share, config.mixing.enabled), lambda size: try_in_child(options, size))
    rows = [("micro-batch", "accumulation", "peak GB", "fits")]
    for entry in sorted(tried, key=lambda entry: entry.micro_batch):
        peak = f"{entry.peak / 1e9:.2f}" if entry.peak is not None else "too much"
        rows.append((str(entry.micro_batch), str(share // entry.micro_batch), peak, "yes" if entry.fits else "no"))
    print(grid(rows))
    if best is None:
        raise LaunchError(
            "not even the smallest micro-batch fits; set engine.activation_checkpointing=full, or engine.name=fsdp on "
            "more GPUs"
        )
    print(f"steps.micro_batch_size={best}")
    return 0


def candidate(config: Config, options: argparse.Namespace) -> int:
    """Body of a child."""
    import torch

    steps = dataclasses.replace(config.steps, micro_batch_size=options.candidate)
    try:
        peak = train_candidate(dataclasses.replace(config, steps=steps), options.ranks, options.candidate)
    except (torch.OutOfMemoryError, MemoryError):
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the words of torch's allocator for CPUs
            return OUT_OF_MEMORY
        raise
    print(json.dumps({"peak": peak}))
    return 0


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = argparse.ArgumentParser(
        prog="dgt-find-micro-batch", description="Find the largest steps.micro_batch_size that fits, by trying."
    )
    result.add_argument("--config", required=True, metavar="FILE", help="configuration, YAML")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.precision=bf16")
    result.add_argument(
        "--ranks", type=int, default=1, metavar="N",
        help="of the run that is planned, all together; with several one process stands for a rank of ddp, which holds "
        "the whole state: fsdp has room beyond what is found, ZeRO may need more (default: %(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--memory-gb", type=float, metavar="G",
        help="10^9 bytes that training may take on a rank, on the CPU by what the process grows, without Python and "
        "libraries; on a GPU the default is all there is",
    )  # fmt: skip
    result.add_argument("--candidate", type=int, help=argparse.SUPPRESS)  # how it starts its children
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Finds it; returns the exit status."""
    chosen = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-find-micro-batch", lambda: find(chosen))


if __name__ == "__main__":
    sys.exit(main())
