"""Evaluate weights exactly: every sample of a split once, whatever the number of ranks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program
from launch.runs import LaunchError

if TYPE_CHECKING:
    from data_pipeline.loader import Batch, Loader
    from dgt.training.world import World

MAX_CONFUSION_CLASSES = 2048
"""Most classes for which every pair of classes is counted; the counts take 8 bytes each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-evaluate", lambda: evaluate(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-evaluate",
        description="Evaluate weights on every sample of a split; alone, or as the ranks of torchrun or srun. "
        "The number of ranks does not change what is counted.",
    )
    result.add_argument(
        "--config", metavar="FILE", help="configuration of the run, YAML (default: that of the weights)"
    )
    result.add_argument("--run", metavar="DIR", help="the run's folder")
    result.add_argument(
        "--checkpoint", default="best", metavar="WHICH",
        help="best (default), newest, the path of a step_* folder, of a run's folder (its best), or of a file that "
        "launch/export.py has written",
    )  # fmt: skip
    result.add_argument("--split", metavar="NAME", help="split of the data (default: data.val_split)")
    result.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run kept an average")
    result.add_argument("--image-size", type=int, metavar="N", help="pixels a side (default: data.image_size)")
    result.add_argument("--crop-pct", type=float, metavar="X", help="share of the short side (data.eval_crop_pct)")
    result.add_argument("--batch-size", type=int, metavar="N", help="images of one pass on one rank")
    result.add_argument(
        "--flip", nargs="?", choices=("probabilities", "logits"), const="probabilities",
        help="answer with the mean over each image and its mirror image; of what (default: probabilities)",
    )  # fmt: skip
    result.add_argument("--out", metavar="DIR", help="write tables (CSV, JSON) and pictures (PNG) there")
    result.add_argument("--json", action="store_true", help="print one line of JSON")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR")
    return result


def evaluate(options: argparse.Namespace) -> int:
    """One rank's part; rank 0 prints and writes."""
    from data_pipeline.loader import build_loader
    from dgt.tasks import Classification, build_task
    from dgt.tasks.counts import Counts
    from dgt.training import evaluate as exact
    from dgt.training.world import joined, set_threads
    from launch import checks, report, sources
    from launch.cluster import rank_variables
    from launch.train import set_up_logging

    os.environ.update(rank_variables(os.environ))
    set_up_logging(int(os.environ.get("RANK", 0)), sys.stderr)
    source = sources.find(options)
    config, split = source.config, options.split or source.config.data.val_split
    checks.network(config)
    with joined() as world:
        set_threads(config.engine.threads)
        if options.out:
            world.on_main(lambda: report.make_folder(Path(options.out)))
        found = world.on_main(source.verified)
        task = build_task(config.task, config.model, config.data)
        if not isinstance(task, Classification):
            raise LaunchError(f"task.name: {config.task.name} is not evaluated by this program")
        task.counts = Counts(task.num_classes, confusion=task.num_classes <= MAX_CONFUSION_CLASSES)
        network = task.build_model()
        tensors, kind = found.read(network, options.weights)
        network.load_state_dict(tensors)
        if options.flip:
            network = exact.Flipped(network, options.flip)
        inference = exact.Inference(network, world, config.engine)
        per_pass = config.steps.evaluate_batch_size or config.steps.micro_batch_size
        loader = build_loader(
            config.data, split, train=False, global_batch_size=per_pass * world.size,
            rank=world.rank, world_size=world.size, seed=config.seed,
        )  # fmt: skip
        with loader:
            clock = Clock(loader, world)
            totals = exact.evaluate(inference, task, clock, config.data)
            rate = clock.rate()
            names = tuple(loader.source.class_names)
        if world.is_main and totals is not None:
            counted = task.counts.read(totals)
            facts = {
                "checkpoint": str(found.path), "step": found.step, "weights": kind, "split": split,
                "image_size": config.data.image_size, "crop_pct": config.data.eval_crop_pct, "flip": options.flip,
                "precision": config.engine.precision, "ranks": world.size, "batch_size": per_pass,
                "device": report.device_name(world.device), "images_per_s": rate,
            }  # fmt: skip
            if options.out:
                report.write(Path(options.out), facts, counted, names)
            report.show(options.json, facts, counted, names)
    return 0


class Clock:
    """A loader that measures how fast it is used, from its second batch on: the first one pays for every start-up."""

    def __init__(self, loader: Loader, world: World):
        self.loader, self.world = loader, world
        self.images = 0
        self.seconds = 0.0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        started = None
        for batch in self.loader:
            if started is not None:
                self.images += int(batch.valid.sum())
            yield batch
            started = self.now() if started is None else started
        self.seconds = self.now() - started if started is not None else 0.0

    def now(self) -> float:
        """The time, in seconds, once the device has done what it was given."""
        import torch

        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter()

    def rate(self) -> float | None:
        """Images per second of all ranks together; None where a single batch was all. All ranks call it."""
        images, seconds = zip(*self.world.gather((self.images, self.seconds)), strict=True)
        return sum(images) / max(seconds) if sum(images) else None


if __name__ == "__main__":
    sys.exit(main())
