"""Evaluate weights exactly: every sample of a split once, whatever the number of ranks."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program
from launch.runs import LaunchError

if TYPE_CHECKING:
    from data_pipeline.loader import Batch, Loader
    from data_pipeline.shards.source import Source
    from dgt.config import Config
    from dgt.tasks import Findings, Task
    from dgt.training.world import World

MAX_CONFUSION_CLASSES = 2048
"""Most classes for which every pair of classes is counted; the counts take 8 bytes each."""


OF_TASKS = {
    "image_size": ("classification",),
    "crop_pct": ("classification",),
    "flip": ("classification", "segmentation"),
    "mode": ("segmentation",),
    "scales": ("segmentation",),
    "save_predictions": ("segmentation",),
}
"""Options that are not for all tasks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-evaluate", lambda: evaluate(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-evaluate",
        description="Evaluate weights on every sample of a split: accuracy of classification, IoU of segmentation, "
        "average precision of detection. Alone, or as the ranks of torchrun or srun, whose number does not change what "
        "is counted.",
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
    result.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images that a rank takes at once; segmentation and "
        "detection answer them one after the other, so that it changes no result",
    )
    result.add_argument(
        "--flip", nargs="?", choices=("probabilities", "logits"), const="probabilities",
        help="of classification and segmentation: answer with the mean over each image and its mirror image; the mean "
        "of probabilities (default), or with classification of logits",
    )  # fmt: skip
    result.add_argument(
        "--out",
        metavar="DIR",
        help="write tables (CSV, JSON) and pictures (PNG) there, and "
        "of detection what was found (predictions*.json, as COCO's results)",
    )
    result.add_argument("--json", action="store_true", help="print one line of JSON")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR")
    images = result.add_argument_group("of classification")
    images.add_argument("--image-size", type=int, metavar="N", help="pixels a side (default: data.image_size)")
    images.add_argument("--crop-pct", type=float, metavar="X", help="share of the short side (data.eval_crop_pct)")
    pixels = result.add_argument_group("of segmentation", "each goes before what task.inference says")
    pixels.add_argument("--mode", choices=("whole", "slide"), help="the resized image at once, or in windows")
    pixels.add_argument("--scales", metavar="0.75,1,1.25", help="average over these sizes of the image")
    pixels.add_argument(
        "--save-predictions", action="store_true", help="write OUT/predictions/KEY.png: class indices in 8 bits"
    )
    return result


def evaluate(options: argparse.Namespace) -> int:
    """One rank's part; rank 0 prints and writes."""
    from data_pipeline.loader import build_loader
    from dgt.tasks import Classification, build_task
    from dgt.tasks.counts import Counts
    from dgt.training import evaluate as exact
    from dgt.training.world import joined, set_threads
    from launch import checks, report, report_segmentation, sources
    from launch.cluster import rank_variables
    from launch.train import set_up_logging

    os.environ.update(rank_variables(os.environ))
    set_up_logging(int(os.environ.get("RANK", 0)), sys.stderr)
    source = sources.find(options)
    config = for_task(source.config, options)
    split = options.split or config.data.val_split
    checks.network(config)
    with joined() as world:
        set_threads(config.engine.threads)
        if options.out:
            world.on_main(lambda: report.make_folder(Path(options.out)))
        found = world.on_main(source.verified)
        task: Any = build_task(config.task, config.model, config.data)
        network = task.build_model()
        tensors, kind = found.read(network, options.weights)
        network.load_state_dict(tensors)
        if isinstance(task, Classification):
            task.counts = Counts(task.num_classes, confusion=task.num_classes <= MAX_CONFUSION_CLASSES)
            network = exact.Flipped(network, options.flip) if options.flip else network
        inference = exact.Inference(network, world, config.engine)
        per_pass = config.steps.evaluate_batch_size or config.steps.micro_batch_size
        loader = build_loader(
            config.data, split, kind=task.kind, train=False, global_batch_size=per_pass * world.size,
            rank=world.rank, world_size=world.size, seed=config.seed,
        )  # fmt: skip
        with loader:
            clock = Clock(loader, world)
            kept = report_segmentation.Kept(task, loader.source) if options.save_predictions else task
            findings = exact.evaluate(inference, kept, clock)
            rate = clock.rate()
        if world.is_main and findings is not None:
            facts = {
                "checkpoint": str(found.path), "step": found.step, "weights": kind, "split": split,
                **settings(config, options),
                "precision": config.engine.precision, "ranks": world.size, "batch_size": per_pass,
                "device": report.device_name(world.device), "images_per_s": rate,
            }  # fmt: skip
            tell(options, config, task, facts, findings, loader.source)
    return 0


