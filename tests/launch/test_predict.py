"""Predictions by value: as the network computes them, as an evaluation saves them, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import dense_weights
import numpy as np
import pytest
import torch
from dense_weights import CATEGORIES, CLASSES, SIZES, pixels
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_pipeline.shards import reader
from data_pipeline.shards.storage import LocalFolder
from data_pipeline.transforms import normalize
from dgt.config import load
from dgt.models import ModelConfig, build_model
from dgt.tasks import build_task, drawing
from launch import checks, evaluate, predict
from launch.predict import output_names

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
def classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    task = {"name": "classification"}
    values = dense_weights.settings(folder / "nowhere", task, 8, image_size=32, eval_crop_pct=1.0)
    return dense_weights.exported(folder, values, {"head.fc.weight": 1.0})


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_weights.segmentation_weights(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_weights.detection_weights(tmp_path_factory.mktemp("detection"))


def program(*arguments: Any, status: int = 0) -> dict[str, Any]:
    """What `launch/predict.py ... --json` prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert predict.main([*map(str, arguments), "--json"]) == status
    return json.loads(out.getvalue())


def evaluated(*arguments: Any) -> None:
    with redirect_stdout(io.StringIO()):
        assert evaluate.main([*map(str, arguments)]) == 0


def sources(weights: Path) -> Path:
    """The images that the validation split was made from, at whose names those of its samples end."""
    folder = weights.parent / "source"
    return folder / "images" / "val" if (folder / "images").is_dir() else folder / "val"


def with_facts(path: Path, to: Path, **facts: str) -> Path:
    """A copy of an exported file that says more about itself."""
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    save_file(load_file(path), to, metadata=known | facts)
    return to


def test_labels_have_the_probabilities_that_the_network_computes(classification: Path, tmp_path: Path) -> None:
    image = pixels((32, 32), seed=3)
    Image.fromarray(image).save(tmp_path / "x.png")
    network = build_model(ModelConfig("dgt_nano"), 8).eval().to(memory_format=torch.channels_last)
    network.load_state_dict(load_file(classification))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        logits = network(normalize(torch.from_numpy(image)[None], mean, std))[0].double().numpy()
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    found = program(
        "--checkpoint", classification, "--image", tmp_path / "x.png", "--out", tmp_path / "out", "--top", 3
    )
    (entry,) = found["images"]
    order = np.argsort(-expected)[:3]
    assert [row["class"] for row in entry["labels"]] == order.tolist()
    # float32 softmax of logits below 2^5: relative rounding of about 2^5 * 2^-24
    assert [row["score"] for row in entry["labels"]] == pytest.approx(expected[order].tolist(), rel=4e-6)
    assert (entry["height"], entry["width"], found["task"], found["step"]) == (32, 32, "classification", 5)
    drawn = drawing.guesses(image, [(row["name"], row["score"]) for row in entry["labels"]])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "x.png")), drawn)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == found["images"]


def test_class_maps_are_those_that_an_evaluation_saves(segmentation: Path, tmp_path: Path) -> None:
    evaluated("--checkpoint", segmentation, "--out", tmp_path / "report", "--save-predictions")
    found = program("--checkpoint", segmentation, "--image", sources(segmentation), "--out", tmp_path / "out")
    assert [Path(entry["file"]).name for entry in found["images"]] == [f"{n}.png" for n in range(len(SIZES))]
    for number, entry in enumerate(found["images"]):
        classes = np.asarray(Image.open(entry["class_map"]))
        saved = np.asarray(Image.open(tmp_path / "report" / "predictions" / f"{number}.png"))
        np.testing.assert_array_equal(classes, saved)
        assert entry["class_map"] == str(tmp_path / "out" / "classes" / f"{number}.png")
        picture = np.asarray(Image.open(tmp_path / "out" / f"{number}.png"))
        np.testing.assert_array_equal(picture, drawing.class_map(pixels(SIZES[number], number), classes, CLASSES))
        for row in entry["classes"]:
            assert row["name"] == CLASSES[row["class"]]
            assert (row["pixels"], row["share"]) == ((classes == row["class"]).sum(), (classes == row["class"]).mean())
        assert sum(row["pixels"] for row in entry["classes"]) == classes.size


