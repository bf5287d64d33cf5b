"""DeepSpeed's ZeRO: each rank holds a part of the optimizer's state (1), also of the gradients (2), of the weights (3).

DeepSpeed owns reduction, clipping and the partitions. Ours are the optimizer that it steps, the learning rate, the
loss scale, and the verdict on each step, which is given inside of DeepSpeed's own test of the gradient norm: after the
reduction and before anything changes.

The network stays in float32 and computes in 16 bits through autocast, exactly as under ddp. DeepSpeed's own
16-bit mode keeps a second set of weights, rounds norms and sums of branches, and changes to another kind of optimizer,
with another kind of state, at stage 1.

None of DeepSpeed's checkpoint files are written: they are pickles, which run code when they are read, and know one
number of ranks and one stage. The state is read out of the flat partitions in place instead, by parameter name, so that
a checkpoint is the same files under every engine.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.config_file import merged
from dgt.models import DGTBlock
from dgt.training.optim import OptimizerConfig, make_state
from dgt.training.parallel.config import DeepSpeedConfig, EngineConfig
from dgt.training.parallel.engine import Accept, Engine, StepResult
from dgt.training.parallel.precision import HALF
from dgt.training.pieces import Piece, Pieces
from dgt.training.world import World


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` around the network, with our optimizer over its flat partitions."""

    def __init__(self, network: nn.Module, world: World, config: EngineConfig, optimizer: OptimizerConfig):
        deepspeed = imported()
        network.to(world.device)
        super().__init__(network, world, config, optimizer)
        self.optimizer.state.clear()  # of whole parameters; below it is made for the partitions
        self.names: dict[Any, str] = {p: name for name, p in network.named_parameters()}
        self.shapes = {name: tuple(p.shape) for p, name in self.names.items()}
        self.groups = {self.names[p]: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self.frozen = {name: p for p, name in self.names.items() if not p.requires_grad}
        if half := HALF.get(config.precision):
            network.forward = torch.autocast(world.device.type, half)(network.forward)
        if config.deepspeed.stage == 3:
            # The block is the unit of sharding here, too; hooks inside would break up a compiled block.
            deepspeed.utils.set_z3_leaf_modules(network, [DGTBlock], raise_if_not_found=False)
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        settings = settings_of(config.deepspeed, self.clip, elements)
        self.deepspeed = deepspeed.initialize(model=network, optimizer=self.optimizer, config=settings)[0]
        self.model = self.deepspeed
        self.partitions: Partitions = (Partitions3 if config.deepspeed.stage == 3 else Partitions)(self)
        self.partitions.make_state()

    def accumulating(self, last: bool) -> Any:
        """Tells DeepSpeed which backward pass ends the step."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return super().accumulating(last)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch; DeepSpeed multiplies by the loss scale."""
        if self.loss_scale:
            self.partitions.zero.override_loss_scale(self.loss_scale.value)
        self.deepspeed.backward(loss)

    def update(self, loss: float, accept: Accept) -> StepResult:
        """Lets DeepSpeed take its step, with our verdict in place of its test for overflow."""
        result = StepResult(loss, math.nan, False)

        def judge(scaled_norm: Tensor) -> bool:
            nonlocal result
            # DeepSpeed gives an infinite or negative number for any norm that is not finite.
            norm = float(scaled_norm) / (self.loss_scale.value if self.loss_scale else 1.0)
            norm = norm if norm >= 0 and math.isfinite(norm) else math.nan
            result = StepResult(loss, norm, *self.verdict(loss, norm, accept))
            return result.taken

        self.partitions.judge = judge
        self.deepspeed.step()
        return result

    def publish(self) -> None:
        """Copies the master weights of all ranks into what the network computes with."""
        self.partitions.publish()

    def weights(self) -> Pieces:
        """The master weights in the flat partitions; frozen weights have none, and are what the network holds."""
        frozen = {name: self.partitions.frozen(name, p) for name, p in self.frozen.items()}
        mastered = {
            name: Piece(flat.detach()[begin:end], self.shapes[name], start)
            for name, flat, begin, end, start in self.partitions.places()
        }
        return {name: (frozen | mastered)[name] for name in self.shapes}

    def gradients(self) -> dict[str, Tensor]:
        """None: ZeRO keeps them in buffers of its own."""
        return {}

    def moments(self) -> Pieces:
        """The optimizer's state, cut as the weights are; what a partition has once goes by every parameter's name."""
        rank, size = self.world.rank, self.world.size
        pieces: Pieces = {}
        for name, flat, begin, end, start in self.partitions.places():
            for key, value in self.optimizer.state[flat].items():
                if isinstance(value, bool):
                    continue  # how a parameter is treated, not what became of it
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    pieces[f"{name}.{key}"] = Piece(value[begin:end], self.shapes[name], start)
                else:
                    number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    pieces[f"{name}.{key}"] = Piece(number, (), 0, rank, size)
        for i, group in enumerate(self.optimizer.param_groups):
            if "step" in group:
                number = torch.tensor(group["step"], dtype=torch.float64)
                pieces[f"groups.{i}.step"] = Piece(number, (), 0, rank, size)
        return pieces

    def adopt_numbers(self, moments: Pieces) -> None:
        """Takes those of the optimizer's loaded `moments` over that are plain numbers."""
        for name, flat, *_ in self.partitions.places():
            for key, value in self.optimizer.state[flat].items():
                if not isinstance(value, Tensor | bool):
                    self.optimizer.state[flat][key] = type(value)(moments[f"{name}.{key}"].local.item())
        for i, group in enumerate(self.optimizer.param_groups):
            if "step" in group:
                group["step"] = type(group["step"])(moments[f"groups.{i}.step"].local.item())


class Partitions:
    """Where ZeRO 1 and 2 keep what is this rank's: one flat float32 tensor per parameter group."""

    def __init__(self, engine: DeepSpeedEngine):
        self.engine = engine
        self.zero = engine.deepspeed.optimizer
        self.judge: Any = None
        """Asked by DeepSpeed's step with the (scaled) gradient norm over all ranks; False = change nothing."""
        self.interpose()

    def interpose(self) -> None:
        """Lets `judge` decide where DeepSpeed looks whether the gradient norm is valid."""
        norm_of = self.zero.scaled_global_norm

        def judged() -> Tensor:
            norm = norm_of()
            return norm if self.judge(norm) else torch.full_like(norm, -1.0)

        self.zero.scaled_global_norm = judged

    @property
    def flat(self) -> list[Tensor]:
        """This rank's flat master weights."""
        return self.zero.single_partition_of_fp32_groups

    def places(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """For each parameter that is trained: name, flat tensor, range in it, and the range's start in the parameter.

        The range is empty where none of the parameter is this rank's.
        """
        for parameter, name in self.engine.names.items():
            if name in self.engine.frozen:
                continue
            flat, mapping = self.flat[self.engine.groups[name]], parameter._hp_mapping
            if mapping is None:
                yield name, flat, 0, 0, 0
            else:
                inside, own = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, flat, inside.start, inside.start + inside.numel, own.start

    def frozen(self, name: str, parameter: nn.Parameter) -> Piece:
        """This rank's piece of a parameter that is not trained: all of it."""
        world = self.engine.world
        return Piece(parameter.detach(), self.engine.shapes[name], 0, world.rank, world.size)

    def make_state(self) -> None:
        """Makes the optimizer's state for the flat tensors, as DeepSpeed's first step would."""
        gradients = [flat.grad for flat in self.flat]
        make_state(self.engine.optimizer)
        for flat, gradient in zip(self.flat, gradients, strict=True):
            flat.grad = gradient  # under offload DeepSpeed copies gradients into these

    def publish(self) -> None:
        """Copies the master weights of all ranks into the network's."""
        self.zero.update_lp_params()


class Partitions3(Partitions):
    """Where ZeRO 3 keeps what is this rank's: the same share of each parameter, in flat tensors of many of them."""

    def interpose(self) -> None:
        """The same, where stage 3 asks for its norms group by group."""
        norms_of = self.zero._get_norm_groups

        def judged() -> list[Tensor]:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norms = norms_of()
            return norms if self.judge(combine_grad_norm_groups(norms)) else [torch.tensor(-1.0)]

        self.zero._get_norm_groups = judged

    @property
    def flat(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def places(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        for parameter, name in self.engine.names.items():
            if name in self.engine.frozen:
                continue
            group, begin, share = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start, stop = self.range(name, share)
            yield name, self.flat[group], begin, begin + stop - start, start

    def range(self, name: str, share: int) -> tuple[int, int]:
        """The elements of a parameter that are this rank's, of the `share` per rank; the last ones may be padding."""
        first, total = self.engine.world.rank * share, math.prod(self.engine.shapes[name])
        return min(first, total), min(first + share, total)

    def frozen(self, name: str, parameter: nn.Parameter) -> Piece:
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        start, stop = self.range(name, part.numel())
        return Piece(part.detach()[: stop - start], self.engine.shapes[name], start)

    def make_state(self) -> None:
        self.zero._set_fp32_optimizer_param_groups()
        super().make_state()
        self.zero._clear_fp32_optimizer_param_groups()

    def publish(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if kept := zero.persistent_parameters:
            kept[0].all_gather(kept)


def imported() -> Any:
    """The package, told of the device and quiet."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists; a run that was started without a launcher is one rank
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the loop itself reports steps that are not taken
    # Collectives of its own for CPUs, for inference alone; it would compile them here and now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It keeps groups of ranks for the whole process; an earlier run in it has left those that they were made of.
    deepspeed.utils.groups._release_process_group_references(group=None)
    return deepspeed


def settings_of(config: DeepSpeedConfig, clip: float, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration from ours, for a network of that many `elements`."""
    zero: dict[str, Any] = {
        "stage": config.stage,
        # As large as the network: it does not pay to cut the traffic of one that is small beside its activations.
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements + elements % 2,
        # It adds a linear layer's bias in place to the product, which selective checkpointing has saved by then: the
        # recomputation would add it a second time.
        "memory_efficient_linear": False,
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # the loop cuts the batches itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return merged(settings, config.settings)
