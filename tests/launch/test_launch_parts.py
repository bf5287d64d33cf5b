"""Snapshot, lock, layout, the ranks' variables, memory: the parts of the launcher, each alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dgt.config import load
from dgt.training import checkpoint
from launch import checks, cluster, demo, events, layout, local, memory, runs, snapshot, weights
from launch.layout import Layout, Wish
from launch.signals import STOP_SIGNALS, Noted


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small git checkout with committed, changed, new, deleted and ignored files."""
    root = tmp_path / "checkout"
    for name, text in {
        "launch/train.py": "v1", "dgt/ops/a.py": "a", "dgt/gone.py": "g", "data_pipeline/b.py": "b",
        "docs/c.md": "not code", ".gitignore": "secret*\n",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "launch" / "train.py").write_text("v2")
    (root / "dgt" / "new.py").write_text("n")
    (root / "dgt" / "secret.py").write_text("key")
    (root / "dgt" / "gone.py").unlink()
    return root


def content(folder: Path) -> dict[str, str]:
    """Files below a folder."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_snapshot_holds_the_code_as_it_is_without_ignored_files(checkout: Path, tmp_path: Path) -> None:
    taken = snapshot.take(tmp_path / "run", "name: x\n", checkout)
    found = content(taken)
    facts = json.loads(found.pop("snapshot.json"))
    assert found == {
        "launch/train.py": "v2", "dgt/ops/a.py": "a", "dgt/new.py": "n", "data_pipeline/b.py": "b",
        "config.yaml": "name: x\n",
    }  # fmt: skip
    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert facts["commit"] == commit.strip()
    assert facts["changed"] == [" D dgt/gone.py", " M launch/train.py", "?? dgt/new.py"]


def test_snapshot_is_shared_by_equal_submissions_and_new_after_an_edit(checkout: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", "a: 1\n", checkout)
    assert snapshot.take(tmp_path / "run", "a: 1\n", checkout) == first
    (checkout / "dgt" / "new.py").write_text("edited")
    second = snapshot.take(tmp_path / "run", "a: 1\n", checkout)
    third = snapshot.take(tmp_path / "run", "a: 2\n", checkout)
    assert len({first, second, third}) == 3
    assert (first / "dgt" / "new.py").read_text() == "n"


def test_snapshot_of_an_installed_package_copies_the_packages(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    for name in ("launch/train.py", "dgt/a.py", "dgt/__pycache__/a.pyc", "numpy/other.py"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(name)
    assert snapshot.code_files(installed) == ["dgt/a.py", "launch/train.py"]


def test_checkout_that_git_cannot_list_is_refused_because_of_ignored_files(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git" / "HEAD").write_text("damaged")
    with pytest.raises(runs.LaunchError, match="git cannot list the files of"):
        snapshot.take(tmp_path / "run", "", checkout)
    assert not (tmp_path / "run").exists()


def test_changed_snapshot_and_left_overs_of_a_killed_submission_are_not_used(checkout: Path, tmp_path: Path) -> None:
    left = tmp_path / "run" / "code" / ".0123456789ab.new"
    left.mkdir(parents=True)
    taken = snapshot.take(tmp_path / "run", "a: 1\n", checkout)
    assert not left.exists()
    (taken / "dgt" / "ops" / "a.py").write_text("evil")
    with pytest.raises(runs.LaunchError, match="has been changed since it was made"):
        snapshot.take(tmp_path / "run", "a: 1\n", checkout)
    (taken / "dgt" / "ops" / "a.py").unlink()
    with pytest.raises(runs.LaunchError, match="has been changed since it was made"):
        snapshot.take(tmp_path / "run", "a: 1\n", checkout)
    second = snapshot.take(tmp_path / "run", "a: 2\n", checkout)
    (second / "dgt" / "__pycache__").mkdir()
    (second / "dgt" / "__pycache__" / "a.pyc").touch()
    snapshot.check_unchanged(second)
    (second / "dgt" / "added.py").touch()
    with pytest.raises(runs.LaunchError, match="has been changed since it was made"):
        snapshot.check_unchanged(second)
    with pytest.raises(runs.LaunchError, match=r"changed since it was made \(No such file"):
        snapshot.check_unchanged(tmp_path / "run" / "code" / "gone")


def test_edit_while_the_snapshot_is_taken_gives_it_the_name_of_what_was_copied(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copy2

    def edited(source: Path, to: Path) -> None:
        (checkout / "launch" / "train.py").write_text("edited meanwhile")
        copy(source, to)

    monkeypatch.setattr(snapshot.shutil, "copy2", edited)
    taken = snapshot.take(tmp_path / "run", "", checkout)
    snapshot.check_unchanged(taken)
    assert (taken / "launch" / "train.py").read_text() == "edited meanwhile"


def test_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    with pytest.raises(runs.LaunchError, match=r"cannot be locked \(Function not implemented\)"), runs.locked(tmp_path):
        pass


def test_half_made_snapshot_has_no_name_that_is_used(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.shutil, "copy2", full_disk)
    with pytest.raises(runs.LaunchError, match="No space left"):
        snapshot.take(tmp_path / "run", "", checkout)
    assert content(tmp_path / "run") == {}


def test_lock_is_refused_while_held_and_free_afterwards(tmp_path: Path) -> None:
    held = pytest.raises(runs.LaunchError, match=f"process {os.getpid()} on")
    with runs.locked(tmp_path / "run"), held, runs.locked(tmp_path / "run"):
        pass
    with runs.locked(tmp_path / "run"):
        pass


def test_lock_lasts_as_long_as_a_process_that_inherited_it(tmp_path: Path) -> None:
    with runs.locked(tmp_path) as descriptor:
        heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    try:
        with pytest.raises(runs.LaunchError, match="active"), runs.locked(tmp_path):
            pass
    finally:
        heir.kill()
        heir.wait()
        if heir.stdin:
            heir.stdin.close()
    with runs.locked(tmp_path):
        pass


def test_marker_is_read_back_and_a_crash_leaves_none(tmp_path: Path) -> None:
    prefix = str(tmp_path / "jobs" / "12.0")
    assert runs.read_marker(prefix) is None
    runs.leave_marker(prefix, "interrupted", {"step": 3, "signal": "SIGUSR2"})
    assert runs.read_marker(prefix) == ("interrupted", {"step": 3, "signal": "SIGUSR2"})
    assert [p.name for p in (tmp_path / "jobs").iterdir()] == ["12.0.interrupted"]


def checkpoint_folder(folder: Path, step: int, best: int) -> None:
    """What passes for a whole checkpoint as long as nobody reads its tensors."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    manifest = {"format": checkpoint.FORMAT, "step": step, "progress": {"best_step": best}, "files": {}}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.digest(manifest)}))


