"""Cluster profiles: what they may say, how one is found, and that none of them carries a secret."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import ConfigError
from launch import profiles
from launch.profiles import Detect, Health, Profile
from launch.runs import LaunchError

SHIPPED = sorted(path.stem for path in profiles.PROFILES.glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of profiles in place of slurm/profiles, on a machine called login3.cluster without Slurm."""
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "login3.cluster")
    monkeypatch.setattr(profiles, "cluster_name", lambda: None)
    return tmp_path


def loaded(path: Path, text: str, **overrides: Any) -> Profile:
    """The profile that this text is."""
    path.write_text(text)
    return profiles.load(str(path), overrides)


def test_generic_profile_is_what_the_class_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiles.load(None, {"partition": "gpu", "time": None}) == Profile(partition="gpu"), (
        "installed without profiles"
    )
    monkeypatch.undo()
    assert profiles.load("generic", {}) == Profile()


def test_generic_profile_speaks_of_every_key() -> None:
    text = (profiles.PROFILES / "generic.yaml").read_text()
    keys = [*Profile.__dataclass_fields__, *Health.__dataclass_fields__, *Detect.__dataclass_fields__]
    assert [key for key in keys if f"{key}:" not in text] == ["after"], "which belongs to the command line"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_loads_and_survives_the_record_of_a_job(name: str) -> None:
    profile = profiles.load(name, {"after": ["12", "13_4"], "time": "1:00:00"})
    stored = json.loads(json.dumps(profiles.to_plain(profile)))
    assert profiles.from_plain(stored) == profile
    assert profiles.from_plain(stored).after == ("12", "13_4")


def test_every_kind_of_value_survives_the_record_of_a_job() -> None:
    profile = Profile(
        modules=("cuda",), container="a.sif", container_command="apptainer exec {image}", scratch={"/nvme": 10.0},
        health=Health(matmul_tflops=500.0), detect=Detect(hosts="a.*"), sbatch={"nice": 100, "overcommit": True},
    )  # fmt: skip
    assert profiles.from_plain(profiles.to_plain(profile)) == profile
    with pytest.raises(ConfigError, match=r"job.json: unknown key patrition; did you mean partition\?"):
        profiles.from_plain({"patrition": "x"})


def test_values_mean_what_they_say_although_yaml_would_read_some_otherwise(tmp_path: Path) -> None:
    text = """
        time: 12:00:00
        mem: 0
        modules: [cuda, nccl]
        environment: {ON: yes, HEX: 0x10, LIST: "=mlx5_0,mlx5_1", EMPTY: , WHEN: 2026-01-31}
        sbatch: {begin: 2026-01-31T12:00:00, time-min: 2:30:00, nice: 100}
        scratch: {/nvme: 500}
        health: {clock_skew: 1}
    """
    profile = loaded(tmp_path / "mine.yaml", text)
    assert profile.time == "12:00:00", "YAML's 43200 would be minutes to Slurm"
    assert (profile.mem, profile.modules, profile.scratch) == (0, ("cuda", "nccl"), {"/nvme": 500.0})
    assert profile.environment == {
        "ON": "yes", "HEX": "0x10", "LIST": "=mlx5_0,mlx5_1", "EMPTY": "", "WHEN": "2026-01-31"
    }  # fmt: skip
    assert profile.sbatch == {"begin": "2026-01-31T12:00:00", "time-min": "2:30:00", "nice": 100}
    assert profile.health == Health(clock_skew=1.0)


