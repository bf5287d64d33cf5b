"""What a person sees of `launch/submit.py` before anything starts: the dry run, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, write_slurm_record

from launch import checks, events, layout, submission, submit
from launch.runs import LaunchError


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
    assert "optimizer.name: lamb needs whole tensors" in refusal(
        config, capsys, "engine.name=deepspeed", "optimizer.name=lamb"
    )
    assert "settings: train_batch_size cannot be given to DeepSpeed" in refusal(
        config, capsys, "engine.deepspeed.settings.train_batch_size=8"
    )
    assert "even while mixing is on" in refusal(config, capsys, "--processes-per-node", "8")
    assert "start.path: none.pth is no file" in refusal(config, capsys, "start.path=none.pth")
    assert "fewer than one global batch" in refusal(config, capsys, "data.synthetic.train_samples=7")
    assert "data_pipeline.prepare" in refusal(config, capsys, "data.backend=webdataset", "data.path=/nonexistent")
    assert "no folder name" in refusal(config, capsys, "--name", "a/b")
    assert "data.augment.rand_augment: rand_augment 'rand-z1'" in refusal(
        config, capsys, "data.augment.rand_augment=rand-z1"
    )
    assert "engine.activation_checkpointing: full is for DGT models, and resnet18 is none" in refusal(
        config, capsys, "model={name: resnet18, drop_path_rate: 0}", "engine.activation_checkpointing=full"
    )
    plain = ("model={name: resnet18, drop_path_rate: 0}", "engine.activation_checkpointing=none")
    for key in ("compile", "apex_layer_norm"):
        assert f"engine.{key}: true is for DGT models, and resnet18 is none; set it to false" in refusal(
            config, capsys, *plain, f"engine.{key}=true"
        )
    assert "model.freeze: nothing is left to train" in refusal(config, capsys, "model.freeze=[backbone, head]")
    assert "optimizer.name: fused_adamw is part of NVIDIA's apex" in refusal(
        config, capsys, "optimizer.name=fused_adamw"
    )
    assert "optimizer.implementation: lion has no foreach for sharded weights" in refusal(
        config, capsys, "engine.name=fsdp", "optimizer={name: lion, implementation: foreach}"
    )
    assert "task.distillation.teacher: timm knows no model 'resnet1'" in refusal(
        config, capsys, "task.distillation={teacher: resnet1, checkpoint_path: none.pth}"
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


PROGRAMS = {
    "scontrol": """
case "$*" in
"show partition"*) echo "PartitionName=low Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4" ;;
esac""",
    "sinfo": "for n in 1 2 3 4; do echo 'n'$n'|16|64000|gpu:8|(null)'; done",
    "sbatch": """
