"""What every engine does: accumulate, clip, step; say its state; lend the averaged weights to an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dgt.training.ema import Ema
from dgt.training.garbage import collect_after
from dgt.training.optim import (
    OptimizerConfig,
    adopt_numbers,
    build_optimizer,
    make_state,
    set_learning_rate,
    state_pieces,
)
from dgt.training.parallel.config import EngineConfig
from dgt.training.parallel.precision import LossScale
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
    """Not taken because the loss scale was too large for float16, and has been lowered: to be tried again."""
    loss_scale: float | None = None
    """The factor on the loss that the gradient was computed with; None where there is none."""


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
        self.attempts = 0
        self.loss_scale = LossScale(config.loss_scale) if config.precision == "fp16" else None
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

    def publish(self) -> None:
        """Lets the network compute with what has been written into `weights`, where these are copies of its own."""

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
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        for i, micro_batch in enumerate(micro_batches):
            with self.accumulating(last=i == len(micro_batches) - 1):
                with self.arithmetic():
                    loss = loss_of(self.model, micro_batch)
                # Engines average gradients over ranks; shares must be summed.
                self.backward(loss * self.world.size)
            total += loss.detach()
        if self.world.size > 1:
            dist.all_reduce(total)
        scale = self.loss_scale.value if self.loss_scale else None
        self.attempts += 1
        collect_after(self.attempts, self.config.collect_garbage_every)
        result = self.update(float(total), accept)
        if not result.taken:  # running statistics have seen the batch
            for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(before)
        return replace(result, loss_scale=scale)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch, times the loss scale, to what there is."""
        (loss * self.loss_scale.value if self.loss_scale else loss).backward()

    def update(self, loss: float, accept: Accept) -> StepResult:
        """Ends a step whose gradients have met and whose mean loss is `loss`: clips, asks, updates."""
        grad_norm = float(self.clipped_norm())
        taken, rescaled = self.verdict(loss, grad_norm, accept)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, taken, rescaled)

    def verdict(self, loss: float, grad_norm: float, accept: Accept) -> tuple[bool, bool]:
        """Whether a step is to be taken, and whether the loss scale was lowered because it is not."""
        scale = self.loss_scale
        if scale and math.isfinite(loss) and not math.isfinite(grad_norm) and scale.lower():
            return False, True
        taken = accept(loss, grad_norm)
        if scale:
            scale.note_good() if taken else scale.note_bad()
        return taken, False

    def clipped_norm(self) -> Tensor:
        """Takes the loss scale out of the gradient, clips it, and returns its norm before, the same on every rank."""
        if self.loss_scale:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
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
        self.publish()
        try:
            yield
        finally:
            self.reshard()
            with torch.no_grad():
                torch._foreach_copy_(weights, own)
            self.publish()

    def weights(self) -> Pieces:
        """The float32 weights that the optimizer updates, by parameter name; they share memory with it."""
        rank, size = self.world.rank, self.world.size
        return {name: piece_of(p, rank, size) for name, p in self.network.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of the gradients that the optimizer reads, by parameter name, while `accept` is asked."""
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        return {name: g.to_local() if isinstance(g, DTensor) else g for name, g in found.items()}

    def moments(self) -> Pieces:
        """The optimizer's state by parameter name."""
        return state_pieces(self.network, self.optimizer, self.world.rank, self.world.size)

    def state(self) -> Pieces:
        """All tensors that decide the next step: `model.` weights and buffers, `optimizer.` moments, `precision.`

        The names are those of the network's parameters, the same under every engine. The pieces share memory with
        what they describe: loading into them, followed by `adopt`, restores the state.
        """
        self.reshard()
        rank, size = self.world.rank, self.world.size
        buffers = {name: piece_of(b, rank, size) for name, b in self.network.named_buffers()}
        scale = self.loss_scale.pieces(rank, size) if self.loss_scale else {}
        parts = {"model": self.weights() | buffers, "optimizer": self.moments(), "precision": scale}
        return {f"{part}.{name}": piece for part, pieces in parts.items() for name, piece in pieces.items()}

    def adopt(self, state: Pieces) -> None:
        """Follows up on a load into what `state` gave: takes over what does not share memory with it."""
        moments = {n.removeprefix("optimizer."): p for n, p in state.items() if n.startswith("optimizer.")}
        self.adopt_numbers(moments)
        self.publish()

    def adopt_numbers(self, moments: Pieces) -> None:
        """Takes those of the optimizer's loaded `moments` over that are plain numbers."""
        adopt_numbers(self.network, self.optimizer, moments)
