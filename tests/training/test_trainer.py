"""The loop's behaviour around a step: exact evaluation, stopping, failing saves, bad gradients."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline import DamagedSampleError, RawSample
from data_pipeline.config import SyntheticConfig
from data_pipeline.synthetic import SyntheticSource
from dgt.config import Config
from dgt.tasks import Classification
from dgt.training import checkpoint
from dgt.training.checkpoint import CheckpointConfig, SaveError
from dgt.training.interrupt import Interruption
from dgt.training.keeper import Keeper
from dgt.training.monitor import MonitorConfig
from dgt.training.parallel.config import DeepSpeedConfig
from dgt.training.steps import StepsConfig
from dgt.training.trainer import Trainer, train


def short(folder: Path, engine: str = "ddp", **sections: Any) -> Config:
    """Two steps, no epochs to speak of."""
    steps = StepsConfig(epochs=2, global_batch_size=8, micro_batch_size=4, max_steps=2)
    return small_config(folder, engine, **({"steps": steps} | sections))


def evaluation_of(folder: Path, engine: str, samples: int, steps: StepsConfig) -> dict[str, float]:
    """Metrics of the seed's initial weights: the learning rate is 0."""
    config = short(folder, engine, steps=steps)
    data = replace(config.data, synthetic=SyntheticConfig(train_samples=16, val_samples=samples))
    in_parts = replace(config.engine, deepspeed=DeepSpeedConfig(stage=3))
    config = replace(config, data=data, engine=in_parts, optimizer=replace(config.optimizer, lr=0.0, weight_decay=0.0),
                     schedule=replace(config.schedule, warmup_lr=0.0, min_lr=0.0))  # fmt: skip
    metrics = train(config).metrics
    assert metrics is not None
    return metrics


@pytest.mark.parametrize(
    ("engine", "ranks", "samples"),
    [("ddp", 2, 19), ("fsdp", 3, 1), pytest.param("deepspeed", 2, 1, marks=pytest.mark.deepspeed)],
)
def test_evaluation_counts_each_sample_once_for_sizes_that_do_not_divide(
    tmp_path: Path, engine: str, ranks: int, samples: int
) -> None:
    steps = StepsConfig(epochs=1, global_batch_size=2 * ranks, micro_batch_size=2, max_steps=1)
    single = evaluation_of(tmp_path / "single", "ddp", samples, steps)
    assert single["samples"] == samples
    for result in run_ranks(ranks, evaluation_of, tmp_path / "ranks", engine, samples, steps):
        assert result.value["samples"] == samples  # with one sample, two of three ranks have none
        assert result.value["top1"] == single["top1"]
        assert result.value["loss"] == pytest.approx(single["loss"], rel=1e-6)


def train_with_signal_on_one_rank(config: Config, at_step: int) -> tuple[str, int, int]:
    """SIGTERM reaches rank 1 alone, during the given step."""
    interruption = Interruption()
    original = Trainer.step

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        taken = original(self, batch, waited)
        if self.world.rank == 1 and self.progress.step == at_step:
            interruption.note(signal.SIGTERM, None)
        return taken

    Trainer.step = step  # type: ignore[method-assign]
    outcome = train(config, interruption)
    return outcome.status, outcome.step, outcome.signal


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    config = short(tmp_path)
    for result in run_ranks(2, train_with_signal_on_one_rank, config, 1):
        assert result.value == ("interrupted", 1, signal.SIGTERM)
    assert [p.name for p in checkpoint.committed(config.run_dir / "checkpoints")] == ["step_00000001"]


def test_an_interrupted_evaluation_is_done_after_the_resume(tmp_path: Path) -> None:
    config = short(tmp_path)
    interruption = Interruption()

    class SignalDuringEvaluation(Interruption):
        """Asked for the second time within the evaluation after the last step, it has a signal."""

        calls = 0

        def agreed(self, world: Any) -> int:
            self.calls += 1
            return signal.SIGTERM if self.calls >= 4 else 0

    outcome = train(config, SignalDuringEvaluation())
    assert (outcome.status, outcome.step, outcome.metrics) == ("interrupted", 2, None)
    again = train(config, interruption)
    assert (again.status, again.step) == ("finished", 2)
    assert again.metrics is not None
    newest = checkpoint.newest(config.run_dir / "checkpoints", print)
    assert newest is not None
    assert (newest.manifest["progress"]["evaluated_at"], newest.manifest["progress"]["best_step"]) == (2, 2)
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/top1" in row] == [2]