cp $1 {folder}/script; cp {folder}/runs/*/job.json {folder}/told.json; env > {folder}/environment
echo Submitted batch job 41""",
    "squeue": "exit 0",
}


@pytest.fixture
def a_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Slurm's commands as scripts; calling it changes what one of them does."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def does(name: str, script: str) -> None:
        (programs / name).write_text("#!/bin/sh\n" + script.replace("{folder}", str(tmp_path)) + "\n")
        (programs / name).chmod(0o755)

    for name, script in PROGRAMS.items():
        does(name, script)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return does


SLURM = ["--cluster", "slurm", "--profile", "generic", "--processes-per-node", "2"]


def test_active_slurm_job_of_the_run_is_refused_and_an_ended_one_is_not(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_slurm_record(run, "77")
    a_slurm("squeue", '[ "$4" = --jobs=77 ] && echo "PENDING (null)"')
    assert "Slurm job 77 is PENDING" in refusal(config, capsys)
    a_slurm("squeue", "echo 'RUNNING slurm-20250101-000000-ffff'")
    checks.not_active(run)  # the number was given again, to another of our submissions
    a_slurm("squeue", "echo 'COMPLETED slurm-20260101-000000-abcd'")
    checks.not_active(run)
    a_slurm("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact" in refusal(config, capsys)
    a_slurm("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    checks.not_active(run)
    a_slurm("squeue", "exit 0")
    checks.not_active(run)


def test_submission_that_died_before_the_number_was_noted_is_found_by_its_token(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_slurm_record(run, "")
    a_slurm("squeue", "echo 'RUNNING other'; echo 'PENDING slurm-20260101-000000-abcd'")
    assert "Slurm job slurm-20260101-000000-abcd is PENDING" in refusal(config, capsys)
    a_slurm("squeue", "echo 'RUNNING other'")
    checks.not_active(run)


def test_refusal_of_sbatch_is_passed_on_and_the_last_record_stays(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    a_slurm("sbatch", "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    assert submit.main(["--config", str(config), *SLURM]) == 2
    assert "sbatch did not take the job: " in (said := capsys.readouterr().err)
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert not (run / "job.json").exists()
    write_slurm_record(run, "77")
    before = (run / "job.json").read_text()
    assert submit.main(["--config", str(config), *SLURM]) == 2
    assert (run / "job.json").read_text() == before
    assert not [event for event in events.read(run) if event["event"] == "submitted"]


def test_submission_goes_through_sbatch_and_is_recorded_before_it(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SBATCH_SIGNAL", "KILL@5")  # sbatch would obey it before the script
    monkeypatch.setenv("SBATCH_RESERVATION", "mine")
    assert submit.main(["--config", str(config), *SLURM, "--nodes", "2"]) == 0
    assert "Slurm job 41, 2 nodes x 2 CPU processes" in capsys.readouterr().out
    run = tmp_path / "runs" / "tiny"
    assert oct(run.stat().st_mode)[-3:] == "700"
    record, told = (json.loads(path.read_text()) for path in (run / "job.json", tmp_path / "told.json"))
    assert (record["cluster"], record["job"], record["nodes"]) == ("slurm", "41", 2)
    assert told == record | {"job": ""}
    code = next((run / "code").iterdir())
    script = (tmp_path / "script").read_text().splitlines()
    srun = next(line for line in script if line.startswith("srun "))
    assert srun.endswith(f" {sys.executable} {code}/launch/train.py --config {code}/config.yaml")
    assert f"#SBATCH --comment={record['token']}" in script
    assert "#SBATCH --signal=USR2@120" in script
    assert (code / "dgt" / "config.py").read_text() == (REPOSITORY / "dgt" / "config.py").read_text()
    variables = (tmp_path / "environment").read_text().splitlines()
    assert [v for v in variables if v.startswith("SBATCH_")] == ["SBATCH_RESERVATION=mine"]
    assert [(e["event"], e["job"], e["token"]) for e in events.read(run)] == [("submitted", "41", record["token"])]


def test_resume_submits_the_same_snapshot_again_and_measures_the_lead(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None]
) -> None:
    run = tmp_path / "runs" / "tiny"
    assert submit.main(["--config", str(config), *SLURM, "--time", "2:00:00", "steps.epochs=1"]) == 0
    before = json.loads((run / "job.json").read_text())
    (run / "metrics.jsonl").write_text('{"step": 3, "speed/save_seconds": 41.5}\n')
    a_slurm("sbatch", "cp $1 {folder}/again; echo Submitted batch job 42")
    assert submission.resume(run) == 0
    after = json.loads((run / "job.json").read_text())
    assert after["job"] == "42"
    assert after["token"] != before["token"]
    same = ("command", "workdir", "profile", "nodes", "processes_per_node", "use_gpus", "cluster")
    assert [after[key] for key in same] == [before[key] for key in same]
    script = (tmp_path / "again").read_text().splitlines()
    assert {"#SBATCH --time=2:00:00", "#SBATCH --signal=USR2@143"} <= set(script), "twice the longest save and 60 s"
    code = Path(after["command"][-1]).parent
    (code / "dgt" / "__init__.py").write_text("raise SystemExit('changed')")
    with pytest.raises(LaunchError, match="has been changed since it was made"):
        submission.resume(run)
    a_slurm("squeue", "echo 'RUNNING (null)'")
    with pytest.raises(LaunchError, match="the run tiny is active: Slurm job 42 is RUNNING"):
        submission.resume(run)


def test_sweep_submits_one_run_per_combination_or_none(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    a_slurm("sbatch", "echo Submitted batch job 4$(ls {folder}/runs | wc -l)")
    sweep = ["--sweep", "seed=3,4", "--sweep", "optimizer.lr=1e-3,2e-3"]
    assert submit.main(["--config", str(config), *SLURM, *sweep]) == 0
    found = {path.name: path / "code" for path in (tmp_path / "runs").iterdir()}
    assert set(found) == {f"tiny-seed-{seed}-lr-{lr}" for seed in (3, 4) for lr in ("1e-3", "2e-3")}
    settings = yaml.safe_load(next(found["tiny-seed-4-lr-2e-3"].glob("*/config.yaml")).read_text())
    assert (settings["seed"], settings["optimizer"]["lr"], settings["name"]) == (4, 2e-3, "tiny-seed-4-lr-2e-3")
    capsys.readouterr()
    a_slurm("squeue", 'case "$*" in *=41*) echo "RUNNING (null)";; esac')
    assert submit.main(["--config", str(config), *SLURM, *sweep]) == 2, "one of them is active"
    assert "Slurm job 41 is RUNNING" in (said := capsys.readouterr()).err
    assert said.out.count(": Slurm job 4") == 3, "the others start again"
    wrong = ["--sweep", "steps.global_batch_size=8,9000", "--name", "other"]
    assert submit.main(["--config", str(config), *SLURM, *wrong]) == 2
    assert "fewer than one global batch of 9000" in capsys.readouterr().err
    assert set(found) == {path.name for path in (tmp_path / "runs").iterdir()}


