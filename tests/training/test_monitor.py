"""Curves that continue after a resume: no overlap, no gap."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_config
from tensorboard.backend.event_processing import event_file_loader, plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from dgt.training import pictures
from dgt.training.checkpoint import newest, tensors_in
from dgt.training.monitor import Monitor, MonitorConfig, Resumed, Size, clock
from dgt.training.pieces import piece_of
from dgt.training.run_folder import RunFolder
from dgt.training.state import Outcome
from dgt.training.steps import StepsConfig
from dgt.training.trainer import train

SIZE = Size(total_steps=12, steps_per_epoch=6, global_batch_size=8, world_size=1)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second and process are read in the order of a number, which must not have more digits later on."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def report(folder: RunFolder, resumed_at: int, last: int, loss: float) -> None:
    monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(resumed_at), is_main=True)
    for step in range(resumed_at + 1, last + 1):
        monitor.step(step, 0.5, 0.1, {"train/loss": loss + step, "train/lr": 0.1, "train/grad_norm": 1.0})
    monitor.close()


def test_curves_continue_after_a_resume_without_overlap_or_gap(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report(folder, 0, 7, loss=0.0)  # killed after step 7; the newest checkpoint is of step 4
    with folder.metrics.open("ab") as file:
        file.write(
            b'[1]\n{"val/top1": 1}\n{"step": 2, "train/loss": "x"}\n\xff\n{"step": 8, "train/lo'
        )  # the last is a kill's
    report(folder, 4, 12, loss=100.0)
    expected = [float(s) for s in range(1, 5)] + [100.0 + s for s in range(5, 13)]
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["train/loss"] for row in rows] == expected
    events = EventAccumulator(str(folder.tensorboard)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 13))
    assert [event.value for event in events] == expected


def test_rates_count_images_and_waiting_over_the_logged_steps(tmp_path: Path) -> None:
    monitor = Monitor(MonitorConfig(log_every=4, tensorboard=False), RunFolder(tmp_path), SIZE, Resumed(), is_main=True)
    for step in range(1, 5):
        monitor.step(step, 0.5, 0.1 * step, {"train/loss": 1.0, "train/lr": 0.1})
    monitor.close()
    (row,) = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
    assert row["step"] == 4
    assert row["speed/images_per_s"] == pytest.approx(4 * 8 / 2.0)
    assert row["speed/step_seconds"] == pytest.approx(0.5)
    assert row["speed/data_wait"] == pytest.approx(1.0 / 2.0)
    assert not RunFolder(tmp_path).tensorboard.exists()


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.5),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("Radeon", "bf16", None),
    ],
)
def test_utilisation_counts_each_image_at_the_size_of_its_step_against_the_peak_of_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, peak: float | None
) -> None:
    for name, value in (("is_available", True), ("get_device_name", device), ("max_memory_allocated", 0)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    size = replace(SIZE, world_size=2, precision=precision)
    config = MonitorConfig(log_every=4, tensorboard=False)
    monitor = Monitor(config, RunFolder(tmp_path), size, Resumed(), is_main=True)
    for step in range(1, 9):
        macs = 10**12 if step < 7 else 4 * 10**12
        monitor.step(step, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1}, macs)
    monitor.close()
    rows = rows_of(RunFolder(tmp_path))
    rates = [6 * 8 * macs / (2.0 * 2) for macs in (4, 2 + 2 * 4)]
    assert [row["speed/model_tflops"] for row in rows] == pytest.approx(rates)
    assert [row.get("speed/mfu") for row in rows] == [peak and pytest.approx(rate / peak) for rate in rates]


def test_gradient_norms_are_summed_up_between_reports(tmp_path: Path) -> None:
    size = replace(SIZE, clip_grad_norm=1.0)
    monitor = Monitor(MonitorConfig(log_every=4, tensorboard=False), RunFolder(tmp_path), size, Resumed(), True)
    for step, norm in enumerate((0.5, 3.0, 1.0, 1.5, 0.25, 0.75, 0.5, 0.5), start=1):
        monitor.step(step, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1, "train/grad_norm": norm})
    monitor.close()
    rows = [
        (r["train/grad_norm"], r["train/grad_norm_max"], r["train/clipped_share"]) for r in rows_of(RunFolder(tmp_path))
    ]
    assert rows == [(1.5, 3.0, 0.5), (0.5, 0.75, 0.0)]


def test_a_finished_run_is_in_the_table_of_runs_once_with_its_settings_and_metrics(tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path), {"name": "x", "steps": {"epochs": 2}, "data": {"mean": [0.5], "size": None}}
    outcomes = (Outcome("interrupted", 1, signal.SIGTERM), Outcome("finished", 2, metrics={"top1": 60.0, "loss": 1.0}))
    for resumed, outcome in enumerate(outcomes):
        monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(resumed), is_main=True)
        monitor.conclude(outcome, settings)
        monitor.close()
    content = [
        plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for file in sorted(folder.tensorboard.iterdir())
        for event in event_file_loader.RawEventFileLoader(str(file)).Load()
        for value in event_pb2.Event.FromString(event).summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    (experiment,) = [c.experiment for c in content if c.HasField("experiment")]
    (start,) = [c.session_start_info for c in content if c.HasField("session_start_info")]
    assert [m.name.tag for m in experiment.metric_infos] == ["val/top1", "val/loss"]
    assert {key: value.WhichOneof("kind") for key, value in start.hparams.items()} == {
        "name": "string_value", "steps.epochs": "number_value", "data.mean": "string_value", "data.size": "string_value"
    }  # fmt: skip
    assert (start.hparams["steps.epochs"].number_value, start.hparams["data.mean"].string_value) == (2, "[0.5]")


def test_weights_and_gradients_have_histograms_when_it_is_time_without_what_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    network = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(
        weights=lambda: {name: piece_of(p, 0, 1) for name, p in network.named_parameters()},
        gradients=lambda: {"weight": torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]])},
    )
    monitor = Monitor(MonitorConfig(histograms_every=2), folder, SIZE, Resumed(), is_main=True)
    for step in (1, 2, 3):
        monitor.distributions(step, engine)  # type: ignore[arg-type]
    monitor.close()
    events = curves(folder)
    assert sorted(events.Tags()["histograms"]) == ["gradients/weight", "weights/bias", "weights/weight"]
    (event,) = events.Histograms("gradients/weight")
    found = event.histogram_value
    assert (event.step, found.num, found.sum, found.min, found.max) == (2, 2, 4.0, 1.0, 3.0)
    assert (found.sum_squares, sum(found.bucket), found.bucket[0], found.bucket_limit[-1]) == (10.0, 2, 1, 3.0)
    (event,) = events.Histograms("weights/weight")
    assert event.histogram_value.sum == pytest.approx(float(network.weight.detach().double().sum()), abs=1e-6)


def test_the_confusion_of_an_evaluation_is_a_picture(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(), is_main=True)
    confusion = np.array([[3, 1], [0, 2]])
    monitor.evaluation(2, {"top1": 100 * 5 / 6}, confusion)
    monitor.close()
    (image,) = curves(folder).Images("val/confusion")
    drawn = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(drawn, pictures.confusion(confusion))


def test_watching_a_run_closely_changes_none_of_its_bits(tmp_path: Path) -> None:
    found = []
    for name, watching in (
        ("plain", MonitorConfig(log_every=1, tensorboard=False)),
        ("watched", MonitorConfig(log_every=1, images_every=1, histograms_every=1, profile_steps=(2, 3))),
    ):
        steps = StepsConfig(epochs=2, global_batch_size=8, micro_batch_size=4, max_steps=4)
        config = small_config(tmp_path, name=name, monitor=watching, steps=steps)
        train(config)
        checkpoint = newest(config.run_dir / "checkpoints", print)
        assert checkpoint is not None
        stored = tensors_in(checkpoint)
        scalars = [
            {k: v for k, v in row.items() if k.startswith(("train/", "val/"))}
            for row in rows_of(RunFolder(config.run_dir))
        ]
        found.append((scalars, {tensor: stored.whole(tensor).numpy().tobytes() for tensor in stored.tensors}))
    assert found[0] == found[1]
    folder = RunFolder(tmp_path / "watched")
    assert [path.name for path in (folder.path / "profiles").iterdir()] == ["steps-00000002-00000003.pt.trace.json.gz"]
    events = curves(folder)
    assert [e.step for e in events.Images("train/images")] == [1, 2, 3, 4]
    assert [e.step for e in events.Images("val/confusion")] == [4]
    tags = events.Tags()["histograms"]
    assert {"weights/head.fc.weight", "gradients/head.fc.weight"} <= set(tags)
    assert len([t for t in tags if t.startswith("gradients/")]) == len([t for t in tags if t.startswith("weights/")])


def test_a_full_disk_costs_pictures_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(MonitorConfig(log_every=1), RunFolder(tmp_path), SIZE, Resumed(), is_main=True)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monitor.curves.add_image = fail  # type: ignore[union-attr, method-assign]
    monitor.picture(1, "train/images", np.zeros((4, 4, 3), np.uint8))
    assert "the picture train/images of step 1 could not be written in" in caplog.text
    monitor.step(2, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1})
    monitor.close()
    assert [e.step for e in curves(RunFolder(tmp_path)).Scalars("train/loss")] == [2]


def test_console_line_says_where_how_and_how_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dgt")
    report(RunFolder(tmp_path), 0, 9, loss=0.0)
    last = caplog.messages[-1]
    assert "epoch 2/2 [===============     ] step  9/12" in last
    assert "loss 9.0000  lr 1.00e-01  16 images/s  data wait 20 %  ETA 0:00:02" in last


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (3661, "1:01:01"), (90061, "1d 01:01:01")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(MonitorConfig(log_every=1), RunFolder(tmp_path), SIZE, Resumed(), is_main=False)
    monitor.step(1, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1})
    monitor.evaluation(1, {"top1": 1.0})
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_points_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(), is_main=True)
    for step in range(1, 7):
        if step in (3, 4):
            folder.metrics.rename(tmp_path / "before")
            folder.metrics.symlink_to("/dev/full")
        monitor.step(step, 0.5, 0.1, {"train/loss": float(step), "train/lr": 0.1})
        if step in (3, 4):
            folder.metrics.unlink()
            (tmp_path / "before").rename(folder.metrics)
    monitor.close()
    assert "the metrics of step 3 could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 5, 6]
    events = EventAccumulator(str(folder.tensorboard)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 5, 6]


def test_an_evaluation_that_is_repeated_is_reported_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for attempt in range(3):  # killed twice between its report and the checkpoint that would have remembered it
        monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(attempt and 2, attempt > 0), is_main=True)
        for step in (1, 2) if attempt == 0 else ():
            monitor.step(step, 0.5, 0.1, {"train/loss": float(step), "train/lr": 0.1})
        monitor.evaluation(2, {"top1": 50.0 + attempt})
        monitor.close()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row.get("val/top1")) for row in rows] == [(1, None), (2, None), (2, 52.0)]
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/top1")] == [(2, 52.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]


def test_a_row_cut_off_by_a_full_disk_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    monitor = Monitor(MonitorConfig(log_every=1, tensorboard=False), folder, SIZE, Resumed(), is_main=True)
    folder.metrics.write_text('{"step": 1, "train/lo')
    monitor.failed("cut", OSError("No space left on device"))
    monitor.step(2, 0.5, 0.1, {"train/loss": float("nan"), "train/lr": 0.1})
    lines = folder.metrics.read_text().splitlines()
    assert json.loads(lines[1])["train/loss"] is None, "NaN is no JSON"


STORY = (
    {"time": "2026-11-24T05:36:12+00:00", "event": "submitted", "text": "2 nodes | low", "job": "7"},
    {"time": "2026-11-24T05:36:20+00:00", "event": "started", "text": "attempt 0 of Slurm job 7"},
    {"time": "2026-11-24T05:40:00+00:00", "event": "stopped", "text": "preempted; saved at step 4", "step": 4},
    {"time": "2026-11-24T05:42:01+00:00", "event": "started", "text": "attempt 1 of Slurm job 7"},
)
ROWS = (
    "| 2026-11-24T05:36:12+00:00 | submitted | 2 nodes \\| low |",
    "| 2026-11-24T05:36:20+00:00 | started | attempt 0 of Slurm job 7 |",
    "| 2026-11-24T05:40:00+00:00 | stopped | preempted; saved at step 4 |",
    "| 2026-11-24T05:42:01+00:00 | started | attempt 1 of Slurm job 7 |",
)
HEAD = "| time | event | what happened |\n| --- | --- | --- |\n"


def attempt(folder: RunFolder, told: int, resumed: Resumed, last: int, outcome: Outcome | None) -> None:
    """One attempt after the first `told` events, killed where there is no outcome."""
    lines = [json.dumps(event) + "\n" for event in STORY[:told]]
    folder.events.write_text("".join([*lines, '{"time": "2026-11-24T05:4']))  # and one that is being written
    monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, resumed, is_main=True)
    if resumed.evaluation_is_due:
        monitor.evaluation(resumed.step, {"top1": 60.0})
    for step in range(resumed.step + 1, last + 1):
        monitor.step(step, 0.5, 0.1, {"train/loss": told + step, "train/lr": 0.1, "train/grad_norm": 1.0})
    if outcome is not None:
        monitor.conclude(outcome)
    monitor.close()


def curves(folder: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(folder.tensorboard)).Reload()


def texts(folder: RunFolder) -> list[tuple[int, str]]:
    """Step and content of every text of run/events, read as TensorBoard does it (the other reader purges no texts)."""
    events = plugin_event_accumulator.EventAccumulator(str(folder.tensorboard)).Reload()
    return [(t.step, t.tensor_proto.string_val[0].decode()) for t in events.Tensors("run/events/text_summary")]


def test_tensorboard_tells_the_events_where_attempts_begin_and_end_and_curves_stay_continuous(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt(folder, 2, Resumed(0), 4, Outcome("interrupted", 4, signal.SIGTERM))
    attempt(folder, 4, Resumed(4), 7, None)  # killed; the newest checkpoint is still of step 4
    attempt(folder, 4, Resumed(4), 12, Outcome("finished", 12))
    events = curves(folder)
    first, all_four = (HEAD + "\n".join(ROWS[:told]) for told in (2, 4))
    assert texts(folder) == [
        (0, first),
        (4, first + "\n\nThis attempt was stopped by SIGTERM after step 4."),
        (4, all_four),
        (4, all_four),
        (12, all_four + "\n\nThis attempt finished the training after step 12."),
    ]
    assert [(e.step, e.value) for e in events.Scalars("run/attempt")] == [(0, 1.0), (4, 2.0), (4, 2.0)]
    expected = [(s, 2.0 + s) for s in range(1, 5)] + [(s, 4.0 + s) for s in range(5, 13)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == expected


def test_events_at_a_step_whose_evaluation_comes_again_are_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt(folder, 2, Resumed(0), 4, Outcome("interrupted", 4, signal.SIGUSR2))
    attempt(folder, 4, Resumed(4, evaluation_is_due=True), 6, None)
    events = curves(folder)
    all_four = HEAD + "\n".join(ROWS)
    assert texts(folder) == [(0, HEAD + "\n".join(ROWS[:2])), (4, all_four)]
    assert [(e.step, e.value) for e in events.Scalars("run/attempt")] == [(0, 1.0), (4, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("val/top1")] == [(4, 60.0)]
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))


def test_without_a_launcher_there_are_no_events_and_before_the_first_start_no_mark(tmp_path: Path) -> None:
    alone, submitted = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "submitted")
    monitor = Monitor(MonitorConfig(log_every=1), alone, SIZE, Resumed(), is_main=True)
    monitor.step(1, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1})
    monitor.conclude(Outcome("finished", 1))
    monitor.close()
    tags = curves(alone).Tags()
    assert tags["tensors"] == []
    assert "run/attempt" not in tags["scalars"]
    submitted.path.mkdir()
    attempt(submitted, 1, Resumed(), 1, None)
    assert texts(submitted) == [(0, HEAD + ROWS[0])]
    assert "run/attempt" not in curves(submitted).Tags()["scalars"]


def test_events_that_cannot_be_read_cost_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.events.mkdir()
    report(folder, 0, 2, loss=0.0)
    assert "the events of this run cannot be read" in caplog.text
    assert [e.step for e in curves(folder).Scalars("train/loss")] == [1, 2]


def rows_of(folder: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_seconds_of_a_save_have_a_row_and_a_curve_and_are_known_after_a_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    monitor = Monitor(MonitorConfig(log_every=2), folder, SIZE, Resumed(), is_main=True)
    for step, seconds in ((1, 2.5), (2, 3.5), (3, 9.0)):
        monitor.step(step, 0.5, 0.1, {"train/loss": float(step), "train/lr": 0.1})
        monitor.saved(step, seconds, 0.1)
    monitor.close()
    assert [(row["step"], row.get("train/loss"), row.get("speed/save_seconds")) for row in rows_of(folder)] == [
        (1, None, 2.5), (2, 2.0, None), (2, None, 3.5), (3, None, 9.0)
    ]  # fmt: skip
    # The checkpoint of step 3 is damaged, and an evaluation after step 2 was cut off.
    monitor = Monitor(MonitorConfig(log_every=2), folder, SIZE, Resumed(2, True), is_main=True)
    assert monitor.longest_save == 3.5
    monitor.evaluation(2, {"top1": 50.0})
    monitor.saved(2, 0.1, 0.1)  # replaces a manifest only
    monitor.close()
    assert [row.get("speed/save_seconds") for row in rows_of(folder)] == [2.5, None, 3.5, None]
    events = curves(folder)
    assert [(e.step, e.value) for e in events.Scalars("speed/save_seconds")] == [(1, 2.5), (2, 3.5)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("val/top1")] == [(2, 50.0)]


def test_a_report_lost_to_a_full_disk_does_not_take_others_of_its_step_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    monitor = Monitor(MonitorConfig(log_every=1), folder, SIZE, Resumed(), is_main=True)
    monitor.step(1, 0.5, 0.1, {"train/loss": 1.0, "train/lr": 0.1})
    folder.metrics.rename(tmp_path / "before")
    folder.metrics.symlink_to("/dev/full")
    monitor.evaluation(1, {"top1": 50.0})
    folder.metrics.unlink()
    (tmp_path / "before").rename(folder.metrics)
    monitor.saved(1, 2.0, 0.1)
    monitor.close()
    assert [sorted(row) for row in rows_of(folder)][1:] == [["speed/save_seconds", "speed/stall_seconds", "step"]]
    events = curves(folder)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("speed/save_seconds")] == [(1, 2.0)]
