"""How much memory a rank will need, and how large a checkpoint is: found out without a GPU and without weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from dgt.config import Config

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two."""
    average: int
    """EMA."""
    gathered: int
    """fsdp: weights and gradients that are whole for a while; ddp under bf16: autocast's copies of the weights."""
    activations: int
    """Most that the forward and backward pass of one micro-batch hold beside weights and gradients."""
    inputs: int
    """One rank's share of a batch as it comes from the host, and one micro-batch of it normalised."""

    @property
    def total(self) -> int:
        """The sum, without what the allocator, NCCL and the CUDA context add (1 to 2 GB, as a rule)."""
        return sum(vars(self).values())


def parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


def estimate(config: Config, network: nn.Module, ranks: int) -> Memory:
    """The estimate for one rank; the activations are those of a pass with shapes and types, but no numbers."""
    count, block = parameters(network), largest_block(network)
    accumulation = config.steps.accumulation(ranks)
    compute = BFLOAT16 if config.engine.precision == "bf16" else FLOAT32
    if config.engine.name == "fsdp":
        held = -(-count // ranks)
        # the block at work and the one fetched ahead, the gradient of one, and where steps accumulate, the whole sum
        gathered = 2 * block * compute + block * FLOAT32 + (count * FLOAT32 if accumulation > 1 else 0)
    else:
        held, gathered = count, count * BFLOAT16 if compute == BFLOAT16 else 0
    share, side = config.steps.share(ranks), config.data.largest_image_size
    micro = min(config.steps.micro_batch_size, share)
    return Memory(
        weights=held * FLOAT32,
        gradients=held * FLOAT32,
        moments=2 * held * FLOAT32,
        average=held * FLOAT32 if config.ema.enabled else 0,
        gathered=gathered,
        activations=activations(config, micro),
        inputs=3 * side * side * (share + micro * FLOAT32),
    )


def largest_block(network: nn.Module) -> int:
    """Weights of the largest part that fsdp gathers at once."""
    from dgt.models import DGTBlock

    blocks = [parameters(module) for module in network.modules() if isinstance(module, DGTBlock)]
    return max([*blocks, parameters(network) - sum(blocks)])


def checkpoint_bytes(config: Config, network: nn.Module) -> int:
    """Size of one checkpoint: weights, two moments, the average."""
    copies = 4 if config.ema.enabled else 3
    return copies * FLOAT32 * parameters(network)


def activations(config: Config, micro_batch_size: int) -> int:
    """Peak bytes of one micro-batch's forward and backward pass beside weights and gradients.

    The pass runs on fake tensors: every operation gives shapes and types, storages are counted from birth to death.
    The operations are those of the CPU, so a fused GPU kernel may need less.
    """
    from dgt.tasks import build_task
    from dgt.tasks.task import Inputs
    from launch.weights import without_start

    plain = without_start(config)
    task = build_task(plain.task, plain.model, plain.data)
    side = config.data.largest_image_size
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        network = task.build_model()
        if config.engine.activation_checkpointing != "none":
            network.set_grad_checkpointing(True, mode=config.engine.activation_checkpointing)  # type: ignore[operator]
        n = micro_batch_size
        labels, keys = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        mixed = (labels, torch.zeros(n)) if config.mixing.enabled else (None, None)
        images = torch.zeros(n, 3, side, side).to(memory_format=torch.channels_last)
        ledger = Ledger()
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(ledger.forget_gradient)
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16"):
                loss = task.loss(network.train(), Inputs(images, labels, keys, *mixed))
            loss.backward()
    return ledger.peak


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        before = {key_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and key_of(tensor) not in before:
                self.count(tensor)
        return results

    def count(self, tensor: Tensor) -> None:
        """Enters the tensor's storage, until it dies."""
        storage, key = tensor.untyped_storage(), key_of(tensor)
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        """Strikes a storage out."""
        self.held -= self.alive.pop(key, 0)

    def forget_gradient(self, parameter: Tensor) -> None:
        """Gradients are entered elsewhere."""
        if parameter.grad is not None:
            self.drop(key_of(parameter.grad))


def key_of(tensor: Tensor) -> int:
    """Identifies a tensor's storage while it lives."""
    return tensor.untyped_storage()._cdata
