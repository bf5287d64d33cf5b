"""benchmarks/data_pipeline.py: what it makes of measured rounds, its worker processes, and a tiny run of the whole."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_pipeline as program
from benchmarks.data import processes, report, sets, team
from benchmarks.data.contestants import CONTESTANTS, REFERENCE, Task
from benchmarks.data.summary import MEMORY_TARGET, SPEED_TARGETS, checks, summarize

OURS = "ours-tar-linear"


def record(contestant: str, number: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """An epoch of 100 images that took one core throughout."""
    usual = {"set": "made up", "threads": 1, "contestant": contestant, "round": number, "images": 100,
             "seconds": seconds, "cpu_seconds": seconds, "anonymous_bytes": 10**8}  # fmt: skip
    return usual | changes


def rounds(contestant: str, seconds: list[float], **changes: Any) -> list[dict[str, Any]]:
    """A round that warms up and then one record for each duration."""
    return [record(contestant, number, value, **changes) for number, value in enumerate([99.0, *seconds])]


def every_contestant(ratio: float = 2.0) -> list[dict[str, Any]]:
    """Two rounds of all of ours at `ratio` times FFCV's speed."""
    ours = [entry for name in SPEED_TARGETS for entry in rounds(name, [1.0, 1.0])]
    return ours + rounds(REFERENCE, [ratio, ratio])


def test_ratios_are_taken_within_a_round_before_their_median() -> None:
    # FFCV met a busy moment in round 2, ours in round 3: the ratio of the medians would be 1.0
    rows = summarize(rounds(OURS, [1.0, 1.0, 8.0]) + rounds(REFERENCE, [3.0, 6.0, 1.0]))
    ours, ffcv = rows
    assert (ours.contestant, ffcv.contestant) == (OURS, REFERENCE)
    assert ours.ratio is not None
    assert (ours.ratio.median, ours.ratio.least, ours.ratio.most) == (3.0, 0.125, 6.0)
    assert ours.images_per_second.median == 100.0
    assert ffcv.ratio is not None
    assert ffcv.ratio.median == 1.0


def test_round_zero_counts_for_the_growth_of_memory_only() -> None:
    group = [record(OURS, number, 50.0 if number == 0 else 2.0, anonymous_bytes=100 + number) for number in range(4)]
    (row,) = summarize(group)
    assert row.images_per_second.least == 50.0
    assert row.growth_bytes == 3
    assert row.ratio is None


def test_cpu_time_cores_and_scaling() -> None:
    one = rounds(OURS, [2.0, 2.0], cpu_seconds=1.0) + rounds(REFERENCE, [4.0, 4.0], cpu_seconds=3.0)
    two = rounds(OURS, [0.5, 0.5], cpu_seconds=1.0, threads=2)
    rows = summarize(one + two)
    assert [(row.threads, row.contestant) for row in rows] == [(1, OURS), (1, REFERENCE), (2, OURS)]
    assert rows[0].cpu_ms.median == 10.0
    assert rows[0].cpu_ratio is not None
    assert rows[0].cpu_ratio.median == 3.0
    assert rows[0].cores == 0.5
    assert [row.scaling for row in rows] == [1.0, 1.0, 4.0]
    assert rows[2].ratio is None  # FFCV did not run with two threads


RESUME = {"what": "14 million", "seconds": 1.0, "bytes": 10**8, "max_seconds": 2.0, "max_bytes": 5 * 10**8}


def missed(records: list[dict[str, Any]], resume: dict[str, Any] | None = None) -> list[str]:
    """What the checks miss."""
    found = checks(summarize(records), [RESUME | (resume or {})])
    return [check.what for check in found if not check.passed]


def test_all_targets_met() -> None:
    assert missed(every_contestant()) == []


