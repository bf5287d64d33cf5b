"""Say what is on images: classes, a class for each pixel, or objects with their boxes and masks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import program
from launch.runs import LaunchError

if TYPE_CHECKING:
    import numpy as np

    from dgt.config import Config
    from launch.answers import Answer, Labels
    from launch.sources import Found

OF_TASKS = {"top": "classification", "threshold": "detection"}
"""Options that are not for all tasks."""

OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")
"""Begins like key=value, which no image does unless there is a file of this name."""

PREDICTIONS = "predictions.json"
"""Name of the file in --out that says everything that was found."""

MARK = ("Software", "dgt-predict")
"""What a written picture says of itself (PNG's tEXt), so that a later call may replace it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and writes what was found; returns the exit status: 2 where an image could not be used, too."""
    options = with_overrides(parser().parse_intermixed_args(argv), sys.argv[1:] if argv is None else argv)
    return program.guarded("dgt-predict", lambda: predict(options))


def with_overrides(options: argparse.Namespace, words: Sequence[str]) -> argparse.Namespace:
    """The options with what --image has swallowed put among the overrides: arguments such as data.path=DIR that are
    no files. `words`: the command line, whose order the overrides keep."""
    swallowed = [word for word in options.image if OVERRIDE.match(word) and not Path(word).exists()]
    known = {*options.overrides, *swallowed}
    options.overrides = [word for word in words if word in known]
    options.image = [word for word in options.image if word not in swallowed]
    return options


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dgt-predict",
        description="Say what trained weights make of images: labels with scores, a class for each pixel, or objects "
        "with boxes and masks. Images may have any size; each is treated as in an evaluation.",
    )
    result.add_argument(
        "--image", required=True, nargs="+", action="extend", metavar="PATH", help="image files, or folders of them"
    )
    result.add_argument(
        "--out",
        metavar="DIR",
        help="write pictures and predictions.json there, and of "
        "segmentation class maps (classes/NAME.png, class indices in 8 bits); no folder that holds the images",
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
    result.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run kept an average")
    result.add_argument("--top", type=int, metavar="K", help="of classification: how many classes to name (default: 5)")
    result.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="of detection: least score of an object, from 0 to 1 (default: 0.5)",
    )
    result.add_argument("--json", action="store_true", help="print one line of JSON")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.segmentation.short_side=512")
    result.set_defaults(image_size=None, crop_pct=None, batch_size=None)  # which launch.sources asks for
    return result


def predict(options: argparse.Namespace) -> int:
    """Answers to one image after the other; what cannot be used is said and passed over."""
    from data_pipeline.decode import DecodeError
    from dgt.tasks import build_task
    from dgt.training.evaluate import Inference
    from dgt.training.world import joined, set_threads
    from launch import checks, report, sources
    from launch.answers import answering
    from launch.train import set_up_logging

    set_up_logging(0, sys.stderr)
    out = Path(options.out) if options.out else None
    images = listed(options.image, out)
    source = sources.find(options)
    config = source.config
    refuse_foreign(config.task.name, options)
    config = with_threshold(config, options.threshold)
    names = output_names(images.paths)
    if out:
        refuse_to_replace(out, images.paths, names)
    checks.network(config)
    with joined() as world:
        if world.size > 1:
            raise LaunchError("this program works alone; start it without torchrun or srun, once for each part")
        set_threads(config.engine.threads)
        if out:
            report.make_folder(out)
        found = source.verified()
        task = build_task(config.task, config.model, config.data)
        network = task.build_model()
        tensors, kind = found.read(network, options.weights)
        network.load_state_dict(tensors)
        facts = {"checkpoint": str(found.path), "step": found.step, "weights": kind, "task": config.task.name}
        labels = labels_of(config, found)
        answer = answering(
            config, task, Inference(network, world, config.engine), labels,
            top=options.top or 5, threshold=0.5 if options.threshold is None else options.threshold,
        )  # fmt: skip
        told = Told(out, options.json, facts)
        for path, name in zip(images.paths, names, strict=True):
            try:
                answered = answer(path.read_bytes())
            except (DecodeError, OSError) as error:
                images.refuse(path, str(error))
                continue
            told.add(path, name, answered)
        told.finish(images.refused)
    return program.KNOWN_ERROR if images.refused else 0