def test_what_the_cluster_cannot_give_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert submit.main(["--config", str(config), "--cluster", "slurm", "--profile", "generic", *arguments]) == 2
        return capsys.readouterr().err

    batch = "steps.global_batch_size=16"
    assert "4 nodes" in said("--nodes", "8", "--gpus-per-node", "1", batch)
    assert "did you mean low?" in said("--partition", "lo", "--gpus-per-node", "1")
    assert "--signal-lead" in said("--time", "2", "--gpus-per-node", "1")
    assert "password" in said("--gpus-per-node", "1", "data.path=https://me:secret@host/set")
    profile = tmp_path / "small.yaml"
    profile.write_text("gpu_memory_gb: 0.1\n")
    arguments = ["--config", str(config), "--cluster", "slurm", "--profile", str(profile), "--gpus-per-node", "1"]
    assert submit.main(arguments) == 2
    assert "the profile's GPU has 0.1 GB" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_no_secret_of_the_shell_and_data_preparation_too(
    config: Path, tmp_path: Path, a_slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert submit.main(["--config", str(config), *SLURM, "--dry-run"]) == 0
    assert "hush-hush" not in capsys.readouterr().out
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    line = ["imagefolder", "--src", str(tmp_path / "raw"), "--out", str(tmp_path / "shards")]
    assert submit.main(["--prepare", "--parts", "3", "--cluster", "slurm", "--dry-run", "--", *line]) == 0
    text = capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        submit.main(["--prepare", "--wait", "--nodes", "2", "--", *line])
    assert "leave out --nodes, --wait" in capsys.readouterr().err
    assert "#SBATCH --array=1-3" in text
    assert "--merge" in text
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("program", ["submit", "train", "evaluate", "export", "jobs"])
def test_program_starts_as_a_file_from_anywhere(program: str, tmp_path: Path) -> None:
    for name in ("launch", "signal"):  # neither the caller's folder nor the script's own hides a module
        (tmp_path / f"{name}.py").write_text("raise SystemExit('wrong module')")
    command = [sys.executable, str(REPOSITORY / "launch" / f"{program}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dgt-{program}" in done.stdout
