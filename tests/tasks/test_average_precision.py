"""Average precision by value: counted by hand, by a plain loop, and by pycocotools from the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.source import DataError
from data_pipeline.targets.objects import ImageObject, ImageObjects
from dgt.tasks.average_precision import dataset, metrics_of, precisions, results
from dgt.tasks.detections import Detected, Judged

coco_mask = pytest.importorskip("pycocotools.mask")

SIZE = (200, 240)
Box = tuple[float, float, float, float]


def thing(number: int, category: int, box: Box, crowd: bool = False) -> ImageObject:
    """An object that fills its box (left, top, width, height)."""
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return ImageObject(number, category, box, width * height, crowd, [corners])


def filled(box: Box) -> dict[str, Any]:
    """The mask of a whole box (left, top, width, height) of whole numbers."""
    left, top, width, height = map(int, box)
    pixels = np.zeros(SIZE, np.uint8, order="F")
    pixels[top : top + height, left : left + width] = 1
    encoded = coco_mask.encode(pixels)
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def found(*answers: tuple[int, float, Box]) -> Detected:
    """Detections (class, score, box), with masks that fill the boxes."""
    ordered = sorted(answers, key=lambda answer: -answer[1])
    corners = [(x, y, x + w, y + h) for _, _, (x, y, w, h) in ordered]
    return Detected(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in ordered], np.float32),
        np.array([label for label, _, _ in ordered], np.int64),
        tuple(filled(box) for _, _, box in ordered),
    )


def image(number: int, objects: list[ImageObject], detected: Detected) -> Judged:
    return Judged(detected, ImageObjects(number, f"{number}.jpg", SIZE, tuple(objects)))


def random_records(images: int = 7, classes: int = 3, seed: int = 0) -> dict[int, Judged]:
    """Objects of all sizes, and detections near them and elsewhere; scores all differ."""
    rng = np.random.default_rng(seed)
    scores = iter(rng.permutation(1000) / 1000)
    records = {}
    for sample in range(images):
        objects, answers = [], []
        for number in range(int(rng.integers(1, 6))):
            category, (width, height) = int(rng.integers(classes)), rng.integers(5, 150, 2).tolist()
            box = (int(rng.integers(SIZE[1] - width)), int(rng.integers(SIZE[0] - height)), width, height)
            objects.append(thing(number, category, box))
            for _ in range(int(rng.integers(0, 3))):
                x, y = np.maximum(np.array(box[:2]) + rng.integers(-4, 5, 2), 0)
                w, h = np.maximum(np.array(box[2:]) + rng.integers(-3, 4, 2), 2)
                near = (int(x), int(y), int(min(w, SIZE[1] - x)), int(min(h, SIZE[0] - y)))
                answers.append(
                    (category if rng.random() < 0.8 else (category + 1) % classes, float(next(scores)), near)
                )
        records[sample] = image(500 - sample, objects, found(*answers))
    return records


def overlap(a: Box, b: Box) -> float:
    width = max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def plain_average_precision(records: dict[int, Judged], category: int, least: float) -> float:
    """Of one class without crowds at one overlap: greedy matching by score, precision made monotonic, 101 recalls."""
    answers, taken = [], {sample: set[int]() for sample in records}
    objects = {s: [o for o in r.truth.objects if o.category == category] for s, r in records.items()}
    for sample, record in records.items():
        for corners, score, label in zip(
            record.detected.boxes.tolist(), record.detected.scores, record.detected.labels, strict=True
        ):
            if label == category:
                x0, y0, x1, y1 = corners
                answers.append((float(score), sample, (x0, y0, x1 - x0, y1 - y0)))
    hits = []
    for _, sample, box in sorted(answers, reverse=True):
        free = [(overlap(box, o.box), i) for i, o in enumerate(objects[sample]) if i not in taken[sample]]
        best = max(free, default=(0.0, -1))
        hits.append(best[0] >= least)
        if hits[-1]:
            taken[sample].add(best[1])
    total = sum(map(len, objects.values()))
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / total
    best_from = [max([*precision[recall >= wanted - 1e-12], 0.0]) for wanted in np.linspace(0, 1, 101)]
    return 100 * float(np.mean(best_from))


def test_average_precision_is_that_of_a_plain_loop_over_classes_and_overlaps() -> None:
    records = random_records()
    metrics = metrics_of(records, [1, 2, 3], masks=True)
    ious = np.linspace(0.5, 0.95, 10)
    table = np.array([[plain_average_precision(records, c, iou) for iou in ious] for c in range(3)])
    assert 10 < table.mean() < 90
    for kind in ("box", "mask"):  # masks fill the boxes
        assert metrics[f"{kind}_ap"] == pytest.approx(table.mean())
        assert metrics[f"{kind}_ap50"] == pytest.approx(table[:, 0].mean())
        assert metrics[f"{kind}_ap75"] == pytest.approx(table[:, 5].mean())
    box, mask = precisions(records, [1, 2, 3], masks=True)
    assert box.per_class()["box_ap"] == pytest.approx(table.mean(axis=1))
    assert mask.per_class()["mask_ap50"] == pytest.approx(table[:, 0])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_metrics_are_those_of_pycocotools_from_the_files(tmp_path: Path, kind: Any) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    records, numbers = random_records(images=9, seed=1), [18, 3, 44]  # ids that do not rise with the classes
    (tmp_path / "truth.json").write_text(json.dumps(dataset(records, numbers, ["a", "b", "c"])))
    (tmp_path / "found.json").write_text(json.dumps(results(records, numbers, kind)))
    truth = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = metrics_of(records, numbers, masks=True)
    short = "box" if kind == "bbox" else "mask"
    expected = [metrics[f"{short}_ap{ending}"] for ending in ("", "50", "75", "_s", "_m", "_l")]
    assert expected == pytest.approx((100 * evaluation.stats[:6]).tolist())
    assert truth.loadCats([3])[0]["name"] == "b"
    assert sum(truth.loadAnns(truth.getAnnIds(imgIds=[500], catIds=[18]))[0]["bbox"]) > 0


def test_masks_are_judged_as_masks_and_their_sizes_too() -> None:
    # the box is right and large, the mask covers a fifth of it, and is of medium size
    truth = ImageObject(1, 0, (10, 10, 100, 100), 2000, False, [[10, 10, 110, 10, 110, 30, 10, 30]])
    detected = found((0, 0.9, (10, 10, 100, 100)))
    detected = Detected(detected.boxes, detected.scores, detected.labels, (filled((10, 10, 100, 20)),))
    metrics = metrics_of({0: image(1, [truth], detected)}, [1], masks=True)
    assert metrics == pytest.approx(
        {"box_ap": 100, "box_ap50": 100, "box_ap75": 100, "box_ap_m": 100}
        | {"mask_ap": 100, "mask_ap50": 100, "mask_ap75": 100, "mask_ap_m": 100}
    )
    wrong = Detected(detected.boxes, detected.scores, detected.labels, (filled((10, 10, 100, 40)),))  # overlap 0.5
    assert metrics_of({0: image(1, [truth], wrong)}, [1], masks=True)["mask_ap"] == pytest.approx(10)


def test_an_overlap_of_six_tenths_counts_at_three_of_ten_thresholds() -> None:
    detected = found((0, 0.9, (20, 20, 10, 6)))
    metrics = metrics_of({0: image(1, [thing(1, 0, (20, 20, 10, 10))], detected)}, [1], masks=False)
    assert metrics == pytest.approx({"box_ap": 30, "box_ap50": 100, "box_ap75": 0, "box_ap_s": 30})


def test_what_is_found_in_a_crowd_and_an_object_with_id_0_are_counted_as_coco_means_it() -> None:
    objects = [thing(0, 0, (10, 10, 20, 20)), thing(1, 0, (50, 10, 80, 80), crowd=True)]
    detected = found((0, 0.9, (60, 20, 30, 30)), (0, 0.8, (10, 10, 20, 20)))
    assert metrics_of({0: image(1, objects, detected)}, [1], masks=False)["box_ap"] == pytest.approx(100)


def test_nothing_found_is_0_and_classes_without_objects_do_not_count() -> None:
    nothing = metrics_of({0: image(1, [thing(1, 0, (10, 10, 20, 20))], found())}, [1, 2], masks=True)
    assert nothing == {f"{kind}_ap{ending}": 0.0 for kind in ("box", "mask") for ending in ("", "50", "75", "_s")}
    records = {0: image(1, [thing(1, 0, (10, 10, 20, 20))], found((0, 0.5, (10, 10, 20, 20)), (1, 0.9, (0, 0, 9, 9))))}
    assert metrics_of(records, [1, 2], masks=False)["box_ap"] == pytest.approx(100)
    (box,) = precisions(records, [1, 2], masks=False)
    assert box.per_class()["box_ap"] == [pytest.approx(100), None]


def test_a_training_goes_on_where_no_object_counts_with_0_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    crowd = image(1, [thing(1, 0, (1, 1, 9, 9), crowd=True)], found((0, 0.9, (1, 1, 9, 9))))
    expected = {f"{kind}_ap{ending}": 0.0 for kind in ("box", "mask") for ending in ("", "50", "75")}
    assert metrics_of({0: crowd, 1: image(2, [], found())}, [1], masks=True) == expected
    assert "none of the 2 images of the evaluation split has an object that counts" in caplog.text
    assert list(metrics_of({0: crowd}, [1], masks=False)) == ["box_ap", "box_ap50", "box_ap75"]


def test_more_than_a_hundred_detections_count_where_the_detector_gives_more() -> None:
    places = [(10 * (i % 15), 10 * (i // 15), 8, 8) for i in range(150)]
    record = image(1, [thing(i, 0, box) for i, box in enumerate(places)], found(*((0, 0.5, box) for box in places)))
    assert metrics_of({0: record}, [1], masks=False, max_detections=150)["box_ap"] == pytest.approx(100)
    cut = metrics_of({0: record}, [1], masks=False, max_detections=20)["box_ap"]  # a hundred always count
    assert cut == pytest.approx(100 * np.mean(np.linspace(0, 1, 101) <= 100 / 150))


def test_what_cannot_be_judged_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="every sample of the evaluation split is damaged"):
        metrics_of({}, [1], masks=False)
    with pytest.raises(DataError, match="none of the 1 images of the evaluation split has an object that counts"):
        precisions({0: image(1, [thing(1, 0, (1, 1, 9, 9), crowd=True)], found())}, [1], masks=False)
    record = image(7, [thing(1, 0, (1, 1, 9, 9))], found())
    with pytest.raises(DataError, match=r"samples 3 and 5 .* are both annotated as image 7 \(7.jpg\)"):
        metrics_of({3: record, 5: record}, [1], masks=False)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(DataError, match=r"Install the extra: pip install 'dgt\[dense\]'"):
        metrics_of({3: record}, [1], masks=False)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    metrics_of(random_records(images=2), [1, 2, 3], masks=True)
    assert capsys.readouterr() == ("", "")
