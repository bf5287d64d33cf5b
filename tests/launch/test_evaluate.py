"""Evaluation by value: against plain numpy on saved logits, over 1, 2 and 3 ranks, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from safetensors.torch import save_file

from data_pipeline.loader import build_loader
from data_pipeline.transforms import normalize
from dgt.config import Config, load
from dgt.models import build_model
from dgt.training.trainer import train
from launch import evaluate, export

SAMPLES = 19  # divides by neither 2 nor 3 ranks, nor by batches of 4
CLASSES = 8


@pytest.fixture(autouse=True)
def _as_program() -> Iterator[None]:
    """Undoes what the program sets up for a whole process."""
    handlers, threads = list(logging.root.handlers), torch.get_num_threads()
    yield
    logging.root.handlers[:] = handlers
    logging.captureWarnings(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file with random weights whose answers differ between images, in units that are far from 0."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tiny.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"name": "dgt_nano"},
                "data": {
                    "backend": "synthetic", "num_classes": CLASSES, "image_size": 32, "num_threads": 0,
                    "synthetic": {"train_samples": 8, "val_samples": SAMPLES},
                },
                "steps": {"global_batch_size": 4, "micro_batch_size": 4},
                "engine": {"precision": "fp32", "threads": 1},
            }
        )
    )  # fmt: skip
    config = load(folder / "tiny.yaml")
    torch.manual_seed(0)
    network = build_model(config.model, CLASSES)
    with torch.no_grad():
        network.get_classifier().weight.normal_(std=2.0)
    path = folder / "tiny.safetensors"
    facts = export.metadata(config) | {"step": "5", "weights": "ema"}
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata=facts)
    return path


def program(*arguments: Any) -> dict[str, Any]:
    """What `launch/evaluate.py ... --json` prints; None of ranks other than the first."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(out.getvalue() or "{}")


