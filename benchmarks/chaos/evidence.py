"""What a run leaves behind that must not depend on its interruptions: losses, tensors, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dgt.training import checkpoint

LOST_WITH_A_SAVE = ("best_metric", "best_step")
"""Progress that goes back where a save fails: a best result whose checkpoint is not there does not count."""


def losses(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl without what measures time and memory; a save's lines hold nothing else."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("speed/") and "_seconds" not in k} for row in rows]
    return [row for row in rows if row.keys() > {"step"}]


def final(run: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    """Step, tensors and progress of the newest checkpoint."""
    found = checkpoint.verify(checkpoint.committed(run / "checkpoints")[0])
    stored = checkpoint.tensors_in(found)
    return found.step, {name: stored.whole(name) for name in stored.tensors}, found.manifest["progress"]


def differences(run: Path, expected: Path, disk_was_full: bool = False) -> list[str]:
    """In what the two finished runs differ, in words; empty where every bit is the same.

    A full disk may cost or repeat lines of metrics and cost the memory of a best result, and nothing else.
    """
    ours, theirs = losses(run), losses(expected)
    (step, tensors, progress), (last, wanted, reached) = final(run), final(expected)
    if disk_was_full:
        ours, theirs = ([row for row in rows if row not in theirs] for rows in (ours, []))
        progress, reached = ({k: v for k, v in p.items() if k not in LOST_WITH_A_SAVE} for p in (progress, reached))
    found = []
    if ours != theirs:
        first = next(pair for pair in zip([*ours, {}], [*theirs, {}], strict=False) if pair[0] != pair[1])
        found.append(f"losses or metrics: {first[0]} instead of {first[1]}")
    if step != last:
        found.append(f"step {step} instead of {last}")
    if progress != reached:
        found.append(f"progress {progress} instead of {reached}")
    if tensors.keys() != wanted.keys():
        found.append(f"names {sorted(tensors.keys() ^ wanted.keys())[:5]} in one of them only")
    same_names = sorted(tensors.keys() & wanted.keys())
    found += [f"the tensor {name}" for name in same_names if not same_bits(tensors[name], wanted[name])]
    return found


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaN and the sign of zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (left, right)))