def train_with_signal_in_an_evaluation(config: Config) -> tuple[str, int, int, int]:
    """Rank 1 alone gets a signal while it evaluates its first batch; how it ended, and how many batches were read."""
    interruption, totals, calls = Interruption(), Classification.totals, []

    def signalled(self: Classification, *args: Any) -> Any:
        calls.append(1)
        if int(os.environ["RANK"]) == 1:
            interruption.note(signal.SIGTERM, None)
        return totals(self, *args)

    Classification.totals = signalled  # type: ignore[method-assign]
    outcome = train(config, interruption)
    return outcome.status, outcome.step, outcome.signal, len(calls)


def test_a_signal_to_one_rank_in_an_evaluation_stops_all_ranks_within_it_and_it_is_repeated(tmp_path: Path) -> None:
    config = short(tmp_path)
    first, second = (result.value for result in run_ranks(2, train_with_signal_in_an_evaluation, config))
    assert first == second
    assert first[:3] == ("interrupted", 2, signal.SIGTERM)
    assert first[3] == 1, "19 samples are more than one batch a rank"
    newest = checkpoint.newest(config.run_dir / "checkpoints", print)
    assert newest is not None
    assert (newest.step, newest.manifest["progress"]["evaluated_at"]) == (2, 0)
    assert [result.value.status for result in run_ranks(2, train, config)] == ["finished"] * 2


def fail_to_save(*_: Any, **__: Any) -> str:
    return "the checkpoint of step 2 could not be written to here (0 MB free): OSError: disk full"


def failing_at(*steps: int) -> Any:
    """A stand-in for checkpoint.save that fails at these steps, as a full disk does."""
    real = checkpoint.save

    def save(folder: Path, step: int, *rest: Any) -> str | None:
        return (
            f"the checkpoint of step {step} could not be written: disk full"
            if step in steps
            else real(folder, step, *rest)
        )

    return save


def test_a_failing_save_stops_or_lets_go_on_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "save", failing_at(1))
    every_step = CheckpointConfig(every_steps=1)
    assert train(short(tmp_path / "continue", checkpoint=every_step)).status == "finished"
    assert "disk full; training goes on" in caplog.text
    with pytest.raises(SaveError, match="disk full"):
        train(short(tmp_path / "stop", checkpoint=replace(every_step, on_error="stop")))


def test_a_run_whose_last_save_fails_is_neither_finished_nor_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", failing_at(1, 2))
    with pytest.raises(SaveError, match="step 2 could not be written"):
        train(short(tmp_path / "end"))
    monkeypatch.setattr(Trainer, "asked_to_stop", lambda self: signal.SIGTERM if self.progress.step else 0)
    with pytest.raises(SaveError, match="step 1 could not be written"):
        train(short(tmp_path / "signal"))


@pytest.mark.parametrize(("accuracies", "lost", "best"), [((50.0, 10.0, 20.0), (), 2), ((50.0, 60.0, 20.0), (4,), 2)])
def test_the_best_checkpoint_outlives_newer_ones_and_a_lost_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: tuple[float, ...], lost: tuple[int, ...], best: int
) -> None:
    answers = iter(accuracies)
    monkeypatch.setattr(Classification, "metrics", lambda *_: {"top1": next(answers), "samples": 1.0})
    monkeypatch.setattr(checkpoint, "save", failing_at(*lost))
    config = small_config(tmp_path, checkpoint=CheckpointConfig(every_steps=100, keep_last=1),
                          steps=StepsConfig(epochs=3, global_batch_size=16, micro_batch_size=8))  # fmt: skip
    assert train(config).status == "finished"
    kept = checkpoint.committed(config.run_dir / "checkpoints")
    assert [path.name for path in kept] == ["step_00000006", f"step_{best:08d}"]
    assert checkpoint.verify(kept[0]).manifest["progress"]["best_step"] == best


def test_a_disk_that_fills_up_costs_checkpoints_but_not_the_run(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(small_disk, checkpoint=CheckpointConfig(every_steps=1, keep_last=1))
    filler = small_disk / "filler"
    original = Trainer.step

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        if self.progress.step == 2:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        if self.progress.step == 5:
            filler.unlink()
        return original(self, batch, waited)

    monkeypatch.setattr(Trainer, "step", step)
    assert train(config).status == "finished"
    assert "the checkpoint of step 3 could not be written" in caplog.text
    newest = checkpoint.newest(config.run_dir / "checkpoints", print)
    assert newest is not None
    assert newest.step == 8


def test_training_draws_nothing_from_torchs_global_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[torch.Tensor] = []
    original = Trainer.step

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        states.append(torch.random.get_rng_state())
        taken = original(self, batch, waited)
        states.append(torch.random.get_rng_state())
        return taken

    monkeypatch.setattr(Trainer, "step", step)
    train(short(tmp_path))
    assert len(states) == 4
    assert all(torch.equal(state, states[0]) for state in states)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_ends_at_once_when_it_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short(tmp_path, monitor=MonitorConfig(log_every=1, log_samples=True))
    first = train(config)
    before = content(config.run_dir)
    assert {name.split("/")[0] for name in before} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "samples", "checkpoints"
    }  # fmt: skip
    monkeypatch.setattr(Trainer, "step", None)
    monkeypatch.setattr(Keeper, "save", None)
    monkeypatch.setattr(Classification, "totals", None)
    for signals in ((), (signal.SIGTERM,)):  # a signal changes nothing about that
        interruption = Interruption()
        for number in signals:
            interruption.note(number, None)
        outcome = train(config, interruption)
        assert (outcome.status, outcome.step, outcome.signal) == ("finished", 2, 0)
        assert outcome.metrics == first.metrics
        assert outcome.metrics is not None
    assert content(config.run_dir) == before


