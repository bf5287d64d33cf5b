"""Runs on this machine, started as a person starts them: to the end, interrupted, killed, evaluated, exported."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import has_step, steps_logged, wait_for, write_config, write_slurm_record
from safetensors import safe_open

from dgt.config import load
from dgt.training import trainer
from dgt.training.checkpoint import CheckpointError, SaveError, UnreadableError
from dgt.training.state import Outcome
from launch import checks, evaluate, export, runs, submit, train, weights


@dataclass
class Started:
    """One call of `launch/submit.py --cluster local`."""

    status: int
    out: str
    err: str
    seen: list[Any]


def start(config: Path, *arguments: str, meanwhile: Callable[[], Any] = lambda: None, processes: int = 2) -> Started:
    """Calls the program and, in a thread beside it, `meanwhile`, whose result is kept."""
    seen: list[Any] = []
    beside = threading.Thread(target=lambda: seen.append(meanwhile()))
    beside.start()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        place = ["--cluster", "local", "--processes-per-node", str(processes)]
        status = submit.main(["--config", str(config), *place, *arguments])
    beside.join()
    return Started(status, out.getvalue(), err.getvalue(), seen)


def running_ranks(run: Path) -> list[int]:
    """Processes that execute this run's program, rank 0 first."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(run / "code").encode() in (entry / "cmdline").read_bytes():
                variables = (entry / "environ").read_bytes().split(b"\0")
                found[next(v for v in variables if v.startswith(b"RANK="))] = int(entry.name)
        except (OSError, StopIteration):  # it has just ended, or just begun
            continue
    return [found[rank] for rank in sorted(found)]


def open_files(process: int) -> set[str]:
    """Names of the files that a process has open."""
    return {os.path.basename(os.readlink(link)) for link in Path(f"/proc/{process}/fd").iterdir()}


@dataclass
class Seen:
    """What was found while the first command ran."""

    refusal: str
    """What the run's lock said to somebody else."""
    locked_by: list[bool]
    """Whether each rank holds the lock too."""
    survivor: int
    """Process of rank 0, whose peer was killed."""


def disturb(run: Path) -> Seen:
    """Tries to take the lock, SIGKILLs rank 1 when there is a checkpoint, presses Ctrl-C once the retry trains."""
    wait_for(lambda: has_step(run, 4), "the fourth step")
    try:
        with runs.locked(run):
            refusal = ""
    except runs.LaunchError as error:
        refusal = str(error)
    first, second = running_ranks(run)
    held = ["run.lock" in open_files(process) for process in (first, second)]
    os.kill(second, signal.SIGKILL)
    log = run / "logs" / "rank-0.log"
    wait_for(lambda: "resuming after step" in log.read_text(), "the retry")
    os.kill(os.getpid(), signal.SIGINT)
    return Seen(refusal, held, first)


@dataclass
class Line:
    """One run: a rank killed, retried, stopped by Ctrl-C, started again, finished."""

    config: Path
    run: Path
    first: Started
    second: Started

    @property
    def seen(self) -> Seen:
        """What `disturb` found."""
        return self.first.seen[0]


STEPS = 24


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    config, run = write_config(folder), folder / "runs" / "tiny"
    first = start(config, "--max-retries", "1", "steps.epochs=6", meanwhile=lambda: disturb(run))
    return Line(config, run, first, start(config, "steps.epochs=6"))


def test_killed_rank_ends_the_others_and_the_retry_resumes(line: Line) -> None:
    said = line.first.err
    assert "rank 1 was ended by SIGKILL; the end of" in said
    assert "rank 1 of 2" in said, "the log's end was not shown"
    assert "retry 1 of 1" in said
    assert "resuming after step" in line.first.out
    assert not Path(f"/proc/{line.seen.survivor}").exists()


def test_ctrl_c_saves_a_checkpoint_and_gives_130(line: Line) -> None:
    assert line.first.status == 130
    stopped = json.loads(next((line.run / "jobs").glob("local-*.1.interrupted")).read_text())
    assert stopped["signal"] == "SIGINT"
    assert 3 <= stopped["step"] < STEPS
    assert f"stopped by SIGINT after step {stopped['step']}" in line.first.out
    assert f"resuming after step {stopped['step']}" in line.second.out


def test_run_is_locked_while_it_trains_by_the_ranks_too(line: Line) -> None:
    assert "the run tiny is active" in line.seen.refusal
    assert line.seen.locked_by == [True, True]


def test_same_command_resumes_and_finishes_with_one_continuous_history(line: Line) -> None:
    assert line.second.status == 0, line.second.err
    assert steps_logged(line.run) == list(range(1, STEPS + 1))
    assert "training is complete after step 24" in line.second.out
    assert not running_ranks(line.run)


def test_every_rank_runs_the_snapshot_and_appends_to_its_log(line: Line) -> None:
    for rank in (0, 1):
        log = (line.run / "logs" / f"rank-{rank}.log").read_text()
        assert log.count(f"rank {rank} of 2") == 3
        assert log.count(f"dgt from {line.run / 'code'}/") == 3


