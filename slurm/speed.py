"""How fast this node multiplies matrices and talks to the others, measured with torch for slurm/health_check.py.

As a program it prints the speed of each device's matrix products as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Exchange(NamedTuple):
    """What an all-reduce was measured at."""

    bandwidth: float
    """Bus bandwidth in bytes/s as nccl-tests count it: what a link of a ring carries, whatever the number of ranks.
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md"""
    ranks: int
    backend: str


def matrix_products() -> dict[str, float]:
    """Operations per second of a matrix product on each GPU that is visible (bf16), or else on the CPU (fp32)."""
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    return {device: operations_per_second(device) for device in devices}


def operations_per_second(device: str) -> float:
    """The best of a few rounds of products of square matrices, 2 n^3 operations each."""
    size, times, dtype = (1024, 2, torch.float32) if device == "cpu" else (8192, 20, torch.bfloat16)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):  # the first one loads kernels and raises clocks
        best = min(best, seconds_of(lambda: torch.mm(left, right), times, device))
    return 2 * size**3 / best


def all_reduce(limit: float) -> Exchange:
    """Bus bandwidth between all ranks of this step, which must all call this; the slowest rank's time counts.

    Uses NCCL where there are GPUs, gloo elsewhere. Raises an error of torch.distributed where a rank does not come or
    does not answer within `limit` seconds.
    """
    store = meet(limit)
    gpus = torch.cuda.device_count()
    device = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}" if gpus else "cpu"
    backend, size = ("nccl", 2**28) if gpus else ("gloo", 2**24)
    if gpus:
        torch.cuda.set_device(device)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=limit))
    message = torch.zeros(size // 4, device=device)
    for times in (2, 5):  # the first ones build the connections
        seconds = seconds_of(lambda: dist.all_reduce(message), times, device)
    slowest = torch.tensor([seconds], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    bandwidth = 2 * (ranks - 1) / ranks * size / slowest.item()
    dist.destroy_process_group()
    return Exchange(bandwidth, ranks, backend)


def meet(limit: float) -> dist.Store:
    """Waits until all ranks are here; returns what they find each other by.

    Only then may any of them use a GPU: the first rank of a node may still be measuring all of the node's, and in
    compute mode EXCLUSIVE_PROCESS a GPU serves one process. Raises RuntimeError naming how many came.
    """
    store, _, ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
    if store.add("came", 1) == ranks:
        store.set("complete", "")
    try:
        store.wait(["complete"], timedelta(seconds=limit))
    except dist.DistStoreError:
        raise RuntimeError(f"only {store.add('came', 0)} of {ranks} ranks came within {limit:.0f} s") from None
    return store


def seconds_of(work: Callable[[], object], times: int, device: str) -> float:
    """Seconds of one `work`, the mean of several in a row."""
    finish(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    finish(device)
    return (time.perf_counter() - began) / times


def finish(device: str) -> None:
    """Waits until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    json.dump(matrix_products(), sys.stdout)
