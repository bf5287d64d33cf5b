"""The sample ids of every step: of the history that survived, complete, and no reason for a run to end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_self, run_ranks
from small import small_config

from data_pipeline.config import SyntheticConfig
from dgt.config import Config
from dgt.training.monitor import MonitorConfig
from dgt.training.sample_log import SampleLog, served_samples, surviving_samples
from dgt.training.state import Progress
from dgt.training.trainer import Trainer, train
from dgt.training.world import World


def rank(number: int, size: int) -> World:
    """A rank that talks to nobody."""
    return World(number, size, torch.device("cpu"), None)  # type: ignore[arg-type]


def at(step: int, batches: int | None = None) -> Progress:
    """After `step` steps and `batches` batches of the first epoch; as many as steps where not said."""
    return Progress(step=step, data={"epoch": 0, "consumed": step if batches is None else batches})


def write(run: Path, size: int, resumed_step: int, last: int, enabled: bool = True) -> None:
    """One attempt of all ranks: the ids of rank r at step s in a world of n are 100 n + 10 s + r."""
    for r in range(size):
        samples = SampleLog(run / "samples", rank(r, size), at(resumed_step), enabled)
        for step in range(resumed_step + 1, last + 1):
            samples.step(step, at(step).data, [100 * size + 10 * step + r], used=True)


def test_a_resume_forgets_later_steps_also_of_ranks_that_are_no_more(tmp_path: Path) -> None:
    write(tmp_path, size=3, resumed_step=0, last=4)
    for r in range(3):
        with (tmp_path / "samples" / f"rank-{r}.jsonl").open("a") as file:
            file.write('{"step": 1, "ids": [9')  # cut off by a kill
    write(tmp_path, size=1, resumed_step=2, last=3)
    assert surviving_samples(tmp_path) == {1: [310, 311, 312], 2: [320, 321, 322], 3: [130]}
    write(tmp_path, size=2, resumed_step=1, last=2)
    assert surviving_samples(tmp_path) == {1: [310, 311, 312], 2: [220, 221]}


def test_batches_of_skipped_and_lost_steps_stay_served_but_unused(tmp_path: Path) -> None:
    """Steps 1 to 3, a bad batch, back to step 1 with the data that follows, and a resume there."""
    for _attempt in range(2):
        samples = SampleLog(tmp_path / "samples", rank(0, 1), at(0), enabled=True)
        for step in (1, 2, 3):
            samples.step(step, at(step).data, [step], used=True)
        samples.step(4, at(4).data, [4], used=False)
    for _attempt in range(2):
        samples = SampleLog(tmp_path / "samples", rank(0, 1), at(1, batches=4), enabled=True)
        assert surviving_samples(tmp_path) == {1: [1]}
        assert served_samples(tmp_path) == {0: [1, 2, 3, 4]}
        samples.step(2, at(5).data, [5], used=True)
    assert surviving_samples(tmp_path) == {1: [1], 2: [5]}
    assert served_samples(tmp_path) == {0: [1, 2, 3, 4, 5]}


def test_an_attempt_without_the_log_forgets_what_its_steps_replace_and_makes_no_folder(tmp_path: Path) -> None:
    write(tmp_path, size=2, resumed_step=0, last=3)
    write(tmp_path, size=2, resumed_step=1, last=3, enabled=False)
    assert surviving_samples(tmp_path) == {1: [210, 211]}
    write(tmp_path / "other", size=2, resumed_step=0, last=3, enabled=False)
    assert not (tmp_path / "other").exists()
    assert surviving_samples(tmp_path / "other") == {}


def test_a_full_disk_costs_lines_and_one_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = SampleLog(tmp_path / "samples", rank(0, 1), at(0), enabled=True)
    kept = tmp_path / "before"
    for step in range(1, 6):
        if step == 3:
            samples.path.rename(kept)
            samples.path.symlink_to("/dev/full")
        if step == 5:
            samples.path.unlink()
            kept.write_text(kept.read_text() + '{"step": 3, "i')  # as far as it came
            kept.rename(samples.path)
        samples.step(step, at(step).data, [step], used=True)
    assert surviving_samples(tmp_path) == {1: [1], 2: [2], 5: [5]}
    assert len(caplog.messages) == 1
    assert "the sample ids of step 3 could not be written" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_file_that_cannot_be_read_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples" / "rank-0.jsonl").mkdir(parents=True)
    SampleLog(tmp_path / "samples", rank(0, 1), at(3), enabled=True).step(4, at(4).data, [1], used=True)
    assert "earlier sample ids could not be read" in caplog.text


def train_and_die(config: Config, die_at: int) -> None:
    """Rank 1 is SIGKILLed before the given step is saved."""
    original = Trainer.step

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        taken = original(self, batch, waited)
        if self.world.rank == 1 and self.progress.step == die_at:
            kill_self()
        return taken

    Trainer.step = step  # type: ignore[method-assign]
    train(config)


def test_each_sample_is_logged_once_an_epoch_after_a_kill_and_a_resume_by_fewer_ranks(tmp_path: Path) -> None:
    config = small_config(tmp_path, monitor=MonitorConfig(log_every=100, log_samples=True, tensorboard=False))
    data = replace(config.data, synthetic=SyntheticConfig(train_samples=32, val_samples=5))
    config = replace(config, data=data)
    run_ranks(2, train_and_die, config, 3, check=False)
    assert len(surviving_samples(config.run_dir)[3]) in (4, 8), "the step that was lost is in the files of the dead"
    train(config)
    found = surviving_samples(config.run_dir)
    assert list(found) == list(range(1, 9))
    for epoch in (range(1, 5), range(5, 9)):
        assert Counter(i for step in epoch for i in found[step]) == Counter(range(32))
    shares = [len((config.run_dir / "samples" / f"rank-{r}.jsonl").read_text().splitlines()) for r in (0, 1)]
    assert shares == [8, 2]
    assert json.loads((config.run_dir / "samples" / "rank-1.jsonl").read_text().splitlines()[0])["step"] == 1
