"""N steps equal k steps, SIGKILL, resume, N - k steps: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_self, run_ranks
from small import small_config

from benchmarks.chaos.evidence import differences, final
from dgt.config import Config
from dgt.tasks import Classification
from dgt.training.keeper import Keeper
from dgt.training.trainer import Trainer, train

WORLD_SIZE = 2


def train_and_die(config: Config, die_at: int | None, where: str = "step") -> dict[str, Any]:
    """One attempt in one rank, SIGKILLed at step `die_at`: after it, within its evaluation, before a commit."""
    served: list[tuple[int, list[int], int]] = []
    groupings = 0
    original = {"step": Trainer.step, "save": Keeper.save}
    original_totals = Classification.totals

    def step(self: Trainer, batch: Any, waited: float) -> bool:
        taken = original["step"](self, batch, waited)
        served.append((self.progress.step, batch.ids.tolist(), batch.images.shape[1]))
        if where == "step" and self.progress.step == die_at and self.world.rank == 1:
            kill_self()
        return taken

    def totals(self: Classification, *args: Any) -> torch.Tensor:
        if where == "evaluation" and served and served[-1][0] == die_at:
            kill_self()
        return original_totals(self, *args)

    def save(self: Keeper) -> bool:
        if where == "save" and self.progress.step == die_at and self.world.is_main:
            rename = Path.rename
            Path.rename = lambda path, to: kill_self() if path.suffix == ".saving" else rename(path, to)  # type: ignore
        return original["save"](self)

    Trainer.step, Keeper.save, Classification.totals = step, save, totals  # type: ignore[method-assign]

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal groupings
            groupings += func is torch.ops.dgt.route.default
            return func(*args, **(kwargs or {}))

    with Count():
        outcome = train(config)
    return {"served": served, "groupings": groupings, "status": outcome.status, "metrics": outcome.metrics}


def growing(folder: Path) -> Config:
    """Larger images in the second epoch, from two canonical streams, each sample twice."""
    config = small_config(folder)
    data = replace(
        config.data,
        order="block",
        block_shards=1,
        canonical_nodes=2,
        image_size_schedule=((0, 32), (1, 48)),
        augment=replace(config.data.augment, repeats=2),
    )
    return replace(config, data=data)


@pytest.mark.parametrize(
    ("make_config", "sizes"),
    [
        (small_config, {32}),
        (lambda folder: small_config(folder, "fsdp"), {32}),
        (growing, {32, 48}),
    ],
    ids=["ddp", "fsdp", "growing"],
)
def test_three_sigkills_change_no_bit_of_the_run(
    tmp_path: Path, make_config: Callable[[Path], Config], sizes: set[int]
) -> None:
    undisturbed = make_config(tmp_path / "undisturbed")
    whole = run_ranks(WORLD_SIZE, train_and_die, undisturbed, None)
    assert whole[0].value["status"] == "finished"
    assert whole[0].value["groupings"] > 0, "the run must really group"
    assert {size for _, _, size in whole[0].value["served"]} == sizes

    disturbed = make_config(tmp_path / "disturbed")
    for die_at, where in ((3, "step"), (4, "evaluation"), (6, "save")):
        ended = run_ranks(WORLD_SIZE, train_and_die, disturbed, die_at, where, check=False)
        assert -9 in [rank.exitcode for rank in ended]
    last = run_ranks(WORLD_SIZE, train_and_die, disturbed, None)
    assert last[0].value["status"] == "finished"

    # Steps 5 and 6 are done again after the kill inside the save of step 6, and serve the same samples again.
    assert last[0].value["served"] == [s for s in whole[0].value["served"] if s[0] > 4]
    assert last[1].value["served"] == [s for s in whole[1].value["served"] if s[0] > 4]
    assert last[0].value["metrics"] == whole[0].value["metrics"]
    assert differences(disturbed.run_dir, undisturbed.run_dir) == []
    assert {"model", "optimizer", "ema"} <= {name.split(".")[0] for name in final(disturbed.run_dir)[1]}