@pytest.mark.parametrize("name", SPEED_TARGETS)
def test_a_contestant_just_below_its_target_misses_it(name: str) -> None:
    others = [entry for entry in every_contestant() if entry["contestant"] != name]
    enough, short = (rounds(name, 2 * [2.0 / (SPEED_TARGETS[name] * factor)]) for factor in (1.001, 0.999))
    assert missed(others + enough) == []
    assert missed(others + short) == [f"{CONTESTANTS[name].title}: made up, 1 thread: speed"]


def test_growing_memory_and_slow_or_large_resume_miss_their_targets() -> None:
    records = every_contestant()
    next(entry for entry in reversed(records) if entry["contestant"] == OURS)["anonymous_bytes"] += MEMORY_TARGET + 1
    assert missed(records) == ["ours, tar, linear: made up, 1 thread: memory"]
    assert missed(every_contestant(), {"seconds": 2.5}) == ["14 million: time"]
    assert missed(every_contestant(), {"bytes": 6 * 10**8}) == ["14 million: memory"]


def test_what_was_not_measured_is_missed() -> None:
    without = [entry for entry in every_contestant() if entry["contestant"] != OURS]
    assert missed(without) == ["ours, tar, linear: speed"]
    assert [check.passed for check in checks(summarize(every_contestant()), [])][-1] is False
    alone = [entry for entry in every_contestant() if entry["contestant"] != REFERENCE]
    assert len(missed(alone)) == len(SPEED_TARGETS)