def test_command_line_goes_before_the_profile(tmp_path: Path) -> None:
    text = "{partition: a, srun: ['--container-image={image}'], container: old.sqsh, signal_lead: 90}"
    profile = loaded(tmp_path / "mine.yml", text, partition="b", container="new.sqsh", signal_lead=None, after=["7"])
    assert (profile.partition, profile.container, profile.signal_lead) == ("b", "new.sqsh", 90)
    assert profile.after == ("7",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partitoin: x", r"mine.yaml: unknown key partitoin; did you mean partition\?"),
        ("health: {clock_scew: 1}", r"unknown key health.clock_scew; did you mean health.clock_skew\?"),
        ("gpus_per_node: eight", "mine.yaml: gpus_per_node: .*valid integer.* got 'eight'"),
        ("exclusive: 7", "mine.yaml: exclusive: .*valid boolean"),
        ("cpus_per_task: true", "cpus_per_task: true and false are no numbers"),
        ("setup: module load cuda", "setup: .*valid tuple"),
        ("gpus_per_node: 0", "gpus_per_node: must be above 0, got 0"),
        ("gpu_memory_gb: -1", "gpu_memory_gb: must be above 0"),
        ("gpu_memory_gb: .inf", "gpu_memory_gb: must be a finite number"),
        ("health: {timeout: 0}", "health: timeout: must be above 0"),
        ("signal_lead: 0", "signal_lead: must be above 0, got 0"),
        ("signal_lead: 65536", "signal_lead: Slurm takes at most 65535 seconds"),
        ("max_retries: -1", "max_retries: must be 0 or more, got -1"),
        ("scratch: {nvme: 5}", "scratch: expected an absolute path"),
        ("scratch: {/nvme: -5}", "scratch: .*must be free, got /nvme: -5"),
        ("detect: {hosts: '('}", r"detect: hosts: '\(' is no regular expression"),
        ("after: ['1']", "after belongs to one submission; give it on the command line"),
        ("container: a.sif", "container: nothing says how to run a.sif; set container_command, .* or srun"),
        ("{container: a.sif, container_command: apptainer exec}", "container: nothing says how to run a.sif"),
        ("container_command: apptainer exec {image}", "use {image}; name one under container or by --container"),
        ("srun: ['--container-image={image}']", "use {image}; name one under container or by --container"),
        ("sbatch: {signal: B:USR1}", "sbatch: signal is set by the launcher"),
        ("sbatch: {export: NONE}", "sbatch: export is set by the launcher"),
        ("sbatch: {test-only: true}", "sbatch: test-only is set by the launcher"),
        ("sbatch: {wait: true}", "sbatch: wait is set by the launcher"),
        ("sbatch: {gpus-per-node: 'h100:8'}", "sbatch: gpus-per-node is made of gpus_per_node and gpu_type; set those"),
        ("gpu_type: 'h100:8'", "gpu_type: expected a name such as h100, got 'h100:8'"),
        ("sbatch: {no-requeue: true}", "sbatch: no-requeue is set by the launcher"),
        ("{qos: a, sbatch: {qos: b}}", "sbatch: qos is given twice"),
        ("sbatch: {overcommit: false}", "sbatch: overcommit: expected a text, a number or true, got False"),
        ("environment: {a-b: c}", "environment: 'a-b' is no name of a variable"),
        ("- a", r"expected keys and values, got \['a'\]"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_profile_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, LaunchError), match=sentence):
        loaded(tmp_path / "mine.yaml", text)


def test_wrong_option_is_named_with_where_it_came_from() -> None:
    with pytest.raises(ConfigError, match="command line's options: max_retries: must be 0 or more, got -1"):
        profiles.load("generic", {"max_retries": -1})
    with pytest.raises(ConfigError, match="after: 'last' is no job number"):
        profiles.load("generic", {"after": ["last"]})


def test_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(LaunchError, match=f"there are {', '.join(SHIPPED)} in"):
        profiles.load("nowhere", {})