def test_another_number_of_ranks_and_engine_continue_a_run(tmp_path: Path) -> None:
    """Two ranks under fsdp go on where one under ddp stopped, with the same samples and learning rate."""
    undisturbed, moved = small_config(tmp_path / "a"), small_config(tmp_path / "b")
    train(undisturbed)
    first = replace(moved, steps=replace(moved.steps, max_steps=2))
    train(first)
    elsewhere = replace(moved, engine=replace(moved.engine, name="fsdp"))
    run_ranks(2, train, elsewhere)

    def rows(config: Config) -> list[dict[str, Any]]:
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    expected, continued = rows(undisturbed), rows(moved)
    assert [r["step"] for r in continued] == [r["step"] for r in expected]
    assert [r["train/lr"] for r in continued] == [r["train/lr"] for r in expected]
    assert {r["data/samples"] for r in continued} == {8}, "of all ranks together"
    # The same weights and samples: the first loss after the move differs by the rounding of another summation.
    assert continued[2]["train/loss"] == pytest.approx(expected[2]["train/loss"], rel=1e-5)


def test_what_the_data_pipeline_met_is_reported_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SyntheticSource.read

    def damaged(self: SyntheticSource, index: int) -> RawSample:
        if index == 3:
            raise DamagedSampleError("train/synthetic-000000", "00000003", "checksum differs")
        return read(self, index)

    monkeypatch.setattr(SyntheticSource, "read", damaged)
    config = small_config(tmp_path)
    train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    assert [(row["data/image_size"], row["data/samples"]) for row in rows] == [(32, 8)] * 8
    assert sum(row["data/bad_samples"] for row in rows) == 2  # once in each epoch
    assert all(row["data/decode_seconds"] > 0 and row["data/wait_seconds"] >= 0 for row in rows)
    events = EventAccumulator(str(config.run_dir / "tensorboard")).Reload().Tags()["scalars"]
    assert {"data/wait_seconds", "data/decode_seconds", "data/bad_samples"} <= set(events)
    listed = [json.loads(line) for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {(entry["shard"], entry["key"]) for entry in listed} == {
        ("train/synthetic-000000", "00000003"),  # of the validation, too, which has a sample 3 of its own
    }


def history(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what measures time and memory; a save's lines hold nothing else."""
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("speed/") and not k.endswith("_seconds")} for row in rows]
    return [row for row in rows if row.keys() > {"step"}]


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = short(tmp_path, checkpoint=CheckpointConfig(every_steps=1))
    train(config)
    folder = config.run_dir / "checkpoints"
    rows = history(config)
    damaged = folder / "step_00000002" / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    assert train(config).status == "finished"
    assert "checkpoint passed over" in caplog.text
    assert str(damaged) in caplog.text
    assert history(config) == rows
    assert [row["step"] for row in rows] == [1, 2, 2], "the steps and the evaluation"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000001", "step_00000002", "step_00000002.damaged"]


def metrics_with_changes(folder: Path, place: str) -> dict[str, float]:
    """Jitter and constant erasing are the same to the last bit wherever they are made."""
    config = short(folder)
    augment = replace(config.data.augment, color_jitter=0.5, random_erasing=0.5, erasing_mode="const", place=place)
    metrics = train(replace(config, data=replace(config.data, augment=augment))).metrics
    assert metrics is not None
    return metrics


def test_training_with_changes_made_on_the_device_equals_changes_made_in_the_loader(tmp_path: Path) -> None:
    assert metrics_with_changes(tmp_path / "cpu", "cpu") == metrics_with_changes(tmp_path / "device", "device")
    plain = train(short(tmp_path / "plain")).metrics
    assert plain is not None
    assert plain != metrics_with_changes(tmp_path / "again", "device")