def test_generated_images_are_like_imagenets(tmp_path: Path) -> None:
    files = sets.generated_files(tmp_path, 12)
    paths = sorted((files / "train").glob("*/*"))
    assert len(paths) == sets.num_files(files) == 12
    image = Image.open(paths[0])
    assert image.size == (500, 375)
    assert [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
    assert 75_000 < np.mean([path.stat().st_size for path in paths]) < 110_000
    assert len({path.read_bytes() for path in paths}) == 12


def test_photographs_are_unpacked_as_they_are_and_repeated(tmp_path: Path) -> None:
    contents = [b"\xff\xd8 one", b"\xff\xd8 two"]
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for number, content in enumerate([*contents, b"text"]):
            member = tarfile.TarInfo(f"some/{number}.JPEG" if number < 2 else "some/README")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    files = sets.photo_files(tmp_path, tmp_path / "some.tar", copies=3)
    found = [path.read_bytes() for path in sorted((files / "train").glob("*/*"))]
    assert sets.num_files(files) == 6
    assert sorted(found) == sorted(3 * contents)


_BUSY = "import sys, time\nwhile time.process_time() < 0.3: pass\nheld = bytearray(b'x') * 50_000_000\n"


def test_cpu_time_and_memory_include_living_and_ended_children() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    cpu, size = processes.cpu_seconds(), processes.anonymous_bytes()
    wait = "print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", _BUSY + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        assert process.pid in processes.descendants()
        assert processes.cpu_seconds() - cpu >= 0.3
        assert processes.anonymous_bytes() - size >= 50_000_000
        assert process.stdin is not None
        process.stdin.close()
    assert process.pid not in processes.descendants()
    assert processes.cpu_seconds() - cpu >= 0.3


def test_a_contestant_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    task = Task(OURS, str(tmp_path), str(tmp_path), 1, 1, 1)
    with pytest.raises(team.ContestantError, match=r"FileNotFoundError.*train"):
        team.start_worker(sys.executable, task, tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(team.ContestantError, match="its process has ended"):
        team.start_worker(str(python), Task(OURS, "", "", 1, 1, 1), tmp_path / "log")


def run_program(folder: Path, *arguments: str) -> int:
    return program.main(["--images", "20", "--batch-size", "8", "--folder", str(folder), *arguments])


def test_a_whole_run_measures_names_who_failed_and_writes_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "no-such-python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    contestants = [OURS, "torchvision-v2", "dali-cpu"]
    code = run_program(
        tmp_path / "data", "--threads", "1", "2", "--rounds", "2", "--no-resume", "--contestants", *contestants,
        "--python", f"dali-cpu={broken}", "--out", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert "ours, tar, linear" in shown
    assert "did not run: NVIDIA DALI, CPU (generated (20), 2 threads): its process has ended" in shown
    content = json.loads((tmp_path / "out.json").read_text())
    assert {"machine", "commit", "versions", "command", "settings", "summary", "checks", "failures"} < set(content)
    assert [failure["contestant"] for failure in content["failures"]] == ["dali-cpu", "dali-cpu"]
    order = [(epoch["threads"], epoch["round"], epoch["contestant"]) for epoch in content["epochs"]]
    assert order == [
        (threads, number, name)
        for threads in (1, 2)
        for number in range(3)
        for name in program.turns(contestants[:2], number)
    ]
    for epoch in content["epochs"]:
        assert epoch["images"] == 16  # two whole batches of 20 images
        assert epoch["seconds"] > 0
        assert epoch["cpu_seconds"] > 0
        if epoch["round"] == 0:
            assert epoch["dtype"] == "uint8"
            assert epoch["shape"] == ([224, 224, 3] if epoch["contestant"] == OURS else [3, 224, 224])
    means = {epoch["contestant"]: epoch["mean"] for epoch in content["epochs"] if epoch["round"] == 0}
    assert means[OURS] == pytest.approx(means["torchvision-v2"], abs=15)  # other crops of the same images
    assert set(content["versions"]) == set(contestants[:2])


def test_resume_is_part_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program.data_resume, "measure", lambda: [RESUME | {"seconds": 2.25, "imports": 3e8}])
    out = tmp_path / "out.json"
    options = ["--threads", "1", "--rounds", "1", "--contestants", OURS, "--out", str(out)]
    assert run_program(tmp_path / "data", *options) == 0
    content = json.loads(out.read_text())
    assert content["resume"][0]["seconds"] == 2.25
    assert [check["passed"] for check in content["checks"] if check["what"].startswith("14 million")] == [False, True]
    assert "2.25" in capsys.readouterr().out


def test_check_exits_with_1_where_a_target_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--contestants", OURS, "--threads", "1", "--rounds", "1", "--check", "--no-resume"]
    assert run_program(tmp_path, *arguments) == 1
    monkeypatch.setattr(program, "checks", lambda rows, resume: [])
    assert run_program(tmp_path, *arguments) == 0


@pytest.mark.ffcv
def test_ffcv_reads_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    arguments = ["--threads", "1", "--rounds", "1", "--no-resume", "--contestants", OURS, "ours-beton-linear", "ffcv"]
    out = tmp_path / "out.json"
    assert run_program(tmp_path / "data", *arguments, "--out", str(out), "--plot", str(tmp_path / "plot.png")) == 0
    content = json.loads(out.read_text())
    assert content["failures"] == []
    means = [epoch["mean"] for epoch in content["epochs"] if epoch["round"] == 0]
    assert len(means) == 3
    assert means[1:] == pytest.approx([means[0]] * 2, abs=15)
    assert Image.open(tmp_path / "plot.png").size[0] > 300


def test_a_plot_shows_ratios(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(summarize(every_contestant()), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 300
    with pytest.raises(ValueError, match="FFCV"):
        report.plot(summarize(rounds(OURS, [1.0])), tmp_path / "other.png")


def test_running_as_a_file_finds_the_package_and_not_itself(tmp_path: Path) -> None:
    path = team.REPOSITORY / "benchmarks" / "data_pipeline.py"
    done = subprocess.run([sys.executable, str(path), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "requirements-data-peers.txt" in done.stdout


def test_no_contestant_keeps_its_place_or_its_predecessor() -> None:
    names = ["a", "b", "c", "d"]
    orders = [program.turns(names, number) for number in range(8)]
    assert orders[:3] == [["a", "b", "c", "d"], ["d", "c", "b", "a"], ["b", "c", "d", "a"]]
    assert all(sorted(order) == names for order in orders)
    for name in names:
        assert {order.index(name) for order in orders} == {0, 1, 2, 3}
    assert program.turns([], 3) == []