def refuse_foreign(task: str, options: argparse.Namespace) -> None:
    """Raises LaunchError where an option is one of another task, or out of range."""
    for option, own in OF_TASKS.items():
        if getattr(options, option) is not None and task != own:
            raise LaunchError(f"--{option} is for {own}, and these weights are for {task}")
    if options.top is not None and options.top < 1:
        raise LaunchError(f"--top: must be at least 1, got {options.top}")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise LaunchError(f"--threshold: must lie in [0, 1], got {options.threshold}")


def with_threshold(config: Config, threshold: float | None) -> Config:
    """The configuration in which detection drops nothing that reaches the threshold before it is looked at."""
    from dgt.tasks import DetectionConfig

    task = config.task
    if threshold is None or not isinstance(task, DetectionConfig) or threshold >= task.score_threshold:
        return config
    return dataclasses.replace(config, task=dataclasses.replace(task, score_threshold=threshold))


@dataclass
class Images:
    """The files to be answered to, and what cannot be."""

    paths: list[Path] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, path: Path, reason: str) -> None:
        """Says why there is no answer to a file."""
        print(f"dgt-predict: {path}: {reason}", file=sys.stderr)
        self.refused.append({"file": str(path), "reason": reason})


def listed(arguments: Sequence[str], out: Path | None) -> Images:
    """The files that were named, and all image files below folders in the order of their names, each once.

    What lies in `out` is passed over in folders: it may come from an earlier call. Raises LaunchError where there is
    none, or a folder's images all lie in `out`.
    """
    from data_pipeline.prepare.imagefolder import EXTENSIONS

    images, known = Images(), set[Path]()
    for path in map(Path, arguments):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower().removeprefix(".") in EXTENSIONS)
            within = [file for file in found if out is None or out.resolve() not in file.resolve().parents]
            if found and not within:
                raise LaunchError(
                    f"--out {out}: all images of {path} lie there, where an earlier call may have written them; name "
                    "another folder with --out"
                )
            if not within:
                images.refuse(path, f"this folder holds no image (looked for .{', .'.join(EXTENSIONS)})")
        else:
            within = [path]
        for file in within:
            if not file.is_file():
                images.refuse(file, "there is no such file")
            elif file.resolve() not in known:
                known.add(file.resolve())
                images.paths.append(file)
    if not images.paths:
        raise LaunchError("--image: there is no image to look at")
    return images