def test_objects_are_those_that_an_evaluation_saves_from_the_threshold_on(detection: Path, tmp_path: Path) -> None:
    evaluated("--checkpoint", detection, "--out", tmp_path / "report")
    saved = [
        {**box, "segmentation": mask["segmentation"]}
        for box, mask in zip(
            json.loads((tmp_path / "report" / "predictions.json").read_text()),
            json.loads((tmp_path / "report" / "predictions_masks.json").read_text()),
            strict=True,
        )
    ]
    threshold = float(np.median([one["score"] for one in saved]))
    found = program(
        "--checkpoint", detection, "--image", sources(detection), "--out", tmp_path / "out", "--threshold", threshold
    )
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["image_id"] for one in results] == sorted(one["image_id"] for one in results)
    for number in range(len(SIZES)):
        own = [one for one in saved if one["image_id"] == 70 - number and one["score"] >= threshold]
        for entries in (found["images"][number]["objects"], [r for r in results if r["image_id"] == number + 1]):
            assert [(r["category_id"], r["bbox"], r["score"], r["segmentation"]) for r in entries] == [
                (one["category_id"], one["bbox"], one["score"], one["segmentation"]) for one in own
            ]
            assert all(r["name"] == CATEGORIES[r["category_id"]] for r in entries)
    assert 0 < len(results) < len(saved)
    assert Image.open(tmp_path / "out" / "0.png").size[0] >= drawing.SMALL


def test_images_of_any_kind_and_size_are_answered_at_their_own_size_and_upright(
    segmentation: Path, detection: Path, tmp_path: Path
) -> None:
    image = pixels((40, 56), seed=0)
    turned = Image.Exif()
    turned[0x0112] = 6  # the upright image is the stored one, turned to the right
    Image.fromarray(np.rot90(image)).save(tmp_path / "a_turned.png", exif=turned)
    Image.fromarray(image).save(tmp_path / "b_upright.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "c_grey.png")
    Image.fromarray(np.concatenate([image, image[..., :1]], axis=-1)).save(tmp_path / "d_transparent.png")
    Image.fromarray(image[:1, :1]).save(tmp_path / "e_one_pixel.bmp")
    Image.fromarray(image[:3].repeat(12, axis=1)).save(tmp_path / "f_long.WEBP", lossless=True)
    sizes = [(40, 56), (40, 56), (40, 56), (40, 56), (1, 1), (3, 672)]
    found = program("--checkpoint", segmentation, "--image", tmp_path, "--out", tmp_path / "out")["images"]
    assert [(entry["height"], entry["width"]) for entry in found] == sizes
    maps = [np.asarray(Image.open(entry["class_map"])) for entry in found]
    assert [classes.shape for classes in maps] == sizes
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[1] != maps[2]).any()
    # what was written to a folder within is no input of the next call
    found = program("--checkpoint", detection, "--image", tmp_path, "--out", tmp_path / "out")["images"]
    assert [(entry["height"], entry["width"]) for entry in found] == sizes


