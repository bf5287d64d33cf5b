"""The plan: its memory against what training really holds, its traffic by hand, its bounds, its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_memory import Case, compare
from dgt.config import load
from launch import checks, plan, traffic
from launch.layout import Layout
from launch.profiles import Hardware, Profile

HARDWARE = Hardware(
    peak_tflops=100.0, reached_share=0.5, intra_node_gb_s=400.0, inter_node_gb_s=40.0, host_copy_gb_s=10.0,
    read_gb_s=2.0, write_gb_s=1.0, storage_gb_s=100.0, image_kb=100.0, node_mtbf_hours=5000.0, restart_seconds=300.0,
)  # fmt: skip
TOLERANCE = 0.15
"""Of the measured peak: what the plan promises."""


@pytest.mark.parametrize(
    "case",
    [
        Case("dgt_nano", "ddp", 1, 16),
        Case("dgt_nano", "ddp", 1, 16, checkpointing="full"),
        Case("dgt_nano", "ddp", 2, 8, checkpointing="selective", accumulation=2),
        Case("dgt_nano", "fsdp", 2, 16, precision="bf16"),
    ],
    ids=str,
)
def test_memory_is_within_its_promise_of_what_two_real_steps_hold(case: Case) -> None:
    found = compare(case)
    assert found["predicted"] == pytest.approx(found["measured"], rel=TOLERANCE)


def planned(config: Path, nodes: int, per_node: int, overrides: Sequence[str], hardware: Hardware = HARDWARE) -> Any:
    loaded = load(config, [f"steps.global_batch_size={nodes * per_node * 8}", *overrides])
    layout = Layout("slurm", nodes, per_node, use_gpus=True)
    return plan.Plan(loaded, layout, Profile(hardware=hardware), checks.network(loaded))


P = 1_000_000
"""Parameters of a network of which only their number matters."""


@pytest.mark.parametrize(
    ("overrides", "within", "between"),
    [
        (["engine.name=ddp"], 2 * 7 / 8 * 4 * P, 0),  # one all-reduce a step, however many micro-batches
        (["engine.name=fsdp"], 7 / 8 * (2 * 2 * 4 * P + 4 * P), 0),  # two micro-batches gather twice each
        (["engine.name=fsdp", "engine.precision=bf16"], 7 / 8 * (2 * 2 * 2 * P + 4 * P), 0),
        (["engine.name=fsdp", "engine.fsdp.reshard_after_forward=false"], 7 / 8 * (2 * 4 * P + 4 * P), 0),
        (["engine.name=fsdp", "engine.fsdp.shard_size=4"], 3 / 4 * (2 * 2 * 4 * P + 4 * P), 2 * 1 / 2 * P),
        (["engine.name=deepspeed", "engine.deepspeed.stage=1"], 7 / 8 * 2 * 4 * P, 0),
        (["engine.name=deepspeed", "engine.deepspeed.stage=2"], 7 / 8 * 3 * 4 * P, 0),
        (["engine.name=deepspeed", "engine.deepspeed.stage=3"], 7 / 8 * 6 * 4 * P, 0),
    ],
)
def test_traffic_of_each_engine(overrides: list[str], within: float, between: float, config: Path) -> None:
    loaded = load(config, ["steps.global_batch_size=64", *overrides])  # 8 ranks, two micro-batches of 4
    assert traffic.volume(loaded, P, 8) == traffic.Volume(pytest.approx(within), pytest.approx(between))


def test_step_is_bounded_by_what_takes_longest_and_by_the_sum(config: Path) -> None:
    made = planned(config, 2, 4, ["engine.name=ddp"])
    times = made.step_time()
    peak = 6 * made.macs * 8 / 100e12
    sent = 2 * 7 / 8 * 4 * plan.parameters(made.network) / 40e9  # between nodes, the slower way
    assert times == traffic.StepTime(*(pytest.approx(value) for value in (peak, 2 * peak, sent, 32 * 100e3 / 2e9)))
    assert times.lower == max(peak, sent, times.reading)
    assert times.upper == pytest.approx(max(2 * peak + sent, times.reading))
    full = planned(config, 2, 4, ["engine.name=ddp", "engine.activation_checkpointing=full"]).step_time()
    assert full.peak == pytest.approx(peak * 8 / 6)


def test_groups_within_a_node_talk_over_its_links_and_their_copies_across(config: Path) -> None:
    made = planned(config, 2, 4, ["engine.name=fsdp", "engine.fsdp.shard_size=4"])
    sent = traffic.volume(made.config, plan.parameters(made.network), 8)
    assert made.step_time().exchange == pytest.approx(sent.within / 400e9 + sent.between / 40e9)


def test_what_the_profile_does_not_say_stays_unknown(config: Path) -> None:
    made = planned(config, 2, 4, [], Hardware())
    times = made.step_time()
    assert (times.lower, times.upper, times.exchange) == (None, None, None)
    shown = plan.in_words([*plan.needs(made), ("goodput", plan.scale(made))])
    assert "a step takes          unknown to unknown" in shown
    assert "unknown: the profile does not say hardware.gpu, hardware.intra_node_gb_s" in shown


def test_plan_shows_goodput_for_one_to_4096_nodes(config: Path) -> None:
    rows = plan.scale(planned(config, 2, 4, []), runs=5).splitlines()
    numbers = [int(line.split()[0].replace(",", "")) for line in rows[1:14]]
    assert numbers == [2**i for i in range(13)]
    assert "An estimate: 5 simulated runs" in rows[14]


def test_disk_holds_what_is_kept_and_what_is_being_written(config: Path) -> None:
    made = planned(config, 1, 1, ["checkpoint.keep_last=3"])
    once = 4 * plan.parameters(made.network)
    shown = dict(plan.checkpoints(made.config, made.network))
    assert shown["size of one"].startswith(plan.gigabytes(4 * once))
    assert shown["disk"].startswith(plan.gigabytes(5 * 4 * once))
    without = replace(made.config, ema=replace(made.config.ema, decay=0.0))
    assert dict(plan.checkpoints(without, made.network))["size of one"].startswith(plan.gigabytes(3 * once))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node must be at least 1, got -1"),
        (["--profile", "nowhere"], "there are aws_efa, ethernet, generic"),
        (["--nodes", "3", "--gpus-per-node", "1"], "8 does not divide by 3 ranks; the nearest that do are 6 and 9"),
    ],
)
def test_wrong_wishes_are_named_in_one_sentence(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reached_share": 1.5}, "reached_share: is a share"),
        ({"read_gb_s": 0.0}, "read_gb_s: must be above 0"),
        ({"restart_seconds": -1.0}, "restart_seconds: must be 0 or more"),
    ],
)
def test_impossible_hardware_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hardware(**values)  # type: ignore[arg-type]
