"""What a person sees of a run: a console line, TensorBoard curves, and the same numbers in metrics.jsonl.

After a resume at step s everything later than s is dropped first, so curves continue without overlap or gap.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dgt.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("dgt")

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second by a part of the device's name, from NVIDIA's data sheets (SXM forms)."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is reported, and how often."""

    log_every: int = 50
    """Report after every this many optimizer steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every: must be at least 1, got {self.log_every}")


@dataclass(frozen=True)
class Size:
    """How large the run is, for progress and rates."""

    total_steps: int
    steps_per_epoch: int
    global_batch_size: int
    world_size: int
    macs_per_image: int | None
    """Multiply-accumulates of one forward pass of one image; None where the network does not say."""


class Monitor:
    """Rank 0's reports; on other ranks every call does nothing."""

    def __init__(self, config: MonitorConfig, folder: RunFolder, size: Size, resumed_at: int, is_main: bool):
        self.config = config
        self.size = size
        self.is_main = is_main
        self.seconds = self.waited = 0.0
        self.steps = 0
        self.folder = folder
        self.curves: SummaryWriter | None = None
        if is_main:
            forget_after(folder.metrics, resumed_at)
            self.open_curves(resumed_at + 1)

    def open_curves(self, first_step: int) -> None:
        """Opens a TensorBoard file whose curves begin at `first_step`; what earlier files say from there on is void."""
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.curves = SummaryWriter(str(self.folder.tensorboard), purge_step=first_step)

    def step(self, step: int, seconds: float, waited: float, scalars: Mapping[str, float]) -> None:
        """Notes one optimizer step (`seconds` long, `waited` of them for data) and reports when it is time to."""
        self.seconds += seconds
        self.waited += waited
        self.steps += 1
        if not self.is_main or (step % self.config.log_every and step != self.size.total_steps):
            return
        rate = self.steps * self.size.global_batch_size / self.seconds
        rates = {
            "speed/images_per_s": rate,
            "speed/step_seconds": self.seconds / self.steps,
            "speed/data_wait": self.waited / self.seconds,
            "speed/memory_gb": memory_gb(),
        }
        if (mfu := self.mfu(rate)) is not None:
            rates["speed/mfu"] = mfu
        log.info(self.line(step, scalars, rates))
        self.write(step, {**scalars, **rates})
        self.seconds = self.waited = 0.0
        self.steps = 0

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the metrics of one evaluation."""
        if self.is_main:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            log.info("evaluation after step %d:  %s", step, shown)
            self.write(step, {f"val/{name}": value for name, value in metrics.items()})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point per TensorBoard curve; a full disk costs points, not the run."""
        try:
            with self.folder.metrics.open("a") as file:
                file.write(json.dumps({"step": step, **scalars}) + "\n")
            if self.curves is None:
                self.open_curves(step)
            if self.curves is not None:
                for name, value in scalars.items():
                    self.curves.add_scalar(name, value, step)
                self.curves.flush()
        except OSError as error:
            log.error("the metrics of step %d could not be written to %s: %s", step, self.folder.path, error)
            self.curves = None  # its writing thread has ended with the error

    def close(self) -> None:
        """Finishes the TensorBoard file."""
        if self.curves is not None:
            self.curves.close()

    def mfu(self, images_per_s: float) -> float | None:
        """Model FLOP utilisation: 2 operations per multiply-accumulate, backward twice forward; None if unknown."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        if peak is None or self.size.macs_per_image is None:
            return None
        return 6 * self.size.macs_per_image * images_per_s / (peak * self.size.world_size)

    def line(self, step: int, scalars: Mapping[str, float], rates: Mapping[str, float]) -> str:
        """The console line: where we are, how it goes, how fast, how long still."""
        total = self.size.total_steps
        epochs = -(-total // self.size.steps_per_epoch)
        done = round(20 * step / total)
        left = (total - step) * rates["speed/step_seconds"]
        return (
            f"epoch {(step - 1) // self.size.steps_per_epoch + 1:>{len(str(epochs))}}/{epochs} "
            f"[{'=' * done}{' ' * (20 - done)}] step {step:>{len(str(total))}}/{total}  "
            f"loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
            f"{rates['speed/images_per_s']:.0f} images/s  data wait {100 * rates['speed/data_wait']:.0f} %  "
            f"ETA {clock(left)}"
        )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02d}:{m:02d}:{s:02d}" if days else f"{h}:{m:02d}:{s:02d}"


def memory_gb() -> float:
    """Most memory this rank has held, in 10^9 bytes: on the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forget_after(metrics: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and one that a kill has cut off, atomically."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = metrics.with_suffix(".jsonl.new")
    temporary.write_text("".join(kept))
    os.replace(temporary, metrics)
