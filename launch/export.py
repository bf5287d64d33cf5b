"""Turn a checkpoint, or the backbone in it, into one safetensors file that timm or a later run loads."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program
from launch.runs import LaunchError

if TYPE_CHECKING:
    from torch import nn

    from dgt.config import Config
    from dgt.training.tensor_files import TensorFiles

PARTS = ("network", "backbone", "neck")
NECKS = {"segmentation": ("pyramid", "laterals", "smoothers", "fusion"), "detection": ("fpn",)}
"""Modules between the norms of a dense network's backbone and what answers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and says how to load it; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-export", lambda: export(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-export",
        description="Write a checkpoint's weights as one safetensors file, whatever engine and number of "
        "ranks saved it. The file's header says which model, classes, image size and normalisation it is for. "
        "timm loads classifiers, and the backbone of any task (--part backbone).",
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="configuration of the run, YAML")
    source.add_argument("--run", metavar="DIR", help="the run's folder")
    result.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (default), newest, or the path of a step_* folder"
    )
    result.add_argument("--out", required=True, metavar="FILE.safetensors", help="what to write")
    result.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run kept an average")
    result.add_argument(
        "--part", choices=PARTS, default="network",
        help="network (default): all of it; backbone: for timm, without classifier or heads; neck: of a dense task, "
        "the backbone with the norms and the pyramid behind it, without what answers, under the network's own names",
    )  # fmt: skip
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as name=trial")
    return result


def export(options: argparse.Namespace) -> int:
    """Reads, checks, writes."""
    from dgt.config import load
    from dgt.training.checkpoint import tensors_in, wording
    from dgt.training.run_folder import RunFolder
    from launch import checks, weights
    from launch.train import set_up_logging

    set_up_logging(0, sys.stderr)
    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise LaunchError(f"--out {out}: the name must end in .safetensors, by which timm knows the format")
    folder = RunFolder(Path(options.run)) if options.run else None
    config = weights.without_start(load(folder.config if folder else options.config, options.overrides))
    found = weights.find((folder or RunFolder(config.run_dir)).checkpoints, options.checkpoint)
    with wording(found):
        stored = tensors_in(found)
        network = checks.network(config)
        names, kind = weights.names_in(found, stored, network, options.weights)
        facts = metadata(config, options.part) | {"step": str(found.step), "weights": kind}
        write(out, stored, part_of(names, network, config.task.name, options.part), facts)
    print(f"{out}: {kind} weights of {found.path}, {out.stat().st_size:,} bytes")
    print("\n".join(how_to_load(out, config, options.part)))
    return 0


def part_of(names: Mapping[str, str], network: nn.Module, task: str, part: str) -> dict[str, str]:
    """Under which name each tensor of a `part` is exported: those of `names` (name in the network -> name in the
    checkpoint).

    A dense network's backbone has the names that it has in a classifier; the norm behind its last stage becomes the
    final norm, whose place it has. Raises LaunchError for the neck of a classifier.
    """
    if part == "network":
        return dict(names)
    if task not in NECKS:
        if part == "neck":
            raise LaunchError("--part neck: a classifier has none; its backbone is all before the classifier")
        classifier = getattr(network, "pretrained_cfg", {}).get("classifier")
        return {name: saved for name, saved in names.items() if not name.startswith(f"{classifier}.")}
    if part == "neck":
        kept = tuple(f"{module}." for module in ("backbone", "norms", *NECKS[task]))
        return {name: saved for name, saved in names.items() if name.startswith(kept)}
    last = f"norms.{len(network.norms) - 1}."  # type: ignore[arg-type]
    moved = {"backbone.": "", last: "norm."}
    return {
        here + name.removeprefix(there): saved
        for name, saved in names.items()
        for there, here in moved.items()
        if name.startswith(there)
    }


def how_to_load(out: Path, config: Config, part: str) -> list[str]:
    """Lines of Python, or options of a later run."""
    if part == "neck":
        return [f"start.path={out} begins a run of a dense task with it"]
    if part == "network" and config.task.name in NECKS:
        return [f"launch/predict.py --checkpoint {out} answers with it, and start.path={out} begins a run with it"]
    options = "".join(f", {key}={value}" for key, value in model_arguments(config).items())
    classes = 0 if part == "backbone" else config.data.num_classes
    network = f'"{config.model.name}", num_classes={classes}{options}, checkpoint_path="{out}"'
    lines = ["import dgt, timm", f"model = timm.create_model({network})"]
    if part == "backbone":
        own = f'{{"file": "{out}", "num_classes": 0}}'
        maps = f'"{config.model.name}", features_only=True{options}, pretrained=True, pretrained_cfg_overlay={own}'
        lines.append(f"maps = timm.create_model({maps})")
    return lines


def model_arguments(config: Config) -> dict[str, Any]:
    """What a network is built with beside its name."""
    from dgt.models.build import ATTENTION

    return {name: value for name in ATTENTION if (value := getattr(config.model, name)) is not None}


def metadata(config: Config, part: str = "network") -> dict[str, str]:
    """What the header says, each value a string (JSON where it is not plain text), under timm's own names."""
    from dgt.config import to_yaml
    from launch.traffic import image_size

    data, dense = config.data, config.task.name in NECKS
    classes = data.num_classes if part == "network" else 0
    facts: dict[str, Any] = {
        "architecture": config.model.name,
        "task": config.task.name,
        "part": part,
        "num_classes": classes,
        "model_args": model_arguments(config),
        "pretrained_cfg": {
            "input_size": (3, *(image_size(config) if dense else (data.image_size, data.image_size))),
            "mean": data.mean,
            "std": data.std,
            "crop_pct": 1.0 if dense else data.eval_crop_pct,
            "num_classes": classes,
        },
        "label_names": class_names(config),
        "config": to_yaml(config),
    }
    return {"format": "pt"} | {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items() if v is not None}


def class_names(config: Config) -> tuple[str, ...] | None:
    """Names of the classes in the order of their indices; None where the data is not at hand."""
    from data_pipeline.loader import open_split
    from data_pipeline.shards.source import DataError

    try:
        source = open_split(config.data, config.data.val_split, config.task.name)
    except DataError as error:
        print(
            f"dgt-export: the file will not name its classes, because the data cannot be opened: {error}",
            file=sys.stderr,
        )
        return None
    try:
        return tuple(source.class_names)
    finally:
        source.close()


def write(path: Path, stored: TensorFiles, names: Mapping[str, str], facts: dict[str, str]) -> None:
    """Writes the tensors that are `stored` under `names`, one after the other, so that nobody ever sees a part of it.

    Raises LaunchError where it cannot be written, and what reading raises.
    """
    from dgt.training import tensor_files

    layout = {name: (stored.dtype(saved), stored.shape(saved)) for name, saved in names.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor_files.write_file(temporary, layout, lambda name: stored.whole(names[name]), facts)
        os.replace(temporary, path)
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
