"""The plan: its memory against what training really holds, its traffic by hand, its bounds, its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_memory import Case, compare
from dgt.config import load
from launch import checks, memory, plan, traffic
from launch.layout import Layout
from launch.profiles import Hardware, Profile
from launch.wording import gigabytes

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


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_frozen_weights_have_neither_gradients_nor_moments(engine: str, config: Path) -> None:
    frozen = load(config, [f"engine.name={engine}", "model.freeze=[backbone]", "steps.global_batch_size=16"])
    network = checks.network(frozen)
    every, trained = memory.parameters(network), memory.parameters(network, only_trained=True)
    assert 0 < trained < every / 10
    found = memory.estimate(frozen, network, 2)
    held = every / 2 if engine == "fsdp" else every
    assert found.weights == pytest.approx(4 * held, rel=0.05)
    assert found.average == pytest.approx(4 * held, rel=0.05)
    assert found.gradients <= 4 * trained
    assert found.moments <= 2 * 4 * trained + 1000  # and the steps that it counts
    assert memory.checkpoint_bytes(frozen, network) == 4 * (2 * every + 2 * trained)


def test_zero_keeps_frozen_weights_whole_below_stage_3(config: Path) -> None:
    network = checks.network(load(config, ["model.freeze=[stem]"]))
    every, trained = memory.parameters(network), memory.parameters(network, only_trained=True)
    half = -(-trained // 2)
    for stage, weights, average in ((2, every + half, every - trained + half), (3, -(-every // 2) + half, every / 2)):
        chosen = ["model.freeze=[stem]", "engine.name=deepspeed", f"engine.deepspeed.stage={stage}"]
        found = memory.estimate(load(config, chosen), network, 2)
        assert found.weights == pytest.approx(4 * weights, abs=8)
        assert found.average == pytest.approx(4 * average, abs=8)
        assert found.moments == 2 * 4 * half


def test_teacher_is_counted_without_its_file(config: Path) -> None:
    plain = load(config, ["engine.name=ddp", "data.image_size=64"])
    taught = load(
        config,
        [
            "engine.name=ddp", "data.image_size=64", "task.distillation.teacher=dgt_tiny",
            "task.distillation.checkpoint_path=nowhere.safetensors",
        ],
    )  # fmt: skip
    network = checks.network(plain)
    teacher = checks.network(load(config, ["model.name=dgt_tiny"]))
    alone, both = memory.estimate(plain, network, 1), memory.estimate(taught, network, 1)
    assert alone.teacher == 0
    kept = sum(t.numel() * t.element_size() for t in (*teacher.parameters(), *teacher.buffers()))
    assert both.teacher == pytest.approx(kept, rel=1e-3)
    assert both.weights == alone.weights
    assert both.moments == alone.moments
    assert both.total - alone.total >= both.teacher
    assert "teacher" in dict(plan.memory(taught, Layout("slurm", 1, 1, use_gpus=True), network))


def test_offloaded_state_lies_on_the_host(config: Path) -> None:
    here, there = (load(config, ["engine.name=fsdp", f"engine.fsdp.cpu_offload={x}"]) for x in ("false", "true"))
    network = checks.network(here)
    once = 4 * memory.parameters(network) / 2
    kept, offloaded = memory.estimate(here, network, 2), memory.estimate(there, network, 2)
    assert kept.host == offloaded.weights == offloaded.gradients == offloaded.moments == offloaded.average == 0
    assert 5 * once <= offloaded.host < 8 * once  # weights, gradients, two moments, average; and the update's results
    assert 0 < offloaded.total <= kept.total - 4 * once
    assert offloaded.buffers >= 0.5 * kept.buffers


def test_zero_offloads_what_the_optimizer_needs(config: Path) -> None:
    chosen = ["engine.name=deepspeed", "engine.deepspeed.stage=2"]
    here, there = (load(config, [*chosen, f"engine.deepspeed.offload={where}"]) for where in ("none", "cpu"))
    network = checks.network(here)
    half = 4 * -(-memory.parameters(network) // 2)
    kept, offloaded = memory.estimate(here, network, 2), memory.estimate(there, network, 2)
    assert (kept.host, offloaded.host) == (0, 5 * half)
    assert kept.total - offloaded.total == 5 * half


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
        (["engine.name=deepspeed", "engine.deepspeed.stage=1"], 7 / 8 * 3 * 4 * P, 0),  # an all-reduce, and a gather
        (["engine.name=deepspeed", "engine.deepspeed.stage=2"], 7 / 8 * 5 * 4 * P, 0),  # two all-reduces, and a gather
        (
            [
                "engine.name=deepspeed",
                "engine.deepspeed.settings={zero_optimization: {use_multi_rank_bucket_allreduce: false}}",
            ],
            7 / 8 * 3 * 4 * P,  # each gradient goes to the rank that it belongs to
            0,
        ),
        (["engine.name=deepspeed", "engine.deepspeed.stage=3"], 7 / 8 * 6 * 4 * P, 0),
    ],
)
def test_traffic_of_each_engine(overrides: list[str], within: float, between: float, config: Path) -> None:
    loaded = load(config, ["steps.global_batch_size=64", *overrides])  # 8 ranks, two micro-batches of 4
    assert traffic.volume(loaded, P, 8) == traffic.Volume(pytest.approx(within), pytest.approx(between))


def test_frozen_weights_are_gathered_and_have_no_gradients(config: Path) -> None:
    for overrides, sent in (
        (["engine.name=ddp"], 2 * 7 / 8 * 4 * P / 4),
        (["engine.name=fsdp"], 7 / 8 * (4 * 4 * P + 4 * P / 4)),
        (["engine.name=deepspeed", "engine.deepspeed.stage=2"], 7 / 8 * 5 * 4 * P / 4),
        (["engine.name=deepspeed", "engine.deepspeed.stage=3"], 7 / 8 * 2 * (2 * 4 * P + 4 * P / 4)),
    ):
        loaded = load(config, ["steps.global_batch_size=64", *overrides])
        assert traffic.volume(loaded, P, 8, trained=P // 4).within == pytest.approx(sent)


def test_step_is_bounded_by_what_takes_longest_and_by_the_sum(config: Path) -> None:
    made = planned(config, 2, 4, ["engine.name=ddp"])
    times = made.step_time()
    peak = 6 * made.macs * 8 / 100e12
    sent = 2 * 7 / 8 * 4 * plan.parameters(made.network) / 160e9  # by the four adapters of a node, the slower way
    assert times == traffic.StepTime(*(pytest.approx(value) for value in (peak, 2 * peak, sent, 32 * 100e3 / 2e9)))
    assert times.lower == max(peak, sent, times.reading)
    assert times.upper == pytest.approx(max(2 * peak + sent, times.reading))
    full = planned(config, 2, 4, ["engine.name=ddp", "engine.activation_checkpointing=full"]).step_time()
    assert full.peak == pytest.approx(peak * 8 / 6)


@pytest.mark.parametrize(
    ("layout", "shard_size", "expected"),
    [
        ((1, 8), 0, 4e9 / 400e9),  # the links of a node
        ((2, 8), 0, 4e9 / 320e9),  # one ring leaves a node by its eight adapters of 40 GB/s
        ((2, 16), 0, 4e9 / 400e9),  # sixteen carry 640 GB/s: the links are slower
        ((4, 1), 0, 4e9 / 40e9),  # a node's only GPU uses no links
        ((4, 8), 8, 4e9 / 400e9 + 1e9 / 40e9),  # eight rings between nodes: an adapter each
        ((4, 8), 4, 4e9 / 400e9 + 1e9 / 80e9),  # four rings share the eight adapters
        ((4, 8), 16, 4e9 / 320e9 + 1e9 / 40e9),  # a copy of the network on two nodes
    ],
)
def test_exchange_by_hand(layout: tuple[int, int], shard_size: int, expected: float, config: Path) -> None:
    where = Layout("slurm", *layout, use_gpus=True)
    loaded = load(config, ["engine.name=fsdp", f"engine.fsdp.shard_size={shard_size}"])
    sent = traffic.Volume(4e9, 1e9 if shard_size else 0.0)
    assert traffic.exchange_seconds(loaded, where, HARDWARE, sent) == pytest.approx(expected)


def test_shards_on_a_nodes_own_disk_bound_no_step(config: Path) -> None:
    remote = ["engine.name=ddp", "data.backend=webdataset", "data.path=s3://bucket/set", "data.cache.folder=/scratch"]
    slow = replace(HARDWARE, read_gb_s=1e-6)
    assert planned(config, 2, 4, ["engine.name=ddp"], slow).step_time().lower > 1
    made = planned(config, 2, 4, remote, slow)
    assert made.step_time().reading is None
    assert made.step_time().lower < 1
    assert plan.cluster(made).input_share(4096) == 1.0


def test_images_are_the_largest_that_are_trained_on(config: Path) -> None:
    rising = ["data.image_size=96", "data.image_size_schedule=[[0, 32], [1, 48], [2, 64]]"]
    assert traffic.image_size(load(config, ["data.image_size=96"])) == (96, 96)
    assert traffic.image_size(load(config, rising)) == (48, 48), "the run has two epochs"
    assert traffic.image_size(load(config, [*rising, "steps.total_steps=9"])) == (64, 64), "nobody knows how many"
    assert planned(config, 1, 1, rising).macs == planned(config, 1, 1, ["data.image_size=48"]).macs


def test_what_the_profile_does_not_say_stays_unknown(config: Path) -> None:
    made = planned(config, 2, 4, [], Hardware())
    times = made.step_time()
    assert (times.lower, times.upper, times.exchange) == (None, None, None)
    shown = plan.in_words([*plan.needs(made), ("goodput", plan.scale(made))])
    assert "a step takes          unknown to unknown" in shown
    assert "unknown: the profile does not say hardware.gpu, hardware.intra_node_gb_s" in shown


@pytest.mark.parametrize(("optimizer", "stages"), [("adamw", 3), ("lamb", 0)])
def test_modes_leave_out_what_training_refuses(
    optimizer: str, stages: int, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = memory.Memory(*[0] * 9)
    monkeypatch.setattr(memory, "estimate", lambda *_: nothing)
    made = planned(config, 2, 4, [f"optimizer.name={optimizer}", "engine.fsdp.shard_size=3"])
    rows = plan.modes(made).splitlines()[1:-1]
    assert "fsdp" not in str(rows)
    assert len(rows) == 2 * 3 * (1 + stages), "two precisions, three kinds of recomputation; no fsdp, 3 of 8 ranks"


def test_plan_shows_goodput_for_one_to_4096_nodes(config: Path) -> None:
    rows = plan.scale(planned(config, 2, 4, []), runs=5).splitlines()
    numbers = [int(line.split()[0].replace(",", "")) for line in rows[1:14]]
    assert numbers == [2**i for i in range(13)]
    assert "An estimate: 5 simulated runs" in rows[14]


def test_disk_holds_what_is_kept_and_what_is_being_written(config: Path) -> None:
    made = planned(config, 1, 1, ["checkpoint.keep_last=3"])
    once = 4 * plan.parameters(made.network)
    shown = dict(plan.checkpoints(made.config, made.network))
    assert shown["size of one"].startswith(gigabytes(4 * once))
    assert shown["disk"].startswith(gigabytes(5 * 4 * once))
    without = replace(made.config, ema=replace(made.config.ema, decay=0.0))
    assert dict(plan.checkpoints(without, made.network))["size of one"].startswith(gigabytes(3 * once))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node must be at least 1, got -1"),
        (["--profile", "nowhere"], "there are aws_efa, ethernet, generic"),
        (["--gpus-per-node", "4", "engine.fsdp.shard_size=3"], "4 ranks do not divide into groups of 3"),
        (
            ["--gpus-per-node", "1", "engine.name=deepspeed", "optimizer.name=lamb"],
            "lamb needs whole tensors, which ZeRO cuts",
        ),
        (["model.name=dgt_nanno"], "unknown model 'dgt_nanno'; did you mean dgt_nano"),
        (
            [
                "--gpus-per-node",
                "1",
                "task.distillation.teacher=dgt_tiny",
                "task.distillation.checkpoint_path=/nowhere.pth",
            ],
            "task.distillation.checkpoint_path: there is no file /nowhere.pth",
        ),
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
