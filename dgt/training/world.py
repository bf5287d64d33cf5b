"""The ranks of a run: who this process is, which device it computes on, and how ranks agree on a decision."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_left: list[Any] = []
"""Groups of worlds that were left, kept until the process ends."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
FLIGHT_RECORDS = "2000"
"""How many of NCCL's last collectives are remembered, for the case that one hangs (dgt/training/watchdog.py)."""


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group over all ranks for decisions on the host; never waits for the GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def agree_max(self, value: int) -> int:
        """The largest `value` of any rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, act: Callable[[], Result]) -> Result:
        """Runs `act` on rank 0 alone; every rank returns its result or raises its error."""
        result, error = None, None
        if self.is_main:
            try:
                result = act()
            except Exception as raised:
                error = portable(raised)
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.agree_max(0)


def portable(error: Exception) -> Exception:
    """The error itself where it survives the way to other ranks, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def joined() -> Iterator[World]:
    """Joins the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and leaves them at the end.

    Without RANK the process is a world of one. CUDA devices are used where there are any: rank i of a node takes
    device i. Raises RuntimeError where a node has more ranks than devices.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no device: this node shows {torch.cuda.device_count()} CUDA devices; "
                "start one process per device"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", FLIGHT_RECORDS)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDS)  # its name in later versions
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))
    finally:
        # DDP's reducer holds the group, too. If it were the last to let go, it would wait for gloo's threads with the
        # interpreter's lock in hand, which they may be waiting for.
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def set_threads(threads: int) -> None:
    """CPU threads of this rank's arithmetic; 0 = its share of the cores that this process may use."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))


def set_deterministic(only: bool) -> None:
    """Whether GPU operations that do not repeat bit for bit are replaced by slower ones that do."""
    if only:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.use_deterministic_algorithms(only)
