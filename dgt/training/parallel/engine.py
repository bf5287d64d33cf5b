"""What every engine does: accumulate, clip, step; say its state; lend the averaged weights to an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dgt.training.ema import Ema
from dgt.training.optim import (
    OptimizerConfig,
    adopt_numbers,
    build_optimizer,
    make_state,
    set_learning_rate,
    state_pieces,
)
from dgt.training.parallel.config import EngineConfig
from dgt.training.pieces import Pieces, locals_of, piece_of
from dgt.training.world import World

MicroBatch = TypeVar("MicroBatch")
Accept = Callable[[float, float], bool]
"""Whether a step with this loss and gradient norm, both over all ranks, shall be taken; the same on every rank."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """Mean loss of the global batch, before the step."""
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    taken: bool
    """Weights and moments were updated; else nothing was changed."""
    rescaled: bool = False
    """Not taken because the loss scale was too large for float16, and has been lowered: no fault of the data."""


class Engine:
    """One network, its optimizer, and how ranks share the work; subclasses say how gradients meet."""

    def __init__(self, network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig):
        self.network = network
        """The network whose parameters this rank holds (whole or sharded), under its own names."""
        self.model: nn.Module = network
        """What is called in training; may wrap `network`."""
        self.world = world
        self.config = config
        self.clip = optimizer.clip_grad_norm
        self.optimizer = build_optimizer(network, optimizer)
        make_state(self.optimizer)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch's backward pass; gradients meet across ranks only in the `last` one."""
        return nullcontext()

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        return nullcontext()

    def reshard(self) -> None:
        """Brings all parameters into the layout they are kept in, so that they can be read and written in place."""

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_of: Callable[[nn.Module, MicroBatch], Tensor],
        lr: float,
        accept: Accept,
    ) -> StepResult:
        """One optimizer step over this rank's `micro_batches`, taken if `accept` agrees.

        `loss_of` gives a micro-batch's share of the global batch's mean loss (its sum over samples divided by the
        global batch size); shares add up over micro-batches and ranks. `accept` is asked once the gradient has been
        reduced over the ranks, and before anything is changed.
        """
        self.model.train()
        set_learning_rate(self.optimizer, lr)
        total = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(micro_batches):
            with self.accumulating(last=i == len(micro_batches) - 1):
                with self.arithmetic():
                    loss = loss_of(self.model, micro_batch)
                # Engines average gradients over ranks; shares must be summed.
                (loss * self.world.size).backward()
            total += loss.detach()
        grad_norm = float(self.clipped_norm())
        if self.world.size > 1:
            dist.all_reduce(total)
        mean_loss = float(total)
        taken = accept(mean_loss, grad_norm)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean_loss, grad_norm, taken)

    def clipped_norm(self) -> Tensor:
        """Clips the gradient and returns its norm before that, the same on every rank."""
        limit = self.clip if self.clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def averaged_weights(self, ema: Ema | None) -> Iterator[None]:
        """Computes with the averages instead of the weights while the context lasts."""
        if ema is None:
            yield
            return
        self.reshard()
        weights, averages = locals_of(self.weights()), locals_of(ema.averages)
        own = [w.clone() for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(weights, averages)
        try:
            yield
        finally:
            self.reshard()
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

    def weights(self) -> Pieces:
        """The float32 weights that the optimizer updates, by parameter name; they share memory with it."""
        rank, size = self.world.rank, self.world.size
        return {name: piece_of(p, rank, size) for name, p in self.network.named_parameters()}

    def state(self) -> Pieces:
        """All tensors that decide the next step: weights and buffers under `model.`, moments under `optimizer.`.

        The names are those of the network's parameters, the same under every engine. The pieces share memory with
        what they describe: loading into them, followed by `adopt`, restores the state.
        """
        self.reshard()
        rank, size = self.world.rank, self.world.size
        buffers = {name: piece_of(b, rank, size) for name, b in self.network.named_buffers()}
        moments = state_pieces(self.network, self.optimizer, rank, size)
        return {f"model.{name}": piece for name, piece in (self.weights() | buffers).items()} | {
            f"optimizer.{name}": piece for name, piece in moments.items()
        }

    def adopt(self, state: Pieces) -> None:
        """Follows up on a load into what `state` gave: takes over what does not share memory with it."""
        moments = {n.removeprefix("optimizer."): p for n, p in state.items() if n.startswith("optimizer.")}
        adopt_numbers(self.network, self.optimizer, moments)