def output_names(paths: Sequence[Path]) -> list[str]:
    """For each image the name of what is written for it: its own without the ending, numbered where that is taken.

    Names that differ in upper and lower case only count as the same, as they do on some disks.
    """
    own = [path.stem.casefold() for path in paths]
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in own):
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def refuse_to_replace(out: Path, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Raises LaunchError where `out` holds one of the images, or another file where one is to be written."""
    places = {folder.resolve() for folder in (out, out / "classes")}
    for path in paths:
        if path.resolve().parent in places or path.parent.resolve() in places:
            raise LaunchError(f"--out {out}: the image {path} lies there; name another folder with --out")
    pictures = [folder / f"{name}.png" for name in names for folder in (out, out / "classes")]
    for written in (*pictures, out / PREDICTIONS):
        if written.exists() and not is_own(written):
            raise LaunchError(
                f"--out {out}: {written} is not of this program and would be replaced; name another folder with --out"
            )


def is_own(path: Path) -> bool:
    """Whether this program has written a picture or a predictions.json, as far as what is in it tells."""
    from PIL import Image

    try:
        if path.suffix != ".json":
            with Image.open(path) as picture:
                return picture.info.get(MARK[0]) == MARK[1]
        entries = json.loads(path.read_bytes())
        return isinstance(entries, list) and all("file" in entry or "file_name" in entry for entry in entries)
    except (OSError, ValueError, TypeError, Image.DecompressionBombError):
        return False


def labels_of(config: Config, found: Found) -> Labels:
    """The names of the classes: those of the data set, else those that the exported file has, else their numbers."""
    from data_pipeline.shards.source import DataError
    from launch import sources
    from launch.answers import Labels

    count = config.data.num_classes
    numbers = tuple(range(1, count + 1))
    try:
        names, category_ids = of_data(config)
    except DataError as error:
        facts = sources.header(found.path) if found.checkpoint is None else {}
        named = json.loads(facts.get("label_names", "null"))
        if named is None or len(named) != count:
            print(
                f"dgt-predict: classes go by their numbers, because the data cannot be opened: {error}", file=sys.stderr
            )
            return Labels((), numbers)
        return Labels(tuple(named), numbers)
    return Labels(names, category_ids or numbers)


def of_data(config: Config) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the classes, and of detection the data set's ids for them.

    Raises DataError where the data cannot be opened, or has another number of classes. Of shards their index is enough.
    """
    from data_pipeline.loader import open_split
    from data_pipeline.shards.reader import read_index
    from data_pipeline.shards.source import DataError
    from data_pipeline.shards.storage import without_secrets

    data = config.data
    if data.backend != "webdataset":
        source = open_split(data, data.val_split)
        try:
            return tuple(source.class_names), ()
        finally:
            source.close()
    if not data.path:
        raise DataError("no data set was named with data.path")
    index = read_index(data)
    if len(index.classes) != data.num_classes:
        raise DataError(
            f"{without_secrets(data.path)} has {len(index.classes)} classes, and the network {data.num_classes}"
        )
    return index.classes, tuple(index.targets.get("category_ids", ()))


@dataclass
class Told:
    """What is printed and written, image by image."""

    out: Path | None
    as_json: bool
    facts: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, path: Path, name: str, answer: Answer) -> None:
        """One image's answer. Raises LaunchError where it cannot be written."""
        from launch.answers import Segmented

        height, width = answer.image.shape[:2]
        entry: dict[str, Any] = {"file": str(path), "height": height, "width": width}
        try:
            if self.out:
                entry["picture"] = str(self.out / f"{name}.png")
                write_picture(self.out / f"{name}.png", answer.picture())
                if isinstance(answer, Segmented):
                    entry["class_map"] = str(self.out / "classes" / f"{name}.png")
                    (self.out / "classes").mkdir(exist_ok=True)
                    write_picture(self.out / "classes" / f"{name}.png", answer.classes)
        except OSError as error:
            raise LaunchError(f"--out {self.out}: cannot be written: {error.strerror or error}") from None
        self.entries.append(entry | answer.content())
        if not self.as_json:
            print(f"{path}" + (f" -> {entry['picture']}" if self.out else ""))
            for line in answer.lines():
                print(f"  {line}")

    def finish(self, refused: Sequence[dict[str, str]]) -> None:
        """All images are through. Raises LaunchError where predictions.json cannot be written."""
        if self.out:
            content: Any = self.entries
            if self.facts["task"] == "detection":
                content = [
                    {"image_id": number, "file_name": entry["file"], **found}
                    for number, entry in enumerate(self.entries, 1)
                    for found in entry["objects"]
                ]
            from data_pipeline.shards.files import atomic_write

            try:
                with atomic_write(self.out / PREDICTIONS) as file:
                    file.write(json.dumps(content, indent=1).encode() + b"\n")
            except OSError as error:
                raise LaunchError(f"--out {self.out}: cannot be written: {error.strerror or error}") from None
        if self.as_json:
            print(json.dumps({**self.facts, "images": self.entries, "refused": refused}))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as PNG: wholly, or not at all. Raises OSError."""
    from PIL import Image, PngImagePlugin

    from data_pipeline.shards.files import atomic_write

    mark = PngImagePlugin.PngInfo()
    mark.add_text(*MARK)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, "PNG", pnginfo=mark)


if __name__ == "__main__":
    sys.exit(main())
