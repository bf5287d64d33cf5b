"""How much memory a rank will need, and how large a checkpoint is: found out without a GPU and without weights.

A whole optimizer step runs in the engine that will run it, with tensors that have shapes and types but no numbers, in a
world whose other ranks do not exist. Every storage is counted from its birth to its death.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dgt.tasks import ClassificationConfig, DetectionConfig, Inputs
from launch.runs import LaunchError
from launch.traffic import image_size

if TYPE_CHECKING:
    from dgt.config import Config
    from dgt.training.parallel import Engine

FLOAT32 = 4
"""Bytes of a number."""

MOMENTS = {"sgd": 1, "lars": 1, "lion": 1, "adan": 4}
"""Tensors of the size of the weights that an optimizer keeps; two unless named here."""


ON_HOST = frozenset({"weights", "gradients", "moments", "average", "host"})
"""Kinds that lie in host memory where fsdp offloads."""


class UnplannedError(LaunchError):
    """The memory of a step depends on numbers, which are not there."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the moment of a step at which it holds most."""

    weights: int
    """Those that the optimizer updates, and copies of another type."""
    gradients: int
    moments: int
    """What the optimizer keeps."""
    average: int
    """EMA."""
    buffers: int
    """The engine's: weights and gradients that are whole for a while (fsdp, ZeRO), and buckets."""
    activations: int
    """What operations have made and somebody still needs: activations, their gradients, casts, temporary results."""
    inputs: int
    """One rank's share of a batch as it comes from the host."""
    teacher: int
    """Weights of the network that is learned from; what it makes of images counts as activations."""
    host: int
    """In host memory, by offloading, and in none of the others."""

    @property
    def total(self) -> int:
        """The sum on the device, without what the allocator, NCCL and the CUDA context add (1 to 2 GB, as a rule)."""
        return sum(vars(self).values()) - self.host


def parameters(network: nn.Module, only_trained: bool = False) -> int:
    """Number of weights, or of those that are not frozen."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not only_trained)


def checkpoint_bytes(config: Config, network: nn.Module) -> int:
    """Size of one checkpoint, float32: weights, the optimizer's moments, the average; a manifest of kilobytes besides.

    Frozen weights have no moments. Muon keeps one moment of the matrices and two of the rest; it is counted as two.
    """
    moments = MOMENTS.get(config.optimizer.name, 2) * parameters(network, only_trained=True)
    return FLOAT32 * ((1 + config.ema.enabled) * parameters(network) + moments)


def state_bytes(config: Config, network: nn.Module) -> int:
    """Size of weights, gradients, the optimizer's moments and the average, float32 and uncut."""
    return checkpoint_bytes(config, network) + FLOAT32 * parameters(network, only_trained=True)


def estimate(config: Config, network: nn.Module, ranks: int) -> Memory:
    """The estimate for one rank of `ranks`.

    ddp and fsdp are run; ddp's buckets, which hold all gradients all the time, and what ZeRO cuts are computed from
    the number of weights (Rajbhandari et al., arXiv 1910.02054, section 5).

    Raises UnplannedError for detection.
    """
    if isinstance(config.task, DetectionConfig):
        raise UnplannedError(
            "the memory of a detection step is not planned: how many regions it learns from depends on numbers; "
            "launch/find_micro_batch.py tries it out, and benchmarks/dense_memory.py measures it"
        )
    name = config.engine.name
    if name == "fsdp":
        return of_peak(simulate(config, ranks))
    if ranks == 1 and name == "ddp":
        return of_peak(simulate(config, 1))
    apart = of_peak(simulate(config, ranks, gradients_apart=True))
    if name == "ddp":
        return dataclasses.replace(apart, gradients=FLOAT32 * parameters(network, only_trained=True))
    return zero(config, network, ranks, apart)


