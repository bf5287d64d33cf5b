"""How much of a cluster's time becomes training: failures, checkpoints and restarts, simulated for any number of nodes.

The model: each node fails after an exponential time, independently, so `n` nodes fail n times as often; any failure
ends the attempt of the whole run. A run works for an interval, stands still for a checkpoint's stall, and so on; a
failure loses what was done since the last checkpoint began, and a restart follows, during which nodes may fail, too.
Goodput is the share of wall time in which steps were computed that were kept.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

NODES = tuple(2**i for i in range(13))
"""1 to 4,096."""

Z95 = 1.96
"""Standard errors on either side that hold the mean with a probability of 95 %."""

LEAST_STALL = 0.1
"""Seconds that a checkpoint is assumed to cost at least: ranks agree, thousands of tensors are copied one by one."""


@dataclass(frozen=True)
class Faults:
    """What interrupts a run, in seconds."""

    failure_rate: float
    """Failures of the whole run per second: nodes / MTBF of one."""
    stall: float
    """Seconds for which training stands still for one checkpoint."""
    restart: float
    """From a failure to the next step: scheduler, start of the processes, loading, first batch."""
    commit: float = 0.0
    """Seconds after its stall until a checkpoint counts: what is written beside the training."""

    def __post_init__(self) -> None:
        for name in ("failure_rate", "stall", "restart", "commit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be 0 or more and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class Goodput:
    """What a simulation found: the mean over its runs and how far to trust it."""

    mean: float
    error: float
    """Standard error of the mean."""
    low: float
    high: float
    """The 5th and 95th percentile of single runs."""


def daly_interval(faults: Faults) -> float:
    """Seconds of work between checkpoints that lose least; infinite without failures.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), eq. 37;
    its first term is J. W. Young's sqrt(2 stall MTBF) (CACM 17, 1974). A stall of more than twice the MTBF has no such
    optimum; there the interval is the MTBF.
    """
    if not faults.failure_rate:
        return math.inf
    mtbf, stall = 1 / faults.failure_rate, faults.stall
    if stall >= 2 * mtbf:
        return mtbf
    root = math.sqrt(stall / (2 * mtbf))
    return math.sqrt(2 * stall * mtbf) * (1 + root / 3 + root**2 / 9) - stall


def young_interval(faults: Faults) -> float:
    """sqrt(2 stall MTBF), the first-order answer."""
    return math.sqrt(2 * faults.stall / faults.failure_rate) if faults.failure_rate else math.inf


def exact_goodput(interval: float, faults: Faults) -> float:
    """Expected goodput of an endless run with `interval` seconds of work between checkpoints (that count at once).

    A segment of length s = interval + stall is tried until no failure falls into it, each try after the first behind
    a restart that is itself tried until none falls into it. With rate r its expected time is
    (exp(r s) - 1) (1 / r + E[restart]), E[restart] = (exp(r R) - 1) / r, which is (exp(r s) - 1) exp(r R) / r
    (Daly 2006, eq. 20). Goodput is interval / that, by the renewal-reward theorem.
    """
    rate, segment = faults.failure_rate, interval + faults.stall
    if not rate:
        return interval / segment
    exponent = rate * (segment + faults.restart)
    if exponent > 700:  # exp would overflow; nothing is ever finished
        return 0.0
    return interval * rate / (math.expm1(rate * segment) * math.exp(rate * faults.restart))


def simulate(interval: float, faults: Faults, seconds: float, runs: int = 200, seed: int = 0) -> Goodput:
    """Goodput of `runs` runs of `seconds` of wall time each, by drawing failures; equal seeds give equal results.

    Raises ValueError for an interval, a time or a number of runs that is not above 0 (two runs at least).
    """
    if not (interval > 0 and 0 < seconds < math.inf and runs >= 2):
        raise ValueError(
            f"interval and seconds must be above 0, and runs at least 2, got {interval}, {seconds} and {runs}"
        )
    found = sorted(one_run(interval, faults, seconds, random.Random(f"{seed}/{run}")) for run in range(runs))
    error = statistics.stdev(found) / math.sqrt(runs)
    return Goodput(statistics.fmean(found), error, found[int(0.05 * (runs - 1))], found[math.ceil(0.95 * (runs - 1))])


def one_run(interval: float, faults: Faults, seconds: float, rng: random.Random) -> float:
    """Goodput of one run: whole segments between failures count, and at the end what has been done so far."""
    now = kept = 0.0
    segment = interval + faults.stall
    while now < seconds:
        failure = now + (rng.expovariate(faults.failure_rate) if faults.failure_rate else math.inf)
        if failure >= seconds:  # nothing is lost at the end: a planned stop saves
            whole, rest = divmod(seconds - now, segment)
            return (kept + whole * interval + min(rest, interval)) / seconds
        kept += interval * max(0, math.floor((failure - now - faults.commit) / segment))
        now = failure + faults.restart
        while faults.failure_rate and (gap := rng.expovariate(faults.failure_rate)) < faults.restart:
            now += gap  # a failure within the restart begins it again
            if now >= seconds:
                break
    return kept / seconds


def best_interval(faults: Faults, longest: float) -> float:
    """The interval of largest expected goodput, at most `longest` seconds, by golden-section search.

    The expectation has one maximum; where a checkpoint counts only after `commit` seconds, a failure loses these, too,
    which shifts no optimum to first order.
    """
    if not faults.failure_rate:
        return longest
    if not faults.stall:
        return min(longest, max(faults.commit, 1.0))
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(1e-3 * min(daly_interval(faults), longest)), math.log(longest)
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if exact_goodput(math.exp(left), faults) < exact_goodput(math.exp(right), faults):
            low = left
        else:
            high = right
    return max(math.exp((low + high) / 2), faults.commit)


@dataclass(frozen=True)
class Scale:
    """One row of the table: what to expect on so many nodes."""

    nodes: int
    interval: float
    """Recommended seconds of work between checkpoints."""
    young: float
    goodput: Goodput
    """Share of the time that is training, all counted."""
    input_share: float
    """Share of the speed that the storage allows: 1 where it feeds all nodes."""


@dataclass(frozen=True)
class Cluster:
    """What decides goodput beside the number of nodes."""

    node_mtbf: float
    """Seconds between failures of one node."""
    checkpoint: float
    """Bytes of one checkpoint, which the nodes copy and write together."""
    copy_per_node: float
    """Bytes/s from the memory of a node's GPUs to the host's."""
    write_per_node: float
    """Bytes/s to storage."""
    restart: float
    """Seconds, without loading."""
    bytes_per_node: float
    """Bytes/s that a node must read to train at full speed."""
    read_per_node: float | None = None
    """Bytes/s from storage to one node; None: unknown, taken as enough."""
    storage: float | None = None
    """Bytes/s of the storage for all nodes together; None: unknown, taken as enough."""

    asynchronous: bool = True
    """Writing goes on beside the training."""

    def faults(self, nodes: int) -> Faults:
        """Of a run on so many nodes: one whole checkpoint is copied and written by all, and read by every node.

        The copy is counted in full, which is an upper bound: it overlaps with the next forward and backward pass.
        """
        total = self.storage or math.inf
        copy = max(self.checkpoint / (nodes * self.copy_per_node), LEAST_STALL)
        write = self.checkpoint / min(nodes * self.write_per_node, total)
        load = self.checkpoint / min(self.read_per_node or self.write_per_node, total / nodes)
        stall, commit = (copy, write) if self.asynchronous else (copy + write, 0.0)
        return Faults(nodes / self.node_mtbf, stall, self.restart + load, commit)

    def input_share(self, nodes: int) -> float:
        """Share of the needed shard bandwidth that a node gets, at most 1."""
        given = min(self.read_per_node or math.inf, (self.storage or math.inf) / nodes)
        return min(1.0, given / self.bytes_per_node) if self.bytes_per_node else 1.0


def at_scale(
    cluster: Cluster, seconds: float, nodes: Sequence[int] = NODES, runs: int = 200, seed: int = 0
) -> list[Scale]:
    """The recommended interval and the goodput for each number of nodes, in runs of `seconds`."""
    rows = []
    for count in nodes:
        faults = cluster.faults(count)
        interval = best_interval(faults, seconds)
        found = simulate(interval, faults, seconds, runs, seed)
        share = cluster.input_share(count)
        scaled = {name: share * getattr(found, name) for name in ("mean", "error", "low", "high")}
        rows.append(Scale(count, interval, young_interval(faults), replace(found, **scaled), share))
    return rows