def test_what_cannot_be_read_is_said_and_the_others_are_answered(
    segmentation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(pixels((40, 56), 0)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "words.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    names = ("cut.png", "nowhere.png", "words.jpg", "empty", "good.png", "good.png")
    found = program("--checkpoint", segmentation, "--image", *(tmp_path / name for name in names), status=2)
    assert [entry["file"] for entry in found["images"]] == [str(good)]
    refused = {Path(entry["file"]).name: entry["reason"] for entry in found["refused"]}
    assert refused["nowhere.png"] == "there is no such file"
    assert refused["empty"].startswith("this folder holds no image (looked for .jpg, .jpeg")
    assert "damaged or unknown image" in refused["cut.png"]
    assert "damaged or unknown image" in refused["words.jpg"]
    err = capsys.readouterr().err
    assert [line.split(": ")[1] for line in err.splitlines()] == [str(tmp_path / name) for name in (
        "nowhere.png", "empty", "cut.png", "words.jpg",
    )]  # fmt: skip


def test_names_of_classes_come_from_the_data_else_from_the_file_else_they_are_numbers(
    segmentation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = sources(segmentation) / "0.png"

    def names(weights: Path, *overrides: str) -> dict[int, str]:
        found = program("--checkpoint", weights, *overrides, "--image", image)
        return {row["class"]: row["name"] for row in found["images"][0]["classes"]}

    told = with_facts(segmentation, tmp_path / "told.safetensors", label_names='["w", "x", "y", "z"]')
    of_data = names(told)
    assert len(of_data) > 1
    assert of_data == {c: CLASSES[c] for c in of_data}
    gone = f"data.path={tmp_path / 'gone'}"
    assert names(told, gone) == {c: "wxyz"[c] for c in of_data}
    assert capsys.readouterr().err == ""
    assert names(segmentation, gone) == {c: str(c) for c in of_data}
    assert (
        "classes go by their numbers, because the data cannot be opened: There is no folder" in capsys.readouterr().err
    )


def test_two_images_of_one_name_get_two_pictures(segmentation: Path, tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/X.bmp", "b/x_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels((40, 56), len(name))).save(tmp_path / name)
    found = program("--checkpoint", segmentation, "--image", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    written = [Path(entry["picture"]).name for entry in found["images"]]
    assert [Path(entry["file"]).name for entry in found["images"]] == ["x.png", "X.bmp", "x.png", "x_2.png"]
    assert written == ["x.png", "X_3.png", "x_4.png", "x_2.png"]
    assert all((tmp_path / "out" / name).is_file() for name in written)
    assert output_names([Path("a.png"), Path("b.png")]) == ["a", "b"]


def test_out_is_refused_where_something_of_another_origin_would_be_replaced(
    segmentation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, other = tmp_path / "in" / "a.jpg", pixels((8, 8), 1)
    image.parent.mkdir()
    Image.fromarray(pixels((40, 56), 0)).save(image)
    foreign = [image.with_suffix(".png"), *(tmp_path / str(i) / n for i, n in enumerate(("a.png", "classes/a.png")))]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(other).save(path)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "predictions.json").write_text('[{"image_id": 1, "score": 0.5}]')
    for out in ("in", "0", "1", "2"):
        before = sorted((tmp_path / out).rglob("*"))
        assert (
            predict.main(["--checkpoint", str(segmentation), "--image", str(image), "--out", str(tmp_path / out)]) == 2
        )
        assert capsys.readouterr().err.endswith("name another folder with --out\n")
        assert sorted((tmp_path / out).rglob("*")) == before
    assert all((np.asarray(Image.open(path)) == other).all() for path in foreign)


def test_a_later_call_replaces_what_an_earlier_one_wrote_and_a_full_disk_spoils_nothing(
    segmentation: Path, detection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    image = sources(segmentation) / "0.png"
    program("--checkpoint", segmentation, "--image", image, "--out", tmp_path, "data.segmentation.short_side=48")
    coarse = content()
    program("--checkpoint", segmentation, "--image", image, "--out", tmp_path)
    fine = content()
    assert [path.relative_to(tmp_path).as_posix() for path in fine] == ["0.png", "classes/0.png", "predictions.json"]
    assert all(fine[path] != coarse[path] for path in fine)
    program("--checkpoint", detection, "--image", image, "--out", tmp_path)  # over a segmentation's
    found = content()
    assert found.keys() == fine.keys()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert predict.main(["--checkpoint", str(detection), "--image", str(image), "--out", str(tmp_path)]) == 2
    assert content() == found


def test_settings_behind_the_images_are_no_images(segmentation: Path, tmp_path: Path) -> None:
    image = str(sources(segmentation) / "0.png")
    small = program("--checkpoint", segmentation, "--image", image, "data.segmentation.short_side=48")["images"]
    known = program("data.segmentation.short_side=48", "--checkpoint", segmentation, "--image", image)["images"]
    assert small == known != program("--checkpoint", segmentation, "--image", image)["images"]
    named = tmp_path / "seed=1.png"
    shutil.copy(image, named)
    words = ["--image", image, str(named), "data.path=x", "--json", "data.path=y", "seed=2"]
    options = predict.with_overrides(predict.parser().parse_intermixed_args(words), words)
    assert (options.image, options.overrides) == ([image, str(named)], ["data.path=x", "data.path=y", "seed=2"])


def test_a_threshold_below_that_of_the_configuration_goes_before_it(detection: Path) -> None:
    image = sources(detection) / "0.png"
    every = [
        one["score"]
        for one in program("--checkpoint", detection, "--image", image, "--threshold", 0)["images"][0]["objects"]
    ]
    low, high = np.quantile(every, [0.5, 0.9])
    expected = [score for score in every if score >= low]
    words = ["--checkpoint", detection, "--image", image, f"task.score_threshold={high}", "--threshold", low]
    assert [one["score"] for one in program(*words)["images"][0]["objects"]] == expected
    assert 0 < sum(score > high for score in every) < len(expected)


def test_names_and_kinds_of_targets_are_asked_for_without_leaving_a_set_open(
    segmentation: Path, detection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, closed = list[LocalFolder](), list[LocalFolder]()

    def opening(path: str, config: Any) -> LocalFolder:
        opened.append(LocalFolder(Path(path)))
        return opened[-1]

    monkeypatch.setattr(reader, "open_storage", opening)
    monkeypatch.setattr(LocalFolder, "close", lambda folder: closed.append(folder))
    for weights, names in ((segmentation, CLASSES), (detection, tuple(CATEGORIES[n] for n in sorted(CATEGORIES)))):
        config = load(weights.parent / "tiny.yaml")
        task: Any = build_task(config.task, config.model, config.data)
        assert sorted(task.names) == sorted(names)
        checks.masks(config)
    assert len(opened) == 3
    assert closed == opened


def test_the_screen_tells_what_was_found(
    segmentation: Path, detection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(sources(segmentation) / "0.png")
    assert predict.main(["--checkpoint", str(segmentation), "--image", image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == image
    shares = [float(line.split()[0]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.02)  # two digits of each of four
    assert predict.main(["--checkpoint", str(detection), "--image", image, "--threshold", "1"]) == 0
    assert capsys.readouterr().out == f"{image}\n  nothing found\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "nowhere"], "--image: there is no image to look at"),
        (["--image", "IMAGE", "--out", "/dev/null/x"], "--out /dev/null/x: cannot be written: Not a directory"),
        (["--image", "IMAGE", "--out", "FOLDER"], "lies there; name another folder with --out"),
        (["--image", "IMAGE", "--top", "3"], "--top is for classification, and these weights are for segmentation"),
        (["--image", "IMAGE", "--threshold", "0.3"], "--threshold is for detection"),
        (["--image", "IMAGE", "--checkpoint", "gone"], "--checkpoint gone: there is no such checkpoint, run or"),
        (["data.num_classes=9", "--image", "IMAGE"], "does not fit UPerNet: "),
        (["--image", "IMAGE", "data.num_classes=9"], "does not fit UPerNet: "),
        (["--image", "FOLDER", "--out", "FOLDER"], "lie there, where an earlier call may have written them"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    segmentation: Path, tmp_path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = shutil.copy(sources(segmentation) / "0.png", tmp_path / "0.png")
    before = Path(image).read_bytes()
    words = [str(image) if word == "IMAGE" else str(tmp_path) if word == "FOLDER" else word for word in arguments]
    assert predict.main(["--checkpoint", str(segmentation), *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert Path(image).read_bytes() == before