def test_best_checkpoint_that_has_gone_or_is_damaged_is_named_in_one_sentence(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path, 30, best=20)
    best = tmp_path / "step_00000020"
    with pytest.raises(checkpoint.CheckpointError) as caught:
        weights.find(tmp_path, "best")
    assert str(caught.value) == (
        f"the best checkpoint, {best}, is not there any more; name 'newest' or another step_* folder"
    )
    checkpoint_folder(tmp_path, 20, best=20)
    assert weights.find(tmp_path, "best").step == 20
    (best / "manifest.json").write_text("{")
    sentence = rf"the best checkpoint is damaged \({best}/manifest.json: .*\); name 'newest'"
    with pytest.raises(checkpoint.CheckpointError, match=sentence):
        weights.find(tmp_path, "best")
    assert weights.find(tmp_path, "newest").step == 30


def test_demo_skips_lines_that_a_stopped_writer_left_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "RUN", tmp_path)
    assert demo.rows() == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n{"ste')
    assert demo.rows() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize(
    ("stops", "story"), [(0, "not interrupted"), (1, "interrupted once"), (2, "interrupted 2 times")]
)
def test_demo_says_how_often_its_run_was_interrupted_and_how_to_go_on(
    stops: int, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RUN", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(Path.cwd() / "venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "speed/images_per_s": 7}\n')
    for number in range(stops):
        runs.leave_marker(str(tmp_path / "jobs" / f"j{number}.0"), "interrupted", {})
    assert demo.conclude({"top1": 99.0, "samples": 10}, 1.0) == 0
    said = capsys.readouterr().out
    assert f"7 images/s (median), {story}" in said
    assert "next          source venv/bin/activate && python launch/submit.py --nodes" in said
    monkeypatch.setenv("VIRTUAL_ENV", "venv")
    assert demo.activation() == ""


def test_layout_follows_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "has_slurm", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert layout.choose(Wish(), 8) == Layout("local", 1, 1, False)
    assert layout.choose(Wish(processes_per_node=3), 8) == Layout("local", 1, 3, False)
    assert layout.choose(Wish(nodes=8, dry_run=True), 4) == Layout("slurm", 8, 4, True)
    assert layout.choose(Wish("slurm", gpus_per_node=2), 8) == Layout("slurm", 1, 2, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert layout.choose(Wish(), 8) == Layout("local", 1, 2, True)
    monkeypatch.setattr(layout, "has_slurm", lambda: True)
    assert layout.choose(Wish(nodes=2, processes_per_node=1), 8) == Layout("slurm", 2, 1, False)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        (Wish(nodes=2), "--nodes 2: several nodes need Slurm, and there is no sbatch on this machine"),
        (Wish("local", nodes=2, dry_run=True), "--nodes 2: --cluster local runs on this machine alone"),
        (Wish("local", gpus_per_node=3), "shows 0 GPUs"),
        (Wish("local", gpus_per_node=1, processes_per_node=1), "give one"),
        (Wish("local", processes_per_node=0), "--processes-per-node must be at least 1"),
    ],
)
def test_wish_that_cannot_be_met_is_refused(wish: Wish, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "has_slurm", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(runs.LaunchError, match=sentence):
        layout.choose(wish, 8)


STEP = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip


def test_srun_task_knows_its_rank() -> None:
    found = cluster.rank_variables(STEP | {"MASTER_PORT": "4242"})
    assert found == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4242",
    }  # fmt: skip