@pytest.fixture
def as_program() -> Iterator[None]:
    """Undoes what the programs set up for a whole process: logging and signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    root = list(logging.root.handlers)
    threads = torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = root
    logging.captureWarnings(False)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_program")
def test_evaluation_gives_the_metrics_that_training_ended_with(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--config", str(line.config), "--checkpoint", "newest", "--json", "steps.epochs=6"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(row) for row in (line.run / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in reversed(rows) if "val/top1" in row)
    assert (found["step"], found["weights"], found["samples"]) == (STEPS, "ema", 9)
    for name in ("top1", "top5", "loss"):
        # one rank batches the images otherwise than two did: float32 sums differ in their last bits
        assert found[name] == pytest.approx(logged[f"val/{name}"], rel=1e-5)


@pytest.mark.usefixtures("as_program")
@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_exported_file_loads_in_timm_and_computes_the_same(line: Line, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "tiny.safetensors"
    assert export.main(["--run", str(line.run), "--checkpoint", "newest", "--weights", kind, "--out", str(out)]) == 0
    config = load(line.run / "config.yaml")
    network = checks.network(config).to_empty(device="cpu")
    found = weights.find(line.run / "checkpoints", "newest")
    network.load_state_dict(weights.read(found, network, kind)[0])  # type: ignore[arg-type]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = timm.create_model("dgt_nano", num_classes=4, checkpoint_path=str(out))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network.eval()(images))
    with safe_open(out, "pt") as file:
        facts = file.metadata()
    assert (facts["architecture"], facts["step"], facts["weights"]) == ("dgt_nano", str(STEPS), kind)
    assert json.loads(facts["label_names"]) == ["class_0", "class_1", "class_2", "class_3"]
    assert json.loads(facts["pretrained_cfg"])["input_size"] == [3, 32, 32]


@pytest.mark.usefixtures("as_program")
def test_averaged_weights_differ_from_raw_ones(line: Line) -> None:
    found, network = weights.find(line.run / "checkpoints", "newest"), checks.network(load(line.run / "config.yaml"))
    ema, raw = (weights.read(found, network, kind)[0]["head.fc.weight"] for kind in ("ema", "raw"))  # type: ignore[arg-type]
    assert not torch.equal(ema, raw)
    assert weights.read(found, network, None)[1] == "ema"


@pytest.mark.usefixtures("as_program")
def test_damaged_checkpoint_is_named_and_nothing_is_exported(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    damaged = tmp_path / "step_00000024"
    shutil.copytree(line.run / "checkpoints" / "step_00000024", damaged)
    victim = damaged / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    out = tmp_path / "out.safetensors"
    assert export.main(["--run", str(line.run), "--checkpoint", str(damaged), "--out", str(out)]) == 2
    assert f"{victim}: its checksum is not the manifest's" in capsys.readouterr().err
    assert not out.exists()


def terminate(when: Callable[[], object]) -> None:
    """What a service manager does."""
    wait_for(when, "the moment to stop")
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_a_planned_stop(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    started = start(config, "steps.epochs=50", meanwhile=lambda: terminate(lambda: has_step(run, 2)), processes=1)
    assert started.status == 0, started.err
    stopped = json.loads(next((run / "jobs").glob("*.interrupted")).read_text())
    assert stopped["signal"] == "SIGTERM"
    assert (run / "checkpoints" / f"step_{stopped['step']:08d}").is_dir()


def test_signal_in_the_first_moment_of_a_rank_is_not_lost_and_not_deadly(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    started = start(config, meanwhile=lambda: terminate(lambda: running_ranks(run)), processes=1)
    assert started.status == 0, started.err
    assert json.loads(next((run / "jobs").glob("*.interrupted")).read_text())["step"] == 0


@pytest.mark.usefixtures("as_program")
def test_rank_says_a_known_error_in_one_sentence_and_leaves_a_marker(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(runs.MARKER_VARIABLE, str(tmp_path / "jobs" / "j.0"))
    assert train.main(["--config", str(config), "steps.epochs=two"]) == 2
    said = capsys.readouterr().out
    assert "steps.epochs" in said
    assert "Traceback" not in said
    marker = runs.read_marker(str(tmp_path / "jobs" / "j.0"))
    assert marker is not None
    assert marker[0] == "failed"
    assert "steps.epochs" in marker[1]["reason"]


@pytest.mark.usefixtures("as_program")
@pytest.mark.parametrize(
    ("error", "end"),
    [(SaveError("disk full"), None), (UnreadableError("stale"), None), (CheckpointError("none is whole"), "failed")],
)
def test_trouble_with_the_disk_may_be_retried_and_damage_not(
    error: Exception, end: str | None, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", raises)
    monkeypatch.setenv(runs.MARKER_VARIABLE, str(tmp_path / "jobs" / "j.0"))
    assert train.main(["--config", str(config)]) == 2
    assert capsys.readouterr().out.endswith(f"ERROR: {error}\n")
    marker = runs.read_marker(str(tmp_path / "jobs" / "j.0"))
    assert (marker and marker[0]) == end


@pytest.mark.usefixtures("as_program")
def test_rank_alone_says_in_one_sentence_that_there_are_too_few_samples(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--config", str(config), "steps.global_batch_size=4000"]) == 2
    said = capsys.readouterr().out
    assert "has 32 samples, fewer than one global batch of 4000" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("as_program")
def test_rank_alone_does_not_join_an_active_slurm_job_but_is_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_slurm_record(run, "77")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho RUNNING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(trainer, "train", lambda *_: Outcome("finished", 3))
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert train.main(["--config", str(config)]) == 2
    assert "the run tiny is active: Slurm job 77 is RUNNING" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert train.main(["--config", str(config)]) == 0
