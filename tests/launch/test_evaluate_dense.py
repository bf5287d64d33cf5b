"""Evaluation of dense tasks by value: what is printed is what numpy and pycocotools make of the saved answers."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import dense_weights
import numpy as np
import pytest
import torch
from dense_weights import CATEGORIES, CLASSES, SIZES, mask_of
from PIL import Image
from ranks import run_ranks

from dgt.config import load
from dgt.training.trainer import train
from launch import evaluate

pytest.importorskip("pycocotools")


@pytest.fixture(autouse=True)
def _as_program() -> Iterator[None]:
    """Undoes what the program sets up for a whole process."""
    handlers, threads = list(logging.root.handlers), torch.get_num_threads()
    yield
    logging.root.handlers[:] = handlers
    logging.captureWarnings(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_weights.segmentation_weights(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_weights.detection_weights(tmp_path_factory.mktemp("detection"))


def program(*arguments: Any) -> dict[str, Any]:
    """What `launch/evaluate.py ... --json` prints; nothing of ranks other than the first."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(out.getvalue() or "{}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but metrics.json, which tells speeds and ranks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "metrics.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def answers(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / "predictions" / f"{number}.png")) for number in range(len(SIZES))]


def confusion_of(out: Path) -> np.ndarray:
    """Pixels by class and by saved answer, counted one by one."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), int)
    for number, answer in enumerate(answers(out)):
        assert answer.shape == SIZES[number]
        for truth, guess in zip(mask_of(number).ravel(), answer.ravel(), strict=True):
            if truth != 255:
                counts[truth, guess] += 1
    return counts


def shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class in percent."""
    hits = np.diag(counts)
    return 100 * hits / (counts.sum(axis=0) + counts.sum(axis=1) - hits), 100 * hits / counts.sum(axis=1)


def test_segmentation_metrics_are_those_of_the_saved_class_maps_on_any_number_of_ranks(
    segmentation: Path, tmp_path: Path
) -> None:
    written = []
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        arguments = ("--checkpoint", segmentation, "--out", out, "--save-predictions", "--batch-size", 1)
        results = [program(*arguments)] if ranks == 1 else [r.value for r in run_ranks(ranks, program, *arguments)]
        assert [bool(result) for result in results] == [True] + [False] * (ranks - 1)
        counts = confusion_of(out)
        iou, accuracy = shares(counts)
        found = results[0]
        assert (found["samples"], found["ranks"], found["step"]) == (len(SIZES), ranks, 5)
        assert found["miou"] == pytest.approx(iou.mean())
        assert found["macc"] == pytest.approx(accuracy.mean())
        assert found["pixel_acc"] == pytest.approx(100 * np.trace(counts) / counts.sum())
        written.append(files_of(out))
    assert written[0] == written[1]
    assert set(written[0]) == {
        *("classes.csv", "confusion.csv", "confusion.png"),
        *(f"pictures/{sample}.png" for sample in range(4)),
        *(f"predictions/{number}.png" for number in range(len(SIZES))),
    }
    rows = list(csv.reader((tmp_path / "1" / "confusion.csv").open()))
    assert rows[0] == ["class", *CLASSES]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == counts.tolist()
    table = json.loads((tmp_path / "1" / "metrics.json").read_text())["classes"]
    assert [row["iou"] for row in table] == sorted(row["iou"] for row in table)
    for row in table:
        c = row["class"]
        assert row["name"] == CLASSES[c]
        assert (row["iou"], row["accuracy"]) == (pytest.approx(iou[c]), pytest.approx(accuracy[c]))
        assert (row["pixels"], row["share"]) == (counts[c].sum(), pytest.approx(100 * counts[c].sum() / counts.sum()))


def test_options_of_segmentation_say_how_images_are_answered(segmentation: Path, tmp_path: Path) -> None:
    plain, asked, configured = tmp_path / "plain", tmp_path / "asked", tmp_path / "configured"
    common = ("--checkpoint", segmentation, "--save-predictions", "--out")
    program(*common, plain)
    found = program(*common, asked, "--flip", "--scales", "0.5,1.5", "--mode", "slide")
    assert (found["mode"], found["scales"], found["flip"]) == ("slide", [0.5, 1.5], True)
    assert (found["short_side"], found["long_side"], found["crop_size"], found["stride"]) == (32, 96, 32, 21)
    same = [f"task.inference.{what}" for what in ("flip=true", "scales=[0.5,1.5]", "mode=slide")]
    program(*common, configured, *same)
    assert files_of(asked) == files_of(configured)
    assert all((a != b).any() for a, b in zip(answers(plain), answers(asked), strict=True))
    iou, _ = shares(confusion_of(asked))
    assert found["miou"] == pytest.approx(iou.mean())