def test_every_attempt_without_a_given_port_has_another_one_for_all_ranks() -> None:
    first, other_rank = cluster.rank_variables(STEP), cluster.rank_variables(STEP | {"SLURM_PROCID": "0"})
    second = cluster.rank_variables(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert first["MASTER_PORT"] == other_rank["MASTER_PORT"] != second["MASTER_PORT"]


def test_torchrun_and_a_batch_script_are_left_alone() -> None:
    assert cluster.rank_variables(STEP | {"RANK": "0"}) == {}
    assert cluster.rank_variables({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == {}


def test_ledger_counts_what_lives_at_the_same_time() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.zeros(1000)
        ledger = memory.Ledger()
        with ledger:
            a = x + 1  # 4,000 bytes
            b = a * 2  # 8,000 with a
            view = b.view(10, 100)  # the same bytes
            del a, b  # the view keeps the second 4,000
            c = view.sum()  # 4 bytes
        assert (ledger.held, ledger.peak) == (4004, 8000)
        del view, c
        assert ledger.held == 0


def test_memory_of_weights_gradients_moments_and_average_is_sharded_by_fsdp_only(config: Path) -> None:
    whole, shard = (load(config, [f"engine.name={name}"]) for name in ("ddp", "fsdp"))
    network = checks.network(whole)
    bytes_once = 4 * memory.parameters(network)
    ddp, fsdp = memory.estimate(whole, network, 2), memory.estimate(shard, network, 2)
    assert (ddp.weights, ddp.gradients, ddp.average) == (bytes_once, bytes_once, bytes_once)
    counters = 8 * len(list(network.parameters()))  # AdamW counts its steps once per parameter
    assert 2 * bytes_once <= ddp.moments <= 2 * bytes_once + counters
    # Tensors are cut along their first dimension; of those with an odd one, rank 0 has the larger half.
    odd = sum(4 * p[0].numel() for p in network.parameters() if p.shape[0] % 2)
    assert bytes_once // 2 <= fsdp.weights <= bytes_once // 2 + odd
    assert fsdp.buffers > 0 == ddp.buffers
    assert memory.checkpoint_bytes(whole, network) == 4 * bytes_once


def test_activations_grow_with_the_micro_batch_and_shrink_with_recomputation(config: Path) -> None:
    def activations(*overrides: str) -> int:
        wanted = load(config, ["steps.global_batch_size=32", *overrides])
        return memory.estimate(wanted, checks.network(wanted), 1).activations

    four, eight = (activations(f"steps.micro_batch_size={size}") for size in (4, 8))
    assert four < eight < 2 * four, "a part of the peak does not depend on the number of images, none grows faster"
    assert activations("steps.micro_batch_size=8", "engine.activation_checkpointing=full") < eight


def test_parameters_are_those_of_the_real_network(config: Path) -> None:
    network: nn.Module = checks.network(load(config))
    assert all(p.device.type == "meta" for p in network.parameters())
    assert memory.parameters(network) == sum(p.numel() for p in network.to_empty(device="cpu").parameters())


@pytest.mark.parametrize(("progress", "attempts"), [([], 3), ([0, 1], 4)])
def test_local_crashes_are_counted_anew_after_a_new_checkpoint(
    progress: list[int], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def crash(job: local.LocalJob, attempt: int, *_: object) -> None:
        made.append(attempt)
        if attempt in progress:
            (job.run / "checkpoints" / f"step_{attempt:08d}").mkdir(parents=True)

    monkeypatch.setattr(local, "run_attempt", crash)
    job = local.LocalJob("j", tmp_path, ("true",), 1, use_gpus=False, max_retries=2)
    assert local.run(job, lock=0) == local.CRASHED
    assert made == list(range(attempts)), "two retries after the last progress, then no more"
    story = events.read(tmp_path)
    assert [event["event"] for event in story] == ["started", "stopped"] * attempts + ["gave-up"]
    assert {event["reason"] for event in story if event["event"] == "stopped"} == {"crash"}
    assert story[-1]["text"] == "gave up after 3 crashes in a row without a new checkpoint"


def test_attempt_without_a_marker_is_a_crash_although_the_rank_exits_with_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = local.LocalJob("j", tmp_path, ("sh", "-c", "echo $RANK of $WORLD_SIZE"), 2, use_gpus=False, max_retries=0)
    with runs.locked(tmp_path) as lock:
        assert local.run(job, lock) == local.CRASHED
    said = capsys.readouterr()
    assert said.out == "0 of 2\n"
    assert "without saying how training ended" in said.err
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "1 of 2\n"


def test_ranks_that_outlive_a_dead_one_are_killed_after_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.1)
    act = 'echo $$ > rank$RANK; [ $RANK = 1 ] && { echo "disk on fire"; exit 3; }; sleep 1000 & wait'
    monkeypatch.chdir(tmp_path)
    job = local.LocalJob("j", tmp_path, ("sh", "-c", act), 2, use_gpus=False, max_retries=0)
    with runs.locked(tmp_path) as lock:
        assert local.run(job, lock) == local.CRASHED
    said = capsys.readouterr().err
    assert "rank 1 ended with status 3; the end of" in said
    assert "    disk on fire" in said
    assert not members(int((tmp_path / "rank0").read_text())), "the rank or what it had started is still there"


def members(group: int) -> list[str]:
    """Living processes of a process group."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _parent, its_group, *_ = path.read_text().rsplit(")", 1)[1].split()
            if int(its_group) == group and state not in "ZX":
                alive.append(path.parent.name)
    return alive


def test_rank_starts_with_the_stop_signals_held_back_and_its_handlers_let_them_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    job = local.LocalJob("j", tmp_path, (sys.executable, "-c", act), 1, use_gpus=False, max_retries=0)
    with runs.locked(tmp_path) as lock:
        local.run(job, lock)
    assert capsys.readouterr().out == f"{sorted(STOP_SIGNALS)}\n"
    noted = Noted()
    with local.held_back():
        signal.raise_signal(signal.SIGUSR2)
        try:
            noted.install()
            assert noted.received == [signal.SIGUSR2]
        finally:
            noted.restore()


def test_slurm_is_asked_without_what_the_shell_says_about_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho JobId=7 EndTime=$(date -d @1700000000 +%Y-%m-%dT%H:%M:%S)\nenv >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shell = {"SLURM_TIME_FORMAT": "relative", "SQUEUE_PARTITION": "high", "SINFO_FORMAT": "%P", "SLURM_CLUSTERS": "a",
             "TZ": "America/New_York", "LC_ALL": "de_DE.UTF-8", "SLURM_CONF": "/here"}  # fmt: skip
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    answer = cluster.ask("scontrol", "show", "job", "7")
    assert answer is not None
    told = dict(line.split("=", 1) for line in answer.stderr.splitlines() if "=" in line)
    assert {name: told.get(name) for name in shell} == {
        "SLURM_TIME_FORMAT": "standard", "SQUEUE_PARTITION": None, "SINFO_FORMAT": None, "SLURM_CLUSTERS": None,
        "TZ": "UTC", "LC_ALL": "C", "SLURM_CONF": "/here",
    }  # fmt: skip
    fields = cluster.job_fields("7")
    assert fields is not None
    assert cluster.seconds(fields["EndTime"]) == 1700000000
    assert cluster.seconds("Unknown") is None


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    assert runs.newest_checkpoint(tmp_path) is None
    for name in ("step_00000009", "step_00000010", "step_00000011.saving", "step_00000012_backup", "step_100000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert runs.newest_checkpoint(tmp_path) == "step_100000000"
    (tmp_path / "checkpoints" / "step_100000000").rmdir()
    assert runs.newest_checkpoint(tmp_path) == "step_00000010"
    assert runs.step_of("step_00000010") == 10
