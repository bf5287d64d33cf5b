"""What every engine does: accumulate, clip, step; say its state; lend the averaged weights to an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from dgt.training.ema import Ema, local
from dgt.training.optim import OptimizerConfig, build_optimizer, set_learning_rate
from dgt.training.world import World

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class EngineConfig:
    """How the network is spread over the ranks and in which precision it computes."""

    name: Literal["ddp", "fsdp"] = "ddp"
    """"ddp": every rank holds the whole network; "fsdp": each holds a shard of it (FSDP2, block by block)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """"bf16": bfloat16 arithmetic, float32 weights, gradients reduced in float32; under ddp norms and sums of branches
    stay float32 (autocast), under fsdp they are bfloat16 too. "fp32": float32, with torch's default of TF32 in a GPU's
    convolutions."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block recomputes in the backward pass; the grouping is kept in any case, never recomputed."""
    threads: int = 0
    """CPU threads of one rank's arithmetic; 0 = its share of the cores that it may use."""
    deterministic: bool = False
    """On GPUs: only operations that repeat bit for bit, at some cost of speed. On CPUs all of them do anyway."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads: must not be negative, got {self.threads}")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """Mean loss of the global batch, before the step."""
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    skipped: bool
    """The gradient was not finite, so nothing was changed."""


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
        self.make_moments()

    def make_moments(self) -> None:
        """Gives every parameter its (zero) moments now, so that a state is whole even before the first update."""
        get_optimizer_state_dict(self.network, self.optimizer)  # makes missing ones by an update of nothing
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch's backward pass; gradients meet across ranks only in the `last` one."""
        return nullcontext()

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Context of a forward pass."""
        return nullcontext()

    def reshard(self) -> None:
        """Brings all parameters into the layout they are kept in, so that they can be read and written in place."""

    def train_step(
        self, micro_batches: Sequence[MicroBatch], loss_of: Callable[[nn.Module, MicroBatch], Tensor], lr: float
    ) -> StepResult:
        """One optimizer step over this rank's `micro_batches`.

        `loss_of` gives a micro-batch's share of the global batch's mean loss (its sum over samples divided by the
        global batch size); shares add up over micro-batches and ranks.
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
        norm = self.clipped_norm()
        finite = bool(norm.isfinite())
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.size > 1:
            dist.all_reduce(total)
        return StepResult(float(total), float(norm), skipped=not finite)

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
        weights, averages = local(dict(self.network.named_parameters())), local(ema.averages)
        own = [w.clone() for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(weights, averages)
        try:
            yield
        finally:
            self.reshard()
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name; tensors keep their sharding."""
        self.reshard()
        return {
            "model": dict(self.network.named_parameters()) | dict(self.network.named_buffers()),
            "optimizer": get_optimizer_state_dict(self.network, self.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state whose tensors were loaded in place into those that `state_dict` gave."""
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])