def for_task(config: Config, options: argparse.Namespace) -> Config:
    """The configuration with what the options say of a segmentation's inference.

    Raises LaunchError for options of another task, ConfigError for values out of range.
    """
    from dgt.config import ConfigError
    from dgt.tasks import SegmentationConfig

    task = config.task
    refuse_foreign(task.name, options)
    if options.save_predictions and not options.out:
        raise LaunchError("--save-predictions: name with --out DIR where they are to be written")
    if not isinstance(task, SegmentationConfig):
        return config
    if options.flip == "logits":
        raise LaunchError("--flip logits: is for classification; a segmentation averages probabilities, with --flip")
    try:
        asked: dict[str, Any] = {
            "flip": True if options.flip else None,
            "mode": options.mode,
            "scales": tuple(map(float, options.scales.split(","))) if options.scales else None,
        }
    except ValueError:
        raise LaunchError(f"--scales {options.scales}: is no list of factors such as 0.75,1,1.25") from None
    try:
        stated = {key: value for key, value in asked.items() if value is not None}
        inference = dataclasses.replace(task.inference, **stated)
    except ValueError as error:
        raise ConfigError(f"task.inference.{error}") from None
    return dataclasses.replace(config, task=dataclasses.replace(task, inference=inference))


def refuse_foreign(task: str, options: argparse.Namespace) -> None:
    """Raises LaunchError where an option is one of another task."""
    sizes = {
        "segmentation": "images are resized whole, as data.segmentation.short_side and .long_side say; add "
        "data.segmentation.short_side=N",
        "detection": "images are resized whole, as data.detection.eval_short_side and .long_side say; add "
        "data.detection.eval_short_side=N",
    }
    for option, tasks in OF_TASKS.items():
        if getattr(options, option) and task not in tasks:
            hint = f": {sizes[task]}" if option in ("image_size", "crop_pct") else ""
            raise LaunchError(
                f"--{option.replace('_', '-')} is for {' and '.join(tasks)}, and these weights are for {task}{hint}"
            )


def settings(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """How images were answered."""
    from launch import report_detection, report_segmentation

    if config.task.name == "segmentation":
        return report_segmentation.settings(config)
    if config.task.name == "detection":
        return report_detection.settings(config)
    return {"image_size": config.data.image_size, "crop_pct": config.data.eval_crop_pct, "flip": options.flip}


def tell(
    options: argparse.Namespace, config: Config, task: Task, facts: dict[str, Any], found: Findings, source: Source
) -> None:
    """Writes and prints what was found, in the way of the task. Raises DataError where nothing was."""
    from dgt.tasks import Classification
    from dgt.tasks.pixels import PixelCounts
    from launch import report, report_detection, report_segmentation

    out, names = Path(options.out) if options.out else None, tuple(source.class_names)
    if isinstance(task, Classification):
        counted = task.counts.read(found.totals)
        if out:
            report.write(out, facts, counted, names)
        report.show(options.json, facts, counted, names)
    elif task.kind == "segmentation":
        pixels = PixelCounts(config.data.num_classes).read(found.totals)
        if out:
            report_segmentation.write(out, facts, pixels, names, found)
        report_segmentation.show(options.json, facts, pixels, names)
    else:
        judgement = report_detection.judge(config, found, source)
        if out:
            report_detection.write(out, facts, judgement)
        report_detection.show(options.json, facts, judgement)


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