@pytest.mark.parametrize(
    "text",
    [
        "environment: {WANDB_API_KEY: hush}",
        "environment: {WANDB_KEY: hush}",
        "environment: {NGC_KEY: hush}",
        "environment: {AWS_SECRET_ACCESS_KEY: hush}",
        "environment: {HF_TOKEN: hush}",
        "environment: {pgpassword: hush}",
        "environment: {DB_PASS: hush}",
        "environment: {DB_PWD: 1234567}",
        "environment: {GITHUB_PAT: hush}",
        "environment: {SSH_PASSPHRASE: hush}",
        "environment: {MY_OWN: ghp_hush567890123456}",
        "environment: {MY_OWN: 'https://host?x=1 hf_hush567890123456'}",
        "environment: {HTTPS_PROXY: 'http://me:hush@proxy:3128'}",
        "setup: ['export HF_TOKEN=hf_hush']",
        "setup: ['curl https://me:hush@host/x']",
        "setup: ['git clone https://ghp_hush@host/x']",
        "setup: ['pip install git+https://glpat-hush@host/x']",
        "setup: ['git clone https://hush0123456789abcdef0123456789@host/x']",
        "setup: ['docker login --password hush']",
        "setup: ['docker login --password=hush']",
        "setup: ['huggingface-cli login --token \"hush\"']",
        "setup: ['curl -H \"Authorization: Bearer hush\" https://host']",
        "setup: ['aws configure set id AKIAHUSH567890123456']",
        "srun: ['--export=ALL,HF_TOKEN=hf_hush']",
        "sbatch: {wckey: 'HF_TOKEN=hf_hush'}",
        "{container: 'docker://me:hush@host#image', srun: ['--container-image={image}']}",
        "{container: a.sif, container_command: 'apptainer exec --env WANDB_API_KEY=1234567 {image}'}",
    ],
)
def test_secret_is_refused_with_the_way_to_hand_it_on_and_never_shown(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Export the variable in the shell before submitting") as caught:
        loaded(tmp_path / "mine.yaml", text)
    shown = str(caught.value).lower()
    assert "hush" not in shown
    assert "1234567" not in shown


def test_what_only_sounds_like_a_secret_is_kept(tmp_path: Path) -> None:
    environment = {
        "NCCL_IB_PKEY": "0x8001", "TOKENIZERS_PARALLELISM": "false", "HTTPS_PROXY": "http://proxy:3128",
        "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws/credentials", "MAX_TOKENS": "4096", "HF_TOKEN": "",
        "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/gcp.json", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OLDPWD": "/a/b",
        "USE_AUTH_TOKEN": "true", "HOSTKEY": "x", "COMPASS": "north", "SINGLE_PASS": "1",
    }  # fmt: skip
    setup = (
        "export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$HF_TOKEN"', "export HF_TOKEN=`cat ~/.token`",
        "huggingface-cli login --token $HF_TOKEN", "curl -H 'Authorization: Bearer $HF_TOKEN' https://me:$PASS@host",
        "export MAX_TOKENS=4096", "curl --token-file /home/me/token", "apt --no-password now", "git clone ssh://git@host/x",
        "enroot import docker://ubuntu:22.04@sha256:0123456789abcdef0123456789abcdef",
    )  # fmt: skip
    image = "docker://nvcr.io/nvidia/pytorch:24.01-py3@sha256:0123456789abcdef0123456789abcdef"
    text = {"environment": environment, "setup": list(setup), "container": image, "srun": ["--container-image={image}"]}
    profile = loaded(tmp_path / "mine.yaml", json.dumps(text))
    assert (profile.environment, profile.setup, profile.container) == (environment, setup, image)


def test_profile_is_detected_by_the_name_of_the_machine_or_of_its_slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "generic.yaml").write_text("gpus_per_node: 1")
    (folder / "hosts.yaml").write_text("{gpus_per_node: 2, detect: {hosts: 'login\\d+'}}")
    (folder / "both.yaml").write_text("{gpus_per_node: 3, detect: {hosts: 'gate.*', cluster: Big}}")
    assert profiles.load(None, {}).gpus_per_node == 2, "its short name is login3"
    assert profiles.find(None) == folder / "hosts.yaml"
    assert profiles.load("generic", {}).gpus_per_node == 1, "a name goes before detection"
    monkeypatch.setattr(socket, "gethostname", lambda: "gate")
    assert profiles.load(None, {}).gpus_per_node == 1, "its Slurm is not known"
    monkeypatch.setattr(profiles, "cluster_name", lambda: "big")
    assert profiles.load(None, {}).gpus_per_node == 3
    assert profiles.load(None, {}, ask_slurm=False).gpus_per_node == 1
    (folder / "two.yaml").write_text("detect: {cluster: big}")
    with pytest.raises(LaunchError, match="the profiles both and two both fit this machine"):
        profiles.load(None, {})


@pytest.mark.usefixtures("folder")
def test_profile_that_says_nothing_to_detect_is_never_detected() -> None:
    assert not Detect().fits("here", "login3")
    assert not Detect(hosts="login").fits(None, "login3"), "the whole name must match"
    assert Detect(hosts=r"login\d\.cluster").fits(None, "login3.cluster")
    assert profiles.find(None) is None


def test_slurm_is_asked_for_its_name_only_where_a_profile_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {asked}; echo 'CheckpointType = x\nClusterName             = here'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:/bin")
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    (tmp_path / "generic.yaml").write_text("detect: {hosts: nowhere}")
    assert profiles.find(None) == tmp_path / "generic.yaml"
    (tmp_path / "mine.yaml").write_text("detect: {cluster: here}")
    assert profiles.find(None, ask_slurm=False) == tmp_path / "generic.yaml"
    assert not asked.exists()
    assert profiles.find(None) == tmp_path / "mine.yaml"
    assert asked.read_text() == "show config\n"
    assert capsys.readouterr().err == ""
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert profiles.find(None) == tmp_path / "generic.yaml"
    said = "Slurm does not say its name, so no profile is chosen by it; --profile names one\n"
    assert capsys.readouterr().err == said
    scontrol.write_text("#!/bin/sh\nexec sleep 300\n")
    monkeypatch.setattr(profiles, "DETECT_SECONDS", 0.2)
    assert profiles.find(None) == tmp_path / "generic.yaml"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("PATH", "/nowhere")
    assert profiles.find(None) == tmp_path / "generic.yaml"
    assert capsys.readouterr().err == "", "there is no Slurm"
