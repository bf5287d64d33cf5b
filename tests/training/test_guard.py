"""Bad steps: nothing moves, everyone agrees, the samples are named, and a run that stays bad goes back."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_self, run_ranks
from small import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.config import SyntheticConfig
from dgt.config import Config
from dgt.tasks import Classification
from dgt.training import checkpoint
from dgt.training.checkpoint import CheckpointConfig
from dgt.training.ema import Ema
from dgt.training.guard import Guard, GuardConfig, fault, read
from dgt.training.interrupt import Interruption
from dgt.training.keeper import Keeper
from dgt.training.monitor import MonitorConfig
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig, build_engine
from dgt.training.sample_log import served_samples, surviving_samples
from dgt.training.state import DivergedError, Progress
from dgt.training.steps import StepsConfig
from dgt.training.trainer import Trainer, train
from dgt.training.world import joined
from launch.checks import would_repeat

NAN = float("nan")


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [(1.0, 1.0, ""), (NAN, 1.0, "its loss is not finite"), (math.inf, NAN, "its loss is not finite"),
     (1.0, math.inf, "its gradient is not finite"), (1.0, NAN, "its gradient is not finite")],
)  # fmt: skip
def test_a_loss_or_gradient_that_is_not_finite_is_a_fault(loss: float, norm: float, words: str) -> None:
    assert fault(loss, norm, Progress(), GuardConfig()) == words


def test_a_spike_is_known_by_the_median_once_the_window_is_full() -> None:
    config = GuardConfig(spike_factor=2.0, spike_window=3)
    guard = Guard(config, None, Progress(), Path())  # type: ignore[arg-type]
    for loss in (1.0, 100.0):
        guard.note_good(loss)
    assert guard.accepts(1000.0, 1.0), "two losses do not tell what is usual"
    guard.note_good(3.0)
    assert guard.accepts(6.0, 1.0)
    assert not guard.accepts(6.01, 1.0)
    assert "6.01 is more than 2 times the usual 3" in fault(6.01, 1.0, guard.progress, config)
    guard.note_good(4.0)
    assert guard.progress.recent_losses == [100.0, 3.0, 4.0]
    assert Guard(GuardConfig(), None, guard.progress, Path()).accepts(1e9, 1.0)  # type: ignore[arg-type]


def config_for(folder: Path, engine: str = "ddp", **sections: Any) -> Config:
    """Two epochs of four steps over 32 samples, whose ids are logged."""
    base = small_config(folder, engine, monitor=MonitorConfig(log_every=1, log_samples=True),
                        steps=StepsConfig(epochs=2, global_batch_size=8, micro_batch_size=2))  # fmt: skip
    data = replace(base.data, synthetic=SyntheticConfig(train_samples=32, val_samples=5))
    return replace(base, data=data, engine=replace(base.engine, threads=1), **sections)


def poison(*batches: int, rank: int = 0, micro_batch: int = -1, die_at: int = 0) -> None:
    """The loss of one micro-batch of one rank is not a number in these batches, counted from 1 in this process.

    `die_at`: the batch after which the rank is killed.
    """
    state = {"batch": 0, "part": 0}
    original_step, original_loss = Trainer.step, Classification.loss

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        state.update(batch=state["batch"] + 1, part=0)
        state["parts"] = -(-len(batch.labels) // self.config.steps.micro_batch_size)
        taken = original_step(self, batch, waited)
        if state["batch"] == die_at:
            kill_self()
        return taken

    def loss(self: Classification, model: Any, inputs: Any) -> torch.Tensor:
        state["part"] += 1
        found = original_loss(self, model, inputs)
        is_bad = state["batch"] in batches and state["part"] == micro_batch % state["parts"] + 1
        return found * NAN if is_bad and int(os.environ.get("RANK", 0)) == rank else found

    Trainer.step, Classification.loss = step, loss  # type: ignore[method-assign]


def observed(config: Config, *batches: int) -> dict[str, Any]:
    """Trains with batches of which rank 1's first micro-batch is bad; what each changes, and how it ended."""
    poison(*batches, rank=1, micro_batch=0)
    step, begin, update = Trainer.step, Keeper.save, Ema.update
    averaged: list[int] = []
    changed: list[list[str]] = []
    saves: list[tuple[int, int]] = []
    counts: list[tuple[int, int]] = []

    def bits(trainer: Trainer) -> dict[str, bytes]:
        return {name: piece.local.detach().numpy().tobytes() for name, piece in trainer.keeper.pieces().items()}

    def watched(self: Trainer, batch: Any, waited: float) -> bool:
        before, progress = bits(self), asdict(self.progress)
        taken = step(self, batch, waited)
        if not taken:
            after = bits(self)
            moved = [name for name in before if before[name] != after[name]]
            moved += [key for key, value in progress.items() if asdict(self.progress)[key] != value]
            changed.append(sorted(moved))
        counts.append((self.progress.step, self.progress.data["epoch"] * 32 + self.progress.data["consumed"]))
        return taken

    def save(self: Keeper) -> bool:
        saves.append((self.progress.step, self.progress.bad_in_a_row))
        return begin(self)

    def average(self: Ema, step: int) -> None:
        averaged.append(step)
        update(self, step)

    Trainer.step, Keeper.save, Ema.update = watched, save, average  # type: ignore[method-assign]
    outcome = train(config)
    return {"averaged": averaged, "changed": changed, "saves": saves, "counts": counts, "outcome": outcome}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_nan_in_one_micro_batch_of_one_rank_moves_nothing_on_any_rank_and_is_listed(
    tmp_path: Path, engine: str
) -> None:
    config = config_for(tmp_path, engine, guard=GuardConfig(spike_factor=50.0, spike_window=2))
    results = run_ranks(2, observed, config, 3, 4, 7)
    for result in results:
        seen = result.value
        assert seen["changed"] == [["bad_in_a_row", "data"]] * 3, "batches are used up and nothing else moves"
        assert seen["counts"] == [(1, 8), (2, 16), (2, 24), (2, 32), (3, 40), (4, 48), (4, 56), (5, 64),
                                  (6, 72), (7, 80), (8, 88)]  # fmt: skip
        assert seen["averaged"] == list(range(8)), "the averages' decay goes by steps taken"
        assert seen["outcome"] == replace(results[0].value["outcome"], status="finished", step=8)
        # Steps 2, 4, 6 as configured, and the best; a bad step right after a save causes none.
        assert [step for step, _ in seen["saves"]] == sorted({step for step, _ in seen["saves"]})
        assert all(bad == 0 for _, bad in seen["saves"])
    rows = read(config.run_dir / "bad_steps.jsonl")
    assert [(row["step"], row["epoch"], row["consumed"]) for row in rows] == [(3, 0, 24), (3, 0, 32), (5, 1, 24)]
    assert all(row["why"] == "its loss is not finite" and row["loss"] is None for row in rows)
    assert all(row["suspects"] == row["ids"][4:6] for row in rows), "rank 1's first two of four samples"
    used, served = surviving_samples(config.run_dir), served_samples(config.run_dir)
    assert list(used) == list(range(1, 9))
    assert sorted(served[0]) == sorted(served[1]) == list(range(32)), "each once an epoch, skipped ones included"
    skipped = [i for row in rows[:2] for i in row["ids"]]
    assert sorted(skipped + [i for step in (1, 2) for i in used[step]]) == list(range(32))


