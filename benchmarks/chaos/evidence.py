"""What a run leaves behind that must not depend on its interruptions: losses, tensors, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dgt.training import checkpoint


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


def differences(run: Path, expected: Path) -> list[str]:
    """In what the two finished runs differ, in words; empty where every bit is the same."""
    found = []
    ours, theirs = losses(run), losses(expected)
    if ours != theirs:
        first = next((a, b) for a, b in zip([*ours, {}], [*theirs, {}], strict=False) if a != b)
        found.append(f"losses or metrics: {first[0]} instead of {first[1]}")
    (step, tensors, progress), (last, wanted, reached) = final(run), final(expected)
    if step != last:
        found.append(f"step {step} instead of {last}")
    if progress != reached:
        found.append(f"progress {progress} instead of {reached}")
    if tensors.keys() != wanted.keys():
        found.append(f"names {sorted(tensors.keys() ^ wanted.keys())[:5]} in one of them only")
    for name in tensors.keys() & wanted.keys():
        ours_bits, wanted_bits = (t[name].contiguous().view(-1).view(torch.uint8) for t in (tensors, wanted))
        if tensors[name].dtype != wanted[name].dtype or not torch.equal(ours_bits, wanted_bits):
            found.append(f"the tensor {name}")
    return found
