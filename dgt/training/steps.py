"""How long a run is and how its batches are cut: epochs, optimizer steps, micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepsConfig:
    """Length of the run and sizes of its batches."""

    epochs: int = 300
    """Passes over the training samples."""
    total_steps: int = 0
    """The run's length in optimizer steps; above 0 it takes the place of `epochs`."""
    global_batch_size: int = 1024
    """Samples of one optimizer step, over all ranks; does not change with the number of GPUs."""
    micro_batch_size: int = 128
    """Samples of one forward and backward pass on one rank; gradients accumulate up to the rank's share."""
    max_steps: int = 0
    """Stop after this many optimizer steps, before the epochs are over; 0 = never. The schedule keeps its length."""
    evaluate_every_epochs: int = 1
    """Evaluate after every this many epochs (and always at the end); 0 = only at the end."""
    evaluate_every_steps: int = 0
    """The same in optimizer steps; above 0 it takes the place of `evaluate_every_epochs`."""
    evaluate_batch_size: int = 0
    """Samples of one evaluation pass on one rank; 0 = `micro_batch_size`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        every = ("evaluate_every_epochs", "evaluate_every_steps")
        for name in ("total_steps", "max_steps", *every, "evaluate_batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")

    def scheduled(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole schedule."""
        return self.total_steps or self.epochs * steps_per_epoch

    def evaluate_every(self, steps_per_epoch: int) -> int:
        """Optimizer steps between two evaluations; 0 = only at the end."""
        return self.evaluate_every_steps or self.evaluate_every_epochs * steps_per_epoch

    def share(self, world_size: int) -> int:
        """Samples of one step on one rank. Raises ValueError where the global batch does not divide by the ranks."""
        share, rest = divmod(self.global_batch_size, world_size)
        if rest or share < 1:
            raise ValueError(
                f"steps.global_batch_size: {self.global_batch_size} does not divide by {world_size} ranks; "
                f"the nearest that do are {max(share, 1) * world_size} and {(share + 1) * world_size}"
            )
        return share

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one step on one rank; the last one may be smaller than the others."""
        return -(-self.share(world_size) // self.micro_batch_size)
