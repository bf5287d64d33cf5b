"""What is refused before a submission because the partition, the GPU or the time would never do."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from data_pipeline.shards import cache
from dgt.config import load
from launch import checks, limits, memory, secret_words
from launch.layout import Layout
from launch.profiles import Profile
from launch.runs import LaunchError

SCONTROL = """#!/bin/sh
case "$*" in
"show partition --all --oneliner") cat {folder}/partitions ;;
"show hostnames a[1-2]") echo a1; echo a2 ;;
"show config") echo "JobSubmitPlugins        = $(cat {folder}/plugins)" ;;
*) echo "not expected: $*" >&2; exit 1 ;;
esac
"""
PARTITIONS = """\
PartitionName=gpu AllowAccounts=vision AllowQos=ALL DefaultTime=00:03:20 Default=YES QoS=N/A MaxNodes=3 MaxTime=1-00:00:00 MinNodes=0 State=UP TotalNodes=4
PartitionName=long GraceTime=5 PreemptMode=CANCEL AllowAccounts=ALL AllowQos=day DefaultTime=NONE Default=NO QoS=N/A MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=2 State=UP TotalNodes=2
PartitionName=old Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DRAIN TotalNodes=2
PartitionName=off Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=INACTIVE TotalNodes=2
PartitionName=down Default=NO MaxNodes=UNLIMITED MaxTime=00:03:00 DefaultTime=NONE State=DOWN TotalNodes=2
PartitionName=ruled AllowQos=ALL Default=NO QoS=big MaxNodes=1 MaxTime=00:10:00 MinNodes=2 State=UP TotalNodes=2
PartitionName=cloud AllowQos=ALL Default=NO QoS=N/A MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=9
"""  # noqa: E501 - as Slurm prints it
SINFO = """#!/bin/sh
case "$*" in
"-h -N -p gpu -o %N|%c|%m|%G|%f") cat <<'END'
a1|64|500000|gpu:h100:8(S:0-1)|h100,ib
a2|64|500000|gpu:h100:8(S:0-1),nvme:1|h100,ib
a3|96|1000000|gpu:a100:2(S:0),gpu:a100:2(S:1)|a100,ib
a4|32|250000|(null)|(null)
END
;;
"-h -N -p long -o %N|%c|%m|%G|%f") echo "b1|8|1000|gpu:2|(null)"; echo "b2|8|1000|gpu|(null)" ;;
*-p*cloud*|*-p*down*|*-p*ruled*) echo "c1|8|1000|gpu:8|(null)"; [ "$4" = cloud ] || echo "c2|8|1000|gpu:8|(null)" ;;
esac
"""


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scontrol and sinfo of a cluster of our own making, in front of the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL.replace("{folder}", str(folder))), ("sinfo", SINFO)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "partitions").write_text(PARTITIONS)
    (folder / "plugins").write_text("(null)")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_TIMELIMIT"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (90, 5400), ("90", 5400), ("2:30", 150), ("12:00:00", 43200), ("100:00:01", 360001), ("2-12", 216000),
        ("1-2:30", 95400), ("1-02:30:15", 95415), ("UNLIMITED", math.inf), ("infinite", math.inf), (0, math.inf),
        ("0:00", math.inf),
    ],
)  # fmt: skip
def test_duration_is_read_in_each_of_slurms_notations(time: str | int, expected: float) -> None:
    assert limits.seconds(time) == expected


@pytest.mark.parametrize("time", ["1h", "", "1:2:3:4", "-5", "1-", "NONE"])
def test_what_is_no_duration_is_refused(time: str) -> None:
    with pytest.raises(LaunchError, match=f"time: '{time}' is no duration"):
        limits.seconds(time)


def test_memory_is_read_in_slurms_units() -> None:
    assert [limits.megabytes(mem) for mem in (64000, "64000", "64G", "2t", "512K", "1GB")] == [
        64000, 64000, 65536, 2097152, 0.5, 1024
    ]  # fmt: skip
    with pytest.raises(LaunchError, match="mem: 'all' is no amount of memory"):
        limits.megabytes("all")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:2", 2), ("gpu:h100:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gpu", 1), ("(null)", 0), ("nvme:4,gpu:3", 3),
        ("gpu:a100:2(S:0,1),gpu:v100:4(S:1)", 6), ("gpu:1g.5gb:7(IDX:0,2)", 7), ("gpufs:8", 0),
    ],
)  # fmt: skip
def test_gpus_are_counted_in_each_notation_of_gres(gres: str, gpus: int) -> None:
    assert limits.gpus_in(gres) == gpus


def test_gpus_of_one_type_are_counted_alone() -> None:
    assert [limits.gpus_in("gpu:a100:2(S:0,1),gpu:V100:4(S:1),gpu:3", model) for model in ("a100", "v100", "3")] == [
        2, 4, 3
    ]  # fmt: skip
    assert limits.gpus_in("gpu:8", "h100") == 0


def gpus(nodes: int, per_node: int) -> Layout:
    """A layout in Slurm."""
    return Layout("slurm", nodes, per_node, use_gpus=True)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("layout", "profile"),
    [
        (gpus(2, 8), Profile()),
        (gpus(3, 4), Profile(time="1-00:00:00", cpus_per_task=16, mem="500000M")),
        (Layout("slurm", 2, 32, use_gpus=False), Profile(exclude="a[1-2]", account="vision/below")),
        (gpus(2, 1), Profile(partition="old,long")),
        (gpus(1, 8), Profile(partition="down")),
        (gpus(2, 8), Profile(partition="ruled", time="1:00:00")),
        (gpus(1, 8), Profile(partition="ruled")),
        (gpus(9, 64), Profile(partition="cloud", mem="1T")),
        (gpus(2, 8), Profile(gpu_type="H100")),
        (Layout("slurm", 4, 1, False), Profile(sbatch={"qos": "big"})),
        (gpus(1, 4), Profile(exclude="a[1-2]", constraint="a100&ib", mem="900G")),
        (gpus(3, 4), Profile(constraint="h100|a100")),
        (gpus(2, 8), Profile(constraint="[h100*2&a100*1]", exclude="/home/me/bad_nodes")),
        (gpus(1, 2), Profile(partition="long", time="UNLIMITED", qos="day", mem=0)),
        (gpus(2, 1), Profile(partition="long", time="UNLIMITED")),
        (gpus(1, 2), Profile(partition="gpu", time="UNLIMITED", qos="any")),
    ],
)
def test_request_that_fits_passes(layout: Layout, profile: Profile) -> None:
    limits.partition(layout, profile)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("layout", "profile", "sentence"),
    [
        (gpus(1, 1), Profile(partition="gpus"), r"partition gpus does not exist in this Slurm; did you mean gpu\?"),
        (gpus(1, 1), Profile(partition="x"), "does not exist in this Slurm; there are: cloud, down, gpu, long, off"),
        (gpus(1, 1), Profile(partition="old"), "partition old is DRAIN: it takes no jobs"),
        (gpus(1, 1), Profile(partition="off"), "partition off is INACTIVE: it takes no jobs"),
        (gpus(1, 1), Profile(partition="long"), "partition long gives a job at least 2 nodes, not 1; raise --nodes"),
        (gpus(10, 1), Profile(partition="cloud"), "partition cloud has 9 nodes, and 10 are wanted"),
        (gpus(1, 8), Profile(gpu_type="a100"), "nodes that have 8 a100 GPUs or more: 0 of 4, .* has is 4"),
        (gpus(1, 1), Profile(sbatch={"time": "2-00:00:00"}), "the time limit asked for is 2-00:00:00; lower --time"),
        (gpus(1, 1), Profile(sbatch={"partition": "old"}), "partition old is DRAIN"),
        (gpus(1, 1), Profile(partition="long", sbatch={"qos": "x"}), "partition long does not admit --qos x"),
        (gpus(1, 1), Profile(partition="long", qos="x"), "partition long does not admit --qos x; it admits day"),
        (gpus(5, 1), Profile(), "partition gpu has 4 nodes, and 5 are wanted"),
        (gpus(4, 1), Profile(), "partition gpu gives a job at most 3 nodes, not 4"),
        (
            gpus(1, 1),
            Profile(time="1-00:00:01"),
            "allows at most 1-00:00:00, and the time limit asked for is 1-00:00:01",
        ),
        (gpus(1, 1), Profile(time=1441), "the time limit asked for is 1441; lower --time"),
        (gpus(1, 1), Profile(time="0"), "the time limit asked for is 0; lower --time"),
        (gpus(3, 8), Profile(), "nodes that have 8 GPUs or more: 2 of 4, and 3 wanted; lower --gpus-per-node .* is 8"),
        (
            gpus(2, 8),
            Profile(cpus_per_task=9),
            r"8 GPUs or more and have 72 CPUs or more \(8 processes x 9\): 0 of 4, .* is 96",
        ),
        (
            gpus(3, 4),
            Profile(mem="1T"),
            r"nodes that have 4 GPUs or more and have 1048576 MB of memory or more: 0 of 4, .* is 1000000 MB",
        ),
        (gpus(2, 4), Profile(exclude="a[1-2]"), "nodes that are not excluded and have 4 GPUs or more: 1 of 4, and 2"),
        (Layout("slurm", 3, 1, False), Profile(exclude="a[1-2]"), "nodes that are not excluded: 2 of 4, .*--exclude"),
        (gpus(2, 1), Profile(constraint="a100&ib"), "the features of --constraint a100&ib: 1 of 4, .*: a100, h100, ib"),
        (gpus(2, 1), Profile(constraint="b200|a100"), "the features of --constraint b200|a100: 1 of 4"),
        (gpus(2, 2), Profile(partition="long"), "partition long: nodes that have 2 GPUs or more: 1 of 2, and 2 wanted"),
        (gpus(2, 2), Profile(partition="long,old"), "partition long: nodes that have 2 GPUs"),
    ],
)
def test_request_that_would_never_start_is_refused(layout: Layout, profile: Profile, sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        limits.partition(layout, profile)


@pytest.mark.usefixtures("answers")
def test_partition_of_the_shell_is_taken_where_the_profile_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "old")
    with pytest.raises(LaunchError, match="partition old is DRAIN"):
        limits.partition(gpus(1, 1), Profile())
    limits.partition(gpus(1, 1), Profile(partition="gpu"))


@pytest.mark.usefixtures("answers")
def test_qos_and_time_of_the_shell_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "2-00:00:00")
    with pytest.raises(LaunchError, match="the time limit asked for is 2-00:00:00"):
        limits.partition(gpus(1, 1), Profile(), 120)
    monkeypatch.setenv("SBATCH_QOS", "big")
    limits.partition(gpus(1, 1), Profile(), 120)


def test_partition_that_nobody_named_may_be_another_one_in_the_end(answers: Path) -> None:
    for plugins in ("lua", "require_timelimit,lua"):
        (answers / "plugins").write_text(plugins)
        limits.partition(gpus(5, 1), Profile())
        with pytest.raises(LaunchError, match="partition gpu has 4 nodes"):
            limits.partition(gpus(5, 1), Profile(partition="gpu"))
    (answers / "partitions").write_text(PARTITIONS.replace("Default=YES", "Default=NO"))
    limits.partition(gpus(5, 1), Profile())


@pytest.mark.usefixtures("answers")
def test_limit_that_a_partition_sets_by_itself_must_leave_time_to_train() -> None:
    limits.partition(gpus(1, 1), Profile(), lead=139)
    limits.partition(gpus(1, 1), Profile(time="5:00"), lead=140)
    limits.partition(gpus(2, 1), Profile(partition="long"), lead=10**6)
    with pytest.raises(
        LaunchError, match=r"gpu gives a job 00:03:20 where no --time is asked for, .* stop 140 s before"
    ):
        limits.partition(gpus(1, 1), Profile(), lead=140)
    with pytest.raises(LaunchError, match=r"partition down gives a job 00:03:00 .* ask for more than 200 s by --time"):
        limits.partition(gpus(1, 1), Profile(partition="down"), lead=140)


def test_slurm_that_does_not_answer_is_named(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (answers / "sinfo").write_text("#!/bin/sh\necho 'slurm_load_node: Unable to\n contact' >&2; exit 1\n")
    with pytest.raises(LaunchError, match=r"Slurm does not answer `sinfo .*: slurm_load_node: Unable to contact; try"):
        limits.partition(gpus(1, 1), Profile())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"`scontrol show partition .*is not installed here"):
        limits.partition(gpus(1, 1), Profile())


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_real_slurm_is_understood() -> None:
    limits.partition(gpus(4, 2), Profile(partition="low", time="2-00:00:00"))
    limits.partition(gpus(2, 1), Profile(exclude="n[1-2]"))
    for layout, profile, sentence in [
        (gpus(1, 1), Profile(partition="hihg"), r"partition hihg does not exist in this Slurm; did you mean high\?"),
        (gpus(5, 1), Profile(), "partition low has 4 nodes, and 5 are wanted"),
        (gpus(1, 3), Profile(), "nodes that have 3 GPUs or more: 0 of 4, and 1 wanted; .* is 2"),
        (gpus(1, 2), Profile(cpus_per_task=2), "have 4 CPUs or more .*: 0 of 4, and 1 wanted; .* is 2 for"),
        (gpus(3, 1), Profile(exclude="n[1-2]"), "nodes that are not excluded: 2 of 4, and 3 wanted"),
        (gpus(1, 1), Profile(constraint="ib"), "constraint ib: 0 of 4, and 1 wanted; features of its nodes: none"),
        (gpus(1, 1), Profile(mem="1P"), "MB of memory or more: 0 of 4"),
    ]:
        with pytest.raises(LaunchError, match=sentence):
            limits.partition(layout, profile)


def test_time_limit_must_leave_time_to_train() -> None:
    limits.time_allows_lead(Profile(), 500)
    limits.time_allows_lead(Profile(time="UNLIMITED"), 500)
    limits.time_allows_lead(Profile(time="10:01"), 540)
    with pytest.raises(LaunchError, match=r"an attempt of 10:00 \(600 s\) would be told to stop 540 s before its end"):
        limits.time_allows_lead(Profile(time="10:00"), 540)


def test_lead_is_the_profiles_else_twice_the_longest_save_and_a_minute(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert limits.signal_lead(Profile(), tmp_path) == 120, "nothing was measured"
    metrics.write_text('{"step": 1, "train/loss": 2.0}\n')
    assert limits.signal_lead(Profile(), tmp_path) == 120
    rows = [json.dumps({"step": step, "speed/save_seconds": save}) for step, save in ((3, 12.0), (6, 30.2), (9, 8.0))]
    damaged = ['{"st{"speed/save_seconds": 500}', '["speed/save_seconds"]', '{"speed/save_seconds": "900"}']
    damaged += ['{"speed/save_seconds": NaN}', '{"speed/save_seconds": 700']
    metrics.write_bytes("\n".join([*rows, *damaged]).encode() + b"\xff")
    assert limits.signal_lead(Profile(), tmp_path) == 121, "twice 30.2 s, rounded up, and 60 s"
    assert limits.signal_lead(Profile(signal_lead=7), tmp_path) == 7


def test_run_that_needs_more_than_its_gpu_has_is_refused(config: Path) -> None:
    wanted = load(config, ["engine.name=ddp"])
    network = checks.network(wanted)
    needed = memory.estimate(wanted, network, 2).total / 1e9 + 2
    limits.memory(wanted, gpus(1, 2), network, Profile())
    limits.memory(wanted, gpus(1, 2), network, Profile(gpu_memory_gb=needed + 1e-6))
    small = Profile(gpu_memory_gb=needed - 1e-6)
    limits.memory(wanted, Layout("slurm", 1, 2, use_gpus=False), network, small)
    with pytest.raises(LaunchError, match=f"estimated to need {needed:.1f} GB .* profile's GPU has 2.*GB") as caught:
        limits.memory(wanted, gpus(1, 2), network, small)
    for key in ("steps.micro_batch_size", "engine.activation_checkpointing", "engine.name=fsdp"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.path=https://me:pass@host/set", "data.path: https://host/set is given with a password, a token or"),
        ("data.path=s3://KEY:pass@bucket/set", "data.path: s3://bucket/set is given"),
        ("data.path=https://host/set?sv=1&sig=pass", "data.path: https://host/set is given"),
        ("data.path=https://hf_pass@host/set", "data.path: https://host/set is given"),
        ("data.path=https://host/set?token=pass", "data.path: https://host/set is given"),
        ("data.path=https://host/set?X-Amz-Signature=pass", "data.path: https://host/set is given"),
        ("start.path=https://me:pass@host/w", "start.path: https://host/w is given"),
    ],
)
def test_password_in_the_configuration_is_refused_without_showing_it(override: str, shown: str, config: Path) -> None:
    with pytest.raises(LaunchError, match=shown) as caught:
        secret_words.no_secrets(load(config, [override]))
    assert "~/.netrc" in str(caught.value)
    assert "pass" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    "path", ["https://host:8080/a@b", "s3://bucket/set?versionId=1", "/data/a:b@c", "https://me@host/a?tokens=5"]
)
def test_ordinary_address_is_no_secret(path: str, config: Path) -> None:
    secret_words.no_secrets(load(config, [f"data.path={path}"]))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ("/dev/shm/runs/a", "is in the memory of this machine (tmpfs)"),
        ("/tmp/../tmp/runs/a", "is under /tmp, which is each machine's own as a rule"),
    ],
)
def test_folder_that_other_nodes_hardly_see_is_warned_about(
    run: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cache, "file_system_kind", lambda folder: "tmpfs" if folder.is_relative_to("/dev/shm") else "nfs4"
    )
    assert limits.shared_folder(Path(run), 2) == (
        f"output_dir: {run} {sentence}; the 2 nodes need a folder on a file system that all of them see"
    )
    assert limits.shared_folder(Path(run), 1) is None
    assert limits.shared_folder(Path("/shared/runs/a"), 2) is None


@pytest.mark.usefixtures("answers")
def test_partition_that_ends_preempted_jobs_is_warned_of() -> None:
    assert list(limits.preemption(Profile(partition="gpu"))) == []
    assert list(limits.preemption(Profile(partition="gpu,long"))) == [
        "partition long preempts by PreemptMode=CANCEL: a run that has not saved within 5 s of grace stays away until "
        "`launch/jobs.py resume`"
    ]
