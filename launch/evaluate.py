"""Evaluate a checkpoint exactly: every sample of a split once, whatever the number of ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the metrics; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-evaluate", lambda: evaluate(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-evaluate",
        description="Evaluate a checkpoint on every sample of a split; alone, or as the ranks of torchrun or srun. "
        "The number of ranks does not change what is counted.",
    )
    result.add_argument("--config", required=True, metavar="FILE", help="configuration of the run, YAML")
    result.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (default), newest, or the path of a step_* folder"
    )
    result.add_argument("--split", metavar="NAME", help="split of the data (default: data.val_split)")
    result.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run kept an average")
    result.add_argument("--json", action="store_true", help="print one line of JSON")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR")
    return result


def evaluate(options: argparse.Namespace) -> int:
    """One rank's part; rank 0 prints."""
    from data_pipeline.loader import build_loader
    from dgt.config import load
    from dgt.tasks import build_task
    from dgt.training.evaluate import evaluate as metrics_of
    from dgt.training.parallel import build_engine
    from dgt.training.run_folder import RunFolder
    from dgt.training.world import joined, set_threads
    from launch import checks, weights
    from launch.cluster import rank_variables
    from launch.train import set_up_logging

    os.environ.update(rank_variables(os.environ))
    set_up_logging(int(os.environ.get("RANK", 0)), sys.stderr)
    config = weights.without_start(load(options.config, options.overrides))
    checks.network(config)
    split = options.split or config.data.val_split
    with joined() as world:
        set_threads(config.engine.threads)
        found = world.on_main(lambda: weights.find(RunFolder(config.run_dir).checkpoints, options.checkpoint))
        task = build_task(config.task, config.model, config.data)
        network = task.build_model()
        tensors, kind = weights.read(found, network, options.weights)
        network.load_state_dict(tensors)
        engine = build_engine(network, world, config.engine, config.optimizer)
        per_pass = config.steps.evaluate_batch_size or config.steps.micro_batch_size
        loader = build_loader(
            config.data, split, train=False, global_batch_size=per_pass * world.size,
            rank=world.rank, world_size=world.size, seed=config.seed,
        )  # fmt: skip
        with loader:
            metrics = metrics_of(engine, task, loader, config.data)
        if world.is_main and metrics is not None:
            show(
                options.json,
                {"checkpoint": str(found.path), "step": found.step, "weights": kind, "split": split},
                metrics,
            )
    return 0


def show(as_json: bool, facts: dict[str, str | int], metrics: dict[str, float]) -> None:
    """Prints what was evaluated and how it did."""
    if as_json:
        print(json.dumps(facts | metrics))
        return
    images = round(metrics["samples"])
    print(f"{facts['checkpoint']}, {facts['weights']} weights after step {facts['step']}")
    print(f"{images} images of split {facts['split']}:")
    for name, value in metrics.items():
        if name != "samples":
            print(f"  {name:<6} {value:.4f}")


if __name__ == "__main__":
    sys.exit(main())