def saved_logits(path: Path, size: int, crop: float, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of all images, computed without the program."""
    from safetensors.torch import load_file

    from launch.sources import carried

    config: Config = carried(path, [f"data.image_size={size}", f"data.eval_crop_pct={crop}"])
    network = build_model(config.model, CLASSES).eval().to(memory_format=torch.channels_last)
    network.load_state_dict(load_file(path))
    logits, labels = [], []
    loader = build_loader(config.data, "val", train=False, global_batch_size=4, rank=0, world_size=1, seed=0)
    with loader, torch.no_grad():
        for batch in loader:
            images = normalize(batch.images, config.data.mean, config.data.std)
            logits.append(network(images.flip(-1) if mirrored else images)[batch.valid])
            labels.append(batch.labels[batch.valid])
    return torch.cat(logits).double().numpy(), torch.cat(labels).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, equation 3, as a loop over bins."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.sum() / len(labels) * abs(right[inside].mean() - confidence[inside].mean())
    return 100 * error


@pytest.mark.parametrize("flip", [None, "probabilities", "logits"])
def test_metrics_are_those_of_a_plain_computation_on_the_logits(weights: Path, flip: str | None) -> None:
    logits, labels = saved_logits(weights, 64, 0.9, mirrored=False)
    probabilities = softmax(logits)
    if flip:
        others, _ = saved_logits(weights, 64, 0.9, mirrored=True)
        assert np.abs(softmax(others) - probabilities).max() > 0.01, "mirror images must matter here"
        mean = (softmax(others) + probabilities) / 2
        probabilities = mean if flip == "probabilities" else softmax((logits + others) / 2)
    arguments = ["--flip", flip] if flip else []
    found = program("--checkpoint", weights, "--image-size", 64, "--crop-pct", 0.9, *arguments)
    order = np.argsort(-probabilities, axis=1)
    assert found["samples"] == SAMPLES
    assert found["top1"] == pytest.approx(100 * (order[:, 0] == labels).mean())
    assert found["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(axis=1).mean())
    # float32 softmax and log-softmax of logits below 2^5: relative rounding of about 2^5 * 2^-24
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(SAMPLES), labels]).mean(), rel=4e-6)
    assert found["ece"] == pytest.approx(expected_calibration_error(probabilities, labels), rel=4e-6)
    assert (found["step"], found["weights"], found["image_size"], found["crop_pct"]) == (5, "ema", 64, 0.9)
    assert found["images_per_s"] > 0


def test_tables_are_those_of_a_plain_computation_and_the_same_for_any_number_of_ranks(
    weights: Path, tmp_path: Path
) -> None:
    logits, labels = saved_logits(weights, 32, 0.875, mirrored=False)
    guesses, confidence = logits.argmax(axis=1), softmax(logits).max(axis=1)
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (labels, guesses), 1)
    written = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        arguments = ("--checkpoint", weights, "--batch-size", 2, "--out", out)
        results = [program(*arguments)] if ranks == 1 else [r.value for r in run_ranks(ranks, program, *arguments)]
        assert [bool(result) for result in results] == [True] + [False] * (ranks - 1)
        assert results[0]["ranks"] == ranks
        written.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
        counts = [[int(n) for n in row[1:]] for row in list(csv.reader((out / "confusion.csv").open()))[1:]]
        assert counts == confusion.tolist()
    names = ["classes.csv", "confusion.csv", "confusion.png", "metrics.json", "reliability.csv", "reliability.png"]
    assert list(written[0]) == names
    for name in ("classes.csv", "confusion.csv", "confusion.png"):
        assert written[0][name] == written[1][name] == written[2][name]
    tables = [json.loads(files["metrics.json"]) for files in written]
    for table in tables[1:]:
        assert table["ece"] == pytest.approx(tables[0]["ece"], rel=1e-6)  # float32 logits of other batches
        assert [b["images"] for b in table["reliability"]] == [b["images"] for b in tables[0]["reliability"]]
    recalls = []
    for row in tables[0]["classes"]:
        c = row["class"]
        assert (row["support"], row["recall"], row["precision"]) == (
            (labels == c).sum(),
            pytest.approx(100 * confusion[c, c] / confusion[c].sum()) if confusion[c].any() else None,
            pytest.approx(100 * confusion[c, c] / confusion[:, c].sum()) if confusion[:, c].any() else None,
        )
        recalls.append(np.inf if row["recall"] is None else row["recall"])
    assert recalls == sorted(recalls)
    for i, row in enumerate(tables[0]["reliability"]):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        assert row["images"] == inside.sum()
        if inside.any():
            assert row["accuracy"] == pytest.approx(100 * (guesses == labels)[inside].mean())
            assert row["confidence"] == pytest.approx(100 * confidence[inside].mean(), rel=4e-6)


def test_a_run_its_checkpoints_and_its_configuration_lead_to_the_metrics_that_training_ended_with(
    weights: Path, tmp_path: Path
) -> None:
    file = weights.with_suffix(".yaml")
    overrides = [f"output_dir={tmp_path}", "name=short", "steps.max_steps=1", "monitor.tensorboard=false"]
    train(load(file, overrides))
    run = tmp_path / "short"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [row for row in rows if "val/top1" in row]
    expected = {name: logged[f"val/{name}"] for name in ("top1", "top5", "loss", "ece", "samples")}
    step = run / "checkpoints" / "step_00000001"
    for arguments in (
        ("--run", run),
        ("--checkpoint", run),
        ("--checkpoint", step),
        ("--run", run, "--checkpoint", "newest"),
        ("--config", file, *overrides),
    ):
        found = program(*arguments)
        assert (found["checkpoint"], found["step"], found["weights"]) == (str(step), 1, "ema")
        assert {name: found[name] for name in expected} == expected
    assert program("--run", run, "--weights", "raw")["loss"] != expected["loss"]


def test_the_screen_shows_the_metrics_and_the_worst_classes_first(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(weights)]) == 0
    out = capsys.readouterr().out
    assert f"{weights}, ema weights after step 5\n19 images of split val at 32 px (crop 0.875)\n" in out
    table = out.split("\nclasses\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split() == ["class", "name", "support", "recall", "precision", "top5", "most_taken_for"]
    shown = [float(line.split()[3]) for line in table[1:] if line.split()[3] != "-"]
    assert shown == sorted(shown)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.num_classes=7"], "8 classes) does not fit DGT: head.fc.bias is (8,) in the file and (7,) in the"),
        (["--split", "tset"], "has the splits ['train', 'val'], not 'tset'"),
        (["--image-size", "4"], "image_size: must be at least 8, got 4"),
        (["--crop-pct", "1.5"], "eval_crop_pct: must be in (0, 1], got 1.5"),
        (["--batch-size", "-1"], "evaluate_batch_size: must not be negative, got -1"),
        (["--out", "/dev/null/report"], "--out /dev/null/report: cannot be written: Not a directory"),
        (["--weights", "raw"], "holds ema weights; leave --weights raw out"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said_in_one_sentence(
    weights: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(weights), *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "whose best checkpoint? Name a run with --run DIR"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: there is no such checkpoint, run or .safetensors file"),
        (["--run", "nowhere"], "nowhere is no run's folder: it has no config.yaml"),
        (["--checkpoint", "cut.safetensors"], "cut.safetensors cannot be read"),
    ],
)
def test_a_source_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.safetensors").write_bytes(b"\x10\x00")
    assert evaluate.main(arguments) == 2
    assert sentence in capsys.readouterr().err
