"""What a person sees of `launch/submit.py` before anything starts: the dry run, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_slurm_record

from launch import checks, layout, submit


def section(text: str, title: str) -> str:
    """Body of one section of the dry run."""
    return text.split(f"== {title} ", 1)[1].split("\n", 1)[1].split("\n\n== ", 1)[0]


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm's commands."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert not layout.has_slurm()


@pytest.mark.usefixtures("no_slurm")
def test_dry_run_of_a_cluster_job_needs_no_slurm_no_gpu_and_no_data(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--nodes", "2", "--gpus-per-node", "2", "--partition", "gpu", "--dry-run"]
    data = ["data.backend=webdataset", f"data.path={tmp_path / 'nothing'}", "steps.micro_batch_size=2"]
    assert submit.main(["--config", str(config), *wanted, *data]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --partition=gpu" in section(text, "job").splitlines()
    processes = dict(line.split("  ", 1) for line in section(text, "processes").splitlines())
    assert processes["layout"].strip() == "2 nodes x 2 GPU processes = 4 ranks"
    assert processes["global batch"].strip() == "8 = 4 ranks x 2 samples"
    assert "unknown, the data is not here" in section(text, "length")
    assert str(tmp_path / "nothing") in section(text, "warnings")
    assert not (tmp_path / "runs").exists(), "a dry run left something behind"


@pytest.mark.usefixtures("no_slurm")
def test_dry_run_tells_size_steps_and_checkpoints_by_value(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--config", str(config), "--dry-run", "--processes-per-node", "1"]) == 0
    text = capsys.readouterr().out
    import timm

    count = sum(p.numel() for p in timm.create_model("dgt_nano", num_classes=4).parameters())
    assert f"parameters        {count:,}" in section(text, "network")
    length = section(text, "length").splitlines()
    assert [line.split()[-1] for line in length] == ["2", "32", "4", "8"]
    assert f"{4 * 4 * count / 1e6:.1f} MB" in section(text, "checkpoints")
    assert "8 = 2 x 4 (micro-batches, accumulated)" in section(text, "processes")
    assert section(text, "warnings").strip() == "none"
    assert "launch/train.py --config" in section(text, "job")


def refusal(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program says when it does not start."""
    assert submit.main(["--config", str(config), "--cluster", "local", *arguments]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out == ""
    return said.err


def test_wrong_settings_are_refused_in_one_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean steps.epochs?" in refusal(config, capsys, "steps.epoch=3")
    assert "unknown model 'dgt_nan'" in refusal(config, capsys, "model.name=dgt_nan")
    assert "8 does not divide by 3 ranks" in refusal(config, capsys, "--processes-per-node", "3")
    assert "even while mixing is on" in refusal(config, capsys, "--processes-per-node", "8")
    assert "there is no file none.pth" in refusal(config, capsys, "model.checkpoint_path=none.pth")
    assert "fewer than one global batch" in refusal(config, capsys, "data.synthetic.train_samples=7")
    assert "data_pipeline.prepare" in refusal(config, capsys, "data.backend=webdataset", "data.path=/nonexistent")
    assert "no folder name" in refusal(config, capsys, "--name", "a/b")
    assert "data.augment.rand_augment: rand_augment 'rand-z1'" in refusal(
        config, capsys, "data.augment.rand_augment=rand-z1"
    )
    assert "engine.activation_checkpointing: 'full' is for DGT models, and resnet18 is none" in refusal(
        config, capsys, "model={name: resnet18, drop_path_rate: 0}", "engine.activation_checkpointing=full"
    )


def test_folder_of_another_run_and_one_that_cannot_be_written_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refusal(config, capsys, f"output_dir={tmp_path / 'file'}")
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    assert "seed was 1, now 0" in refusal(config, capsys)


def test_active_slurm_job_of_the_run_is_refused_and_an_ended_one_is_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_slurm_record(run, "77")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")

    def answers(script: str) -> None:
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)

    answers('[ "$3" = --jobs=77 ] && echo PENDING')
    assert "Slurm job 77 is PENDING" in refusal(config, capsys)
    answers("echo 'Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact" in refusal(config, capsys)
    answers("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    checks.not_active(run)
    answers("exit 0")
    checks.not_active(run)


def test_refusal_of_sbatch_is_passed_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2; exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    arguments = ["--config", str(config), "--cluster", "slurm", "--processes-per-node", "2", "--partition", "nope"]
    assert submit.main(arguments) == 2
    assert "invalid partition specified: nope" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "job.json").exists()


def test_submission_goes_through_sbatch_and_is_recorded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ncp $1 {tmp_path}/script; echo Submitted batch job 41\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    assert submit.main(["--config", str(config), "--processes-per-node", "2", "--nodes", "2"]) == 0
    assert "Slurm job 41, 2 nodes x 2 CPU processes" in capsys.readouterr().out
    run = tmp_path / "runs" / "tiny"
    record = json.loads((run / "job.json").read_text())
    assert (record["cluster"], record["job"], record["nodes"]) == ("slurm", "41", 2)
    code = next((run / "code").iterdir())
    srun = next(line for line in (tmp_path / "script").read_text().splitlines() if line.startswith("srun "))
    assert srun.endswith(f" {sys.executable} {code}/launch/train.py --config {code}/config.yaml")
    assert (code / "dgt" / "config.py").read_text() == (REPOSITORY / "dgt" / "config.py").read_text()


@pytest.mark.parametrize("program", ["submit", "train", "evaluate", "export"])
def test_program_starts_as_a_file_from_anywhere(program: str, tmp_path: Path) -> None:
    for name in ("launch", "signal"):  # neither the caller's folder nor the script's own hides a module
        (tmp_path / f"{name}.py").write_text("raise SystemExit('wrong module')")
    command = [sys.executable, str(REPOSITORY / "launch" / f"{program}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dgt-{program}" in done.stdout
