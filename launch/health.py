"""What the nodes' health check has found: which nodes are to be left out, and whether it can be the nodes at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import runs

NO_REPORT: dict[str, Any] = {"checks": [{"name": "report", "ok": False, "text": "there is none: no answer"}]}
"""What stands for the report of a node that left none."""
SHARED_CHECKS = ("all-reduce",)
"""Checks of slurm/health_check.py that stand in every node's report, and blame none."""


@dataclass(frozen=True)
class Findings:
    """The reports, judged."""

    bad: dict[str, str]
    """Node -> what is wrong with it."""
    shared: str = ""
    """What is wrong with all of them together; empty where nothing is."""
    alike: bool = False
    """Whether every one of several nodes fails in the same checks, which then are wrong, or the cluster is."""


def judge(folder: Path, nodes: Sequence[str]) -> Findings | None:
    """The findings of the reports that the check has left in `folder`; None where it has left none at all."""
    reports = [runs.read_json(path) or {} for path in folder.glob("*.json")]
    told = {report["node"]: report for report in reports if "node" in report}
    if not told:
        return None
    failed = {node: [check for check in told.get(node, NO_REPORT)["checks"] if not check["ok"]] for node in nodes}
    own = {node: [check for check in checks if check["name"] not in SHARED_CHECKS] for node, checks in failed.items()}
    bad = {
        node: "; ".join(f"{check['name']}: {check['text']}" for check in checks)
        for node, checks in own.items()
        if checks
    }
    shared = {check["text"] for checks in failed.values() for check in checks if check["name"] in SHARED_CHECKS}
    kinds = {tuple(check["name"] for check in checks) for checks in own.values()}
    return Findings(bad, "; ".join(sorted(shared)), alike=len(bad) == len(nodes) > 1 and len(kinds) == 1)
