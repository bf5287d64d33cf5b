"""Turn a checkpoint into one safetensors file that `timm.create_model(..., checkpoint_path=FILE)` loads."""

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
    from dgt.config import Config
    from dgt.training.tensor_files import TensorFiles


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and says how to load it; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    return program.guarded("dgt-export", lambda: export(options))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-export",
        description="Write a checkpoint's weights as one safetensors file for timm, whatever engine and number of "
        "ranks saved it. The file's header says which model, classes, image size and normalisation it is for.",
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="configuration of the run, YAML")
    source.add_argument("--run", metavar="DIR", help="the run's folder")
    result.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (default), newest, or the path of a step_* folder"
    )
    result.add_argument("--out", required=True, metavar="FILE.safetensors", help="what to write")
    result.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run kept an average")
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
        names, kind = weights.names_in(found, stored, checks.network(config), options.weights)
        facts = metadata(config) | {"step": str(found.step), "weights": kind}
        write(out, stored, names, facts)
    print(f"{out}: {kind} weights of {found.path}, {out.stat().st_size:,} bytes")
    arguments = "".join(f", {key}={value}" for key, value in json.loads(facts["model_args"]).items())
    print("import dgt, timm")
    print(
        f'model = timm.create_model("{config.model.name}", num_classes={config.data.num_classes}{arguments}, '
        f'checkpoint_path="{out}")'
    )
    return 0


def metadata(config: Config) -> dict[str, str]:
    """What the header says, each value a string (JSON where it is not plain text), under timm's own names."""
    from dgt.config import to_yaml
    from dgt.models.build import ATTENTION

    data, model = config.data, config.model
    facts: dict[str, Any] = {
        "architecture": model.name,
        "num_classes": data.num_classes,
        "model_args": {name: getattr(model, name) for name in ATTENTION if getattr(model, name) is not None},
        "pretrained_cfg": {
            "input_size": (3, data.image_size, data.image_size),
            "mean": data.mean,
            "std": data.std,
            "crop_pct": data.eval_crop_pct,
            "num_classes": data.num_classes,
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
        source = open_split(config.data, config.data.val_split)
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