def zero(config: Config, network: nn.Module, ranks: int, apart: Memory) -> Memory:
    """DeepSpeed's ZeRO: `apart` is the same step in ddp without its gradients. Not measured, unlike the others.

    Stages 1 to 3 cut the optimizer's state, the gradients, the weights. Master weights in float32 are a copy.
    Stage 3 holds two blocks whole at a time, the one at work and the one fetched ahead.
    """
    options, trained = config.engine.deepspeed, parameters(network, only_trained=True)
    whole, once, part = (FLOAT32 * count for count in (parameters(network), trained, -(-trained // ranks)))
    held = -(-whole // ranks) if options.stage == 3 else whole
    frozen = (held - part) if options.stage == 3 else (whole - once)
    host = options.offload == "cpu"
    bucket = int(options.settings.get("zero_optimization", {}).get("reduce_bucket_size", trained))
    return dataclasses.replace(
        apart,
        weights=held + (0 if host else part),
        gradients=once if options.stage == 1 else 0 if host else part,
        moments=0 if host else MOMENTS.get(config.optimizer.name, 2) * part,
        average=(frozen + (0 if host else part)) if config.ema.enabled else 0,
        host=(2 + MOMENTS.get(config.optimizer.name, 2) + config.ema.enabled) * part if host else 0,
        buffers=FLOAT32 * min(bucket, trained) + (2 * FLOAT32 * largest_block(network) if options.stage == 3 else 0),
    )


def largest_block(network: nn.Module) -> int:
    """Weights of the largest part that is gathered at once."""
    from dgt.training.parallel.blocks import units

    parts = [parameters(module) for module in units(network)]
    return max([*parts, parameters(network) - sum(parts)])


def of_peak(peak: Counter[str]) -> Memory:
    """The parts of a ledger's peak."""
    return Memory(**{field.name: peak[field.name] for field in dataclasses.fields(Memory)})


def simulate(config: Config, ranks: int, gradients_apart: bool = False) -> Counter[str]:
    """Bytes by kind at the peak of a step of rank 0 of `ranks`, on shapes without numbers, with the CPU's operations.

    `gradients_apart`: leave gradients out, from the moment that they are accumulated.
    """
    from dgt.tasks import build_task
    from dgt.training.ema import Ema
    from dgt.training.parallel import build_engine
    from dgt.training.world import World
    from launch.weights import without_start

    plain = without_start(config)
    sharded = plain.engine.name == "fsdp"
    offload = sharded and plain.engine.fsdp.cpu_offload
    options = dataclasses.replace(plain.engine, name="fsdp" if sharded else "ddp", compile=False, apex_layer_norm=False)
    options = dataclasses.replace(options, fsdp=dataclasses.replace(options.fsdp, cpu_offload=False))
    # apex's optimizers need a GPU, and keep the same state as those of the plain name.
    optimizer = dataclasses.replace(plain.optimizer, name=plain.optimizer.name.removeprefix("fused_"))  # type: ignore[arg-type]
    size = ranks if sharded else 1
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    ledger = Ledger(ON_HOST if offload else frozenset())
    try:
        with (
            imaginary_ranks(size) if sharded else nullcontext(),
            FakeTensorMode(),
            torch.random.fork_rng(devices=[]),
            ledger,
            resizes(ledger),
        ):
            ledger.kind = "weights"
            task: Any = build_task(plain.task, plain.model, plain.data)
            network = task.build_model()
            network.to = lambda *_, **__: network  # parameters without numbers cannot be
            world = World(0, size, torch.device("cpu"), None)  # type: ignore[arg-type]  # nobody to agree with
            ledger.kind = "moments"
            engine = build_engine(network, world, options, optimizer)
            for parameter in network.parameters():
                ledger.call(parameter, "weights")
            ledger.kind = "average"
            average = Ema(engine.weights(), plain.ema) if plain.ema.enabled else None
            for parameter in (p for p in network.parameters() if p.requires_grad):
                hook = ledger.forget_gradient if gradients_apart else ledger.note_gradient
                parameter.register_post_accumulate_grad_hook(hook)
            if isinstance(plain.task, ClassificationConfig) and plain.task.distillation.teacher:
                ledger.kind = "teacher"
                teacher = unread_teacher(plain.task.distillation.teacher, plain.data.num_classes)
                task.teacher.on = lambda device: teacher
            steps(plain, task, engine, ledger, plain.steps.share(ranks))
            if average is not None:
                average.update(0)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    peak = ledger.parts_at_peak.copy()
    peak.update({kind: -peak[kind] for kind in ledger.elsewhere})
    peak["host"] = ledger.peak_elsewhere
    return peak


def unread_teacher(name: str, num_classes: int) -> nn.Module:
    """The teacher `name` without its checkpoint. Raises ConfigError for a name that timm does not know."""
    import timm

    from dgt.config import ConfigError

    try:
        with _disable_current_modes():  # some networks compute their sizes, which takes numbers
            network = timm.create_model(name, num_classes=num_classes)
    except RuntimeError as error:
        raise ConfigError(f"task.distillation.teacher: {error}") from None
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network.eval().requires_grad_(False)


def steps(config: Config, task: Any, engine: Engine, ledger: Ledger, share: int) -> None:
    """One optimizer step over `share` samples; the ledger's peak is counted from its beginning."""
    (height, width), micro = image_size(config), min(config.steps.micro_batch_size, share)
    ledger.kind = "inputs"
    pixels = torch.zeros(share, height, width, 3, dtype=torch.uint8)
    ledger.kind = "activations"

    def loss_of(model: nn.Module, part: slice) -> Tensor:
        images = pixels[part].float().permute(0, 3, 1, 2)  # normalised in place
        labels = torch.zeros(len(images), dtype=torch.int64)
        if task.kind == "segmentation":
            mask = np.zeros((height, width), np.uint8)
            sizes, masks = [(height, width)] * len(images), [mask] * len(images)
            return task.loss(model, Inputs(images, labels, labels, sizes=sizes, targets=masks))
        if not config.mixing.enabled:
            return task.loss(model, Inputs(images, labels, labels))
        mixed = images + images  # images and their partners make images of the same size
        return task.loss(model, Inputs(mixed, labels, labels, labels, torch.zeros(len(images))))

    def accept(loss: float, norm: float) -> bool:
        for parameter in engine.network.parameters():
            if parameter.grad is not None:
                ledger.call(parameter.grad, "gradients")
        if ledger.elsewhere:
            ledger.kind = "host"  # the update is computed there
        return True

    # Two micro-batches behave as all of them do: the first finds no gradients, the others do; the last may be smaller.
    parts = [slice(i, i + micro) for i in range(0, share, micro)]
    ledger.begin()
    engine.train_step(parts[:2] if len(parts) > 1 else parts, loss_of, 1.0, accept)


@contextmanager
def imaginary_ranks(size: int) -> Iterator[None]:
    """A world of `size` ranks of which only rank 0 exists; what the others send has shapes, but no numbers."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401  (collectives of tensors without numbers)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dgt.training.parallel import fsdp

    real = fsdp.init_device_mesh

    def mesh(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # who is where are numbers
            return real(*args, **kwargs)

    if dist.is_initialized():
        raise RuntimeError("memory cannot be estimated in a process that has joined other ranks")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with mock.patch.object(fsdp, "init_device_mesh", mesh):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def resizes(ledger: Ledger) -> Iterator[None]:
    """Tells the ledger of storages whose size changes while they live, as FSDP's do; no operation is seen of it."""
    real = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = real(storage, size)
        ledger.resized(storage)
        return result

    with mock.patch.object(torch.UntypedStorage, "resize_", resize):
        yield


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live, by what they are for."""

    def __init__(self, elsewhere: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.elsewhere = elsewhere
        """Kinds that lie in another memory, whose peak is its own."""
        self.held = self.peak = self.held_elsewhere = self.peak_elsewhere = 0
        self.kind = "activations"
        """What storages that come are for."""
        self.alive: dict[int, tuple[int, str]] = {}
        self.parts: Counter[str] = Counter()
        self.parts_at_peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # what is read where there are no numbers
        results = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = {key_of(t) for t in given}
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and key_of(tensor) not in before:
                self.count(tensor)
        if func.namespace == "c10d" and self.kind == "activations":
            for tensor in given:
                self.call(tensor, "buffers", only="activations")
        return results

    def begin(self) -> None:
        """Forgets the peak so far, of the device."""
        self.peak, self.parts_at_peak = self.held, self.parts.copy()

    def add(self, size: int, kind: str) -> None:
        """Counts bytes of a kind, or strikes them out."""
        self.parts[kind] += size
        if kind in self.elsewhere:
            self.held_elsewhere += size
            self.peak_elsewhere = max(self.peak_elsewhere, self.held_elsewhere)
        else:
            self.held += size

    def count(self, tensor: Tensor) -> None:
        """Enters the tensor's storage, until it dies."""
        storage = storage_of(tensor)
        key = storage._cdata
        if key not in self.alive:
            self.enter(key, storage.nbytes(), self.kind)
            weakref.finalize(storage, self.drop, key)

    def enter(self, key: int, size: int, kind: str) -> None:
        """Adds a storage, and looks whether there has ever been as much."""
        self.alive[key] = (size, kind)
        self.add(size, kind)
        if self.held > self.peak:
            self.begin()

    def drop(self, key: int) -> None:
        """Strikes a storage out."""
        size, kind = self.alive.pop(key, (0, self.kind))
        self.add(-size, kind)

    def call(self, tensor: Tensor, kind: str, only: str | None = None) -> None:
        """Says what a storage is for, in place of what was thought (if that was `only`)."""
        key = key_of(tensor)
        size, before = self.alive.get(key, (0, kind))
        if before != kind and only in (None, before):
            self.alive[key] = (size, kind)
            self.add(-size, before)
            self.add(size, kind)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Enters a new size."""
        if storage._cdata in self.alive:
            self.drop(storage._cdata)
            self.enter(storage._cdata, storage.nbytes(), "buffers")

    def note_gradient(self, parameter: Tensor) -> None:
        """A gradient has been accumulated."""
        if parameter.grad is not None:
            self.call(parameter.grad, "gradients")

    def forget_gradient(self, parameter: Tensor) -> None:
        """Gradients are entered elsewhere."""
        if parameter.grad is not None:
            self.drop(key_of(parameter.grad))


def key_of(tensor: Tensor) -> int:
    """Identifies a tensor's storage while it lives; of a sharded tensor, that of its part here."""
    return storage_of(tensor)._cdata


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The storage of a tensor, of a sharded one that of its part here."""
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()