def test_a_signal_after_a_bad_step_saves_the_position_and_the_resume_repeats_no_batch(tmp_path: Path) -> None:
    """At the step of a checkpoint, whose manifest alone changes, and at one that has none."""
    for bad in (3, 2):
        config = config_for(tmp_path / str(bad), checkpoint=CheckpointConfig(every_steps=2, asynchronous=False))
        (first,) = run_ranks(1, interrupted_after_bad, config, bad)
        assert first.value == ("interrupted", bad - 1)
        newest = checkpoint.verify(checkpoint.committed(config.run_dir / "checkpoints")[0])
        assert (newest.step, newest.manifest["progress"]["bad_in_a_row"]) == (bad - 1, 1)
        assert newest.manifest["progress"]["data"]["consumed"] == 8 * bad
        assert train(config).step == 8
        served = served_samples(config.run_dir)
        assert sorted(served[0]) == sorted(served[1]) == list(range(32))
        assert len(read(config.run_dir / "bad_steps.jsonl")) == 1


def interrupted_after_bad(config: Config, bad: int) -> tuple[str, int]:
    """A signal comes right after the bad batch."""
    interruption = Interruption()
    poison(bad)
    step = Trainer.step

    def signalled(self: Trainer, batch: Any, waited: float) -> bool:
        taken = step(self, batch, waited)
        if not taken:
            interruption.note(signal.SIGTERM, None)
        return taken

    Trainer.step = signalled  # type: ignore[method-assign]
    outcome = train(config, interruption)
    return outcome.status, outcome.step


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_bad_steps_in_a_row_lead_back_to_the_checkpoint_and_past_the_data_even_through_a_kill(
    tmp_path: Path, engine: str
) -> None:
    """Steps 1, 2 (saved), 3; two bad batches; back to 2, killed there; from 2 on with the sixth batch."""
    config = config_for(tmp_path, engine, guard=GuardConfig(max_bad_in_a_row=2))
    plain = config_for(tmp_path / "plain", engine)
    ended = run_ranks(2, killed_after_return, config, check=False)
    assert -signal.SIGKILL in [rank.exitcode for rank in ended]
    newest = checkpoint.verify(checkpoint.committed(config.run_dir / "checkpoints")[0])
    progress = newest.manifest["progress"]
    assert (newest.step, progress["rollbacks"], progress["bad_in_a_row"]) == (2, 1, 0)
    assert (progress["data"]["epoch"], progress["data"]["consumed"]) == (1, 8)
    for result in run_ranks(2, train, config):
        assert (result.value.status, result.value.step) == ("finished", 8)
    used, served = surviving_samples(config.run_dir), served_samples(config.run_dir)
    assert list(used) == list(range(1, 9)), "step 3 is the one that was taken again"
    assert sorted(served[0]) == sorted(served[1]) == list(range(32))
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    curve = EventAccumulator(str(config.run_dir / "tensorboard")).Reload().Scalars("train/loss")
    assert [point.step for point in curve] == list(range(1, 9))
    run_ranks(2, train, plain)
    expected = [json.loads(line) for line in (plain.run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [[row["train/lr"] for row in found if "train/lr" in row] for found in (rows, expected)]
    assert rates[0] == rates[1], "the schedule goes by steps taken"


def killed_after_return(config: Config) -> None:
    """Batches 4 and 5 are bad; the first rank dies as soon as the run has returned."""
    poison(4, 5)
    return_to = Keeper.return_to

    def and_die(self: Keeper, *args: Any) -> None:
        return_to(self, *args)
        if self.world.is_main:
            kill_self()

    Keeper.return_to = and_die  # type: ignore[method-assign]
    train(config)


def test_after_the_allowed_returns_a_run_ends_with_a_report_that_no_launcher_retries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step", Trainer.step)
    monkeypatch.setattr(Classification, "loss", Classification.loss)
    config = config_for(tmp_path, guard=GuardConfig(max_bad_in_a_row=2, max_rollbacks=1))
    poison(*range(4, 99))
    with pytest.raises(DivergedError) as caught:
        train(config)
    report = str(caught.value)
    assert report.startswith("2 steps in a row were bad after step 2 (its loss is not finite), after 1 returns")
    rows = read(config.run_dir / "bad_steps.jsonl")
    assert len(rows) == 4
    assert str(rows[-1]["ids"]) in report
    assert str(config.run_dir / "bad_steps.jsonl") in report
    assert "back to step 2, and on with the data that follows" in caplog.text
    assert would_repeat(caught.value)


def test_a_checkpoint_from_which_only_bad_steps_come_is_not_returned_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches after the checkpoint of step 4 are all bad: the one of step 2 is the last good one."""
    monkeypatch.setattr(Trainer, "step", Trainer.step)
    monkeypatch.setattr(Classification, "loss", Classification.loss)
    config = config_for(tmp_path, guard=GuardConfig(max_bad_in_a_row=2))
    poison(5, 6)
    assert train(config).status == "finished"
    folder = config.run_dir / "checkpoints"
    assert (folder / "step_00000004.abandoned").is_dir()
    progress = checkpoint.verify(checkpoint.committed(folder)[0]).manifest["progress"]
    assert (progress["step"], progress["rollbacks"]) == (8, 1)
    data = progress["data"]
    assert 32 * data["epoch"] + data["consumed"] == 8 * (4 + 2 + 6), "four steps, two bad ones, and six from step 2 on"


def test_a_run_without_a_checkpoint_to_return_to_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step", Trainer.step)
    monkeypatch.setattr(Classification, "loss", Classification.loss)
    config = config_for(tmp_path, guard=GuardConfig(max_bad_in_a_row=2))
    poison(*range(1, 99))
    with pytest.raises(DivergedError, match=r"after step 0 .*there is no checkpoint to return to; training stops"):
        train(config)
    assert checkpoint.committed(config.run_dir / "checkpoints") == []


def statistics_after_a_bad_step(engine: str) -> tuple[bool, bool]:
    """Whether a bad and a good step have changed the running mean of a batch norm."""
    with joined() as world:
        network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        built = build_engine(network, world, EngineConfig(name=engine, precision="fp32"), OptimizerConfig())  # type: ignore[arg-type]
        changed = []
        for factor in (NAN, 1.0):
            before = network[0].running_mean.clone()
            built.train_step(
                [torch.full((4, 3), 2.0 + world.rank)], lambda model, x, by=factor: model(x).sum() * by, 1e-3,
                lambda loss, norm: loss == loss,
            )  # fmt: skip
            changed.append(not torch.equal(before, network[0].running_mean))
        return changed[0], changed[1]


def test_a_bad_step_leaves_running_statistics_alone() -> None:
    assert run_ranks(1, statistics_after_a_bad_step, "ddp")[0].value == (False, True)