def test_detection_metrics_are_those_of_pycocotools_on_the_saved_files_on_any_number_of_ranks(
    detection: Path, tmp_path: Path
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    written = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        arguments = ("--checkpoint", detection, "--out", out, "--batch-size", 1)
        results = [program(*arguments)] if ranks == 1 else [r.value for r in run_ranks(ranks, program, *arguments)]
        written.append(({n: results[0][n] for n in results[0] if "_ap" in n}, files_of(out)))
    assert written[0] == written[1]
    found, out = written[0][0], tmp_path / "1"
    assert found["box_ap"] > 0
    assert found["mask_ap"] > 0
    table = json.loads((out / "metrics.json").read_text())["classes"]
    for kind, name, file in (("bbox", "box", "predictions.json"), ("segm", "mask", "predictions_masks.json")):
        truth = COCO(str(out / "annotations.json"))
        judged = COCOeval(truth, truth.loadRes(str(out / file)), kind)
        judged.params.maxDets = [1, 10, 150]
        judged.evaluate()
        judged.accumulate()
        precision = judged.eval["precision"][..., 2]  # overlaps, recalls, categories, areas
        assert found[f"{name}_ap"] == pytest.approx(100 * precision[:, :, :, 0].mean())
        assert found[f"{name}_ap50"] == pytest.approx(100 * precision[0, :, :, 0].mean())
        assert found[f"{name}_ap75"] == pytest.approx(100 * precision[5, :, :, 0].mean())
        for area, ending in ((1, "_s"), (2, "_m")):
            there = precision[..., area]
            assert found[f"{name}_ap{ending}"] == pytest.approx(100 * there[there > -1].mean())
        assert f"{name}_ap_l" not in found
        for row in table:
            place = sorted(CATEGORIES).index(row["category_id"])
            assert row[f"{name}_ap"] == pytest.approx(100 * precision[:, :, place, 0].mean())


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_run_is_evaluated_to_the_metrics_that_training_ended_with(
    task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = request.getfixturevalue(task).with_suffix(".yaml")
    overrides = [f"output_dir={tmp_path}", "name=short", "steps.max_steps=1", "monitor.tensorboard=false"]
    train(load(file, overrides))
    rows = [json.loads(line) for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [row for row in rows if "val/samples" in row]
    expected = {name.removeprefix("val/"): value for name, value in logged.items() if name.startswith("val/")}
    assert {"segmentation": "miou", "detection": "mask_ap"}[task] in expected
    found = program("--run", tmp_path / "short")
    assert {name: found[name] for name in expected} == expected


def test_the_files_of_detection_speak_of_the_images_and_categories_of_the_data_set(
    detection: Path, tmp_path: Path
) -> None:
    found = program("--checkpoint", detection, "--out", tmp_path)
    assert (found["short_side"], found["long_side"], found["samples"]) == (64, 128, len(SIZES))
    truth = json.loads((tmp_path / "annotations.json").read_text())
    assert {one["id"]: one["name"] for one in truth["categories"]} == CATEGORIES
    images = {70 - number: (f"{number}.png", *SIZES[number]) for number in range(len(SIZES))}
    assert {i["id"]: (i["file_name"], i["height"], i["width"]) for i in truth["images"]} == images
    expected = [one for number in range(len(SIZES)) for one in dense_weights.objects_of(number)]

    def told(objects: list[dict[str, Any]]) -> list[str]:  # images are shuffled, and ids count anew
        return sorted(json.dumps({**one, "id": None}, sort_keys=True) for one in objects)

    assert told(truth["annotations"]) == told(expected)
    assert [one["id"] for one in truth["annotations"]] == list(range(1, len(expected) + 1))
    boxes = json.loads((tmp_path / "predictions.json").read_text())
    assert {one["image_id"] for one in boxes} == set(images)
    assert {one["category_id"] for one in boxes} <= set(CATEGORIES)
    for one in boxes:
        x, y, w, h = one["bbox"]
        _, height, width = images[one["image_id"]]
        assert min(x, y) >= 0
        assert min(w, h) > 0
        assert x + w <= width + 1e-3  # boxes are float32
        assert y + h <= height + 1e-3
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    counts = {n: sum(o["category_id"] == n and not o["iscrowd"] for o in expected) for n in CATEGORIES}
    assert {int(row["category_id"]): int(row["objects"]) for row in rows} == counts
    assert {int(row["category_id"]): row["name"] for row in rows} == CATEGORIES


def test_the_screen_shows_metrics_and_a_table_of_classes(
    segmentation: Path, detection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(segmentation), "--scales", "1,2", "--flip"]) == 0
    out = capsys.readouterr().out
    assert (
        "\n5 images of split val, short side 32 px, long side at most 96 px, scales 1 2, mean with mirror images\n"
        in out
    )
    table = out.split("\nclasses\n")[1].splitlines()
    assert table[0].split() == ["class", "name", "pixels", "share", "iou", "accuracy", "precision", "most_taken_for"]
    assert sorted(line.split()[1] for line in table[1:]) == sorted(CLASSES)
    assert evaluate.main(["--checkpoint", str(detection)]) == 0
    out = capsys.readouterr().out
    assert "\n5 images of split val, mask_rcnn, short side 64 px, long side at most 128 px, 150 detections" in out
    assert [line.split()[0] for line in out.splitlines() if "_ap" in line][:5] == [
        "box_ap", "box_ap50", "box_ap75", "box_ap_s", "box_ap_m",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", "64"], "--image-size is for classification, and these weights are for segmentation: images"),
        (["--crop-pct", "0.9"], "add data.segmentation.short_side=N"),
        (["--flip", "logits"], "--flip logits: is for classification"),
        (["--scales", "1,x"], "--scales 1,x: is no list of factors such as 0.75,1,1.25"),
        (["--scales", "0,1"], "task.inference.scales: must be factors above 0"),
        (["--save-predictions"], "--save-predictions: name with --out DIR where they are to be written"),
        (["data.num_classes=5"], "does not fit UPerNet: "),
    ],
)
def test_what_a_segmentation_cannot_be_asked_is_said_in_one_sentence(
    segmentation: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(segmentation), *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", "64"], "add data.detection.eval_short_side=N"),
        (["--flip"], "--flip is for classification and segmentation, and these weights are for detection"),
        (["--mode", "slide"], "--mode is for segmentation, and these weights are for detection"),
        (["--scales", "1"], "--scales is for segmentation"),
        (["--save-predictions", "--out", "x"], "--save-predictions is for segmentation"),
    ],
)
def test_what_a_detector_cannot_be_asked_is_said_in_one_sentence(
    detection: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(detection), *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
