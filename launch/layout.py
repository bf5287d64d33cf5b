"""How many processes run where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.cluster import has_slurm
from launch.runs import LaunchError

Cluster = Literal["slurm", "local"]


@dataclass(frozen=True)
class Layout:
    """One process per GPU, or per share of the CPU cores."""

    cluster: Cluster
    nodes: int
    processes_per_node: int
    use_gpus: bool

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.nodes * self.processes_per_node

    def __str__(self) -> str:
        kind = "GPU" if self.use_gpus else "CPU"
        return f"{count(self.nodes, 'node')} x {count(self.processes_per_node, f'{kind} process')}"


def count(number: int, thing: str) -> str:
    """A number and what it counts, such as "1 node" or "3 processes"."""
    return f"{number} {thing}" + ("" if number == 1 else "es" if thing.endswith("s") else "s")


@dataclass(frozen=True)
class Wish:
    """What was asked for; None where nothing was said."""

    cluster: Literal["auto", "slurm", "local"] = "auto"
    nodes: int | None = None
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    dry_run: bool = False


def choose(wish: Wish, default_gpus_per_node: int) -> Layout:
    """The layout for a wish; `default_gpus_per_node` is what a Slurm node has where nothing was said.

    Under "auto" a machine with Slurm's commands submits to it. A dry run may plan several nodes anywhere.
    Raises LaunchError for a wish that cannot be met.
    """
    for name in ("nodes", "gpus_per_node", "processes_per_node"):
        value = getattr(wish, name)
        if value is not None and value < 1:
            raise LaunchError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if wish.gpus_per_node and wish.processes_per_node:
        raise LaunchError("--gpus-per-node starts one process per GPU, --processes-per-node runs on CPU; give one")
    nodes = wish.nodes or 1
    if wish.cluster == "slurm" or (wish.cluster == "auto" and (has_slurm() or (wish.dry_run and nodes > 1))):
        return Layout(
            "slurm",
            nodes,
            wish.processes_per_node or wish.gpus_per_node or default_gpus_per_node,
            use_gpus=wish.processes_per_node is None,
        )
    if nodes > 1:
        if wish.cluster == "local":
            raise LaunchError(f"--nodes {nodes}: --cluster local runs on this machine alone; leave one of them out")
        raise LaunchError(
            f"--nodes {nodes}: several nodes need Slurm, and there is no sbatch on this machine; --dry-run shows the "
            "job all the same"
        )
    return here(wish)


def here(wish: Wish) -> Layout:
    """The layout on this machine: the GPUs that were asked for, else all there are, else one process on CPU."""
    import torch

    present = torch.cuda.device_count()
    if wish.gpus_per_node and wish.gpus_per_node > present and not wish.dry_run:
        raise LaunchError(
            f"--gpus-per-node {wish.gpus_per_node}: this machine shows {count(present, 'GPU')}; "
            "--processes-per-node runs on CPU"
        )
    if wish.processes_per_node or not (wish.gpus_per_node or present):
        return Layout("local", 1, wish.processes_per_node or 1, use_gpus=False)
    return Layout("local", 1, wish.gpus_per_node or present, use_gpus=True)
