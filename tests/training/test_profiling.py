"""Traces: of the steps that were asked for, in a form that viewers read, and never at the run's cost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from dgt.training import profiling
from dgt.training.monitor import MonitorConfig
from dgt.training.profiling import MAX_STEPS, MAX_TRACES, Profiler


def steps(profiler: Profiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8) @ torch.ones(8)
        profiler.after(step)


def traced(run: Path) -> dict[str, list[str]]:
    """Steps that each trace shows."""
    found = {}
    for path in sorted((run / "profiles").iterdir()):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name.split(".")[0]] = sorted({e["name"] for e in events if e["name"].startswith("step ")})
        assert any(e["name"] == "aten::dot" for e in events)
    return found


def test_the_configured_range_is_traced_once(tmp_path: Path) -> None:
    profiler = Profiler((3, 4), tmp_path, is_main=True)
    steps(profiler, 1, 6)
    steps(profiler, 5, 6)
    assert traced(tmp_path) == {"steps-00000003-00000004": ["step 3", "step 4"]}


def test_a_file_in_the_run_folder_asks_for_steps_and_is_taken_away(tmp_path: Path) -> None:
    profiler = Profiler((), tmp_path, is_main=True)
    steps(profiler, 1, 2)
    assert not (tmp_path / "profiles").exists()
    (tmp_path / "profile").write_text("2\n")
    steps(profiler, 3, 6)
    assert not (tmp_path / "profile").exists()
    assert traced(tmp_path) == {"steps-00000003-00000004": ["step 3", "step 4"]}


def test_a_trace_ends_early_where_something_else_than_steps_begins(tmp_path: Path) -> None:
    profiler = Profiler((1, 5), tmp_path, is_main=True)
    steps(profiler, 1, 2)
    profiler.end(2)
    assert traced(tmp_path) == {"steps-00000001-00000002": ["step 1", "step 2"]}


def test_traces_are_bounded_in_length_and_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = Profiler((), tmp_path, is_main=True)
    for i in range(MAX_TRACES + 2):
        (tmp_path / "profile").write_text("1")
        steps(profiler, i + 1, i + 1)
    names = list(traced(tmp_path))
    assert names == [f"steps-{i:08d}-{i:08d}" for i in range(3, MAX_TRACES + 3)]
    (tmp_path / "profile").write_text("1000000")
    steps(profiler, 100, 99 + MAX_STEPS)
    assert profiler.running is None
    assert f"a trace has at most {MAX_STEPS}" in caplog.text
    assert list(traced(tmp_path))[-1] == f"steps-00000100-{99 + MAX_STEPS:08d}"


@pytest.mark.parametrize("text", ["soon", "0", "-3", "1.5"])
def test_a_request_that_is_no_number_is_removed_with_a_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text(text)
    steps(Profiler((), tmp_path, is_main=True), 1, 1)
    assert f"should hold a number of steps, such as 3; it held '{text}'" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_is_being_written_is_left_for_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    profiler = Profiler((), tmp_path, is_main=True)
    steps(profiler, 1, 1)
    assert (tmp_path / "profile").exists()
    (tmp_path / "profile").write_text("1")
    steps(profiler, 2, 2)
    assert list(traced(tmp_path)) == ["steps-00000002-00000002"]


def test_other_ranks_leave_the_request_alone(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("1")
    steps(Profiler((1, 1), tmp_path, is_main=False), 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_what_cannot_be_traced_or_written_costs_the_trace_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profiles").touch()  # no folder can be made there
    profiler = Profiler((1, 1), tmp_path, is_main=True)
    steps(profiler, 1, 2)
    assert "the trace of steps 1 to 1 could not be written to" in caplog.text

    def refuse(self: object) -> None:
        raise RuntimeError("another profiler is active")

    monkeypatch.setattr(profiling.profile, "start", refuse)
    steps(Profiler((1, 1), tmp_path, is_main=True), 1, 2)
    assert "steps from 1 on cannot be traced: another profiler is active" in caplog.text


@pytest.mark.parametrize("bad", [(3,), (4, 3), (0, 1), (1, MAX_STEPS + 1), (1, 2, 3)])
def test_ranges_that_are_none_or_too_long_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^profile_steps: must be the first and the last step, at most 10"):
        MonitorConfig(profile_steps=bad)
