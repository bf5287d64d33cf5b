"""What a person sees of a run: a console line, TensorBoard curves, and the same numbers in metrics.jsonl.

After a resume at step s everything later than s is dropped first, so curves continue without overlap or gap.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dgt.training import events, histograms, hyperparameters, json_lines, pictures, profiling
from dgt.training.checkpoint import write_durably
from dgt.training.flops import peak_flops
from dgt.training.profiling import Profiler
from dgt.training.run_folder import RunFolder
from dgt.training.state import Outcome

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dgt.training.parallel import Engine

log = logging.getLogger("dgt")

SAVE_SECONDS = "speed/save_seconds"
"""Name of the seconds that a checkpoint took, from the first tensor to its commit."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is reported, and how often."""

    log_every: int = 50
    """Report after every this many optimizer steps. Sums and maxima since the last report (rates, train/grad_norm_max,
    train/clipped_share) begin anew where an attempt begins."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    log_samples: bool = False
    """Write the sample ids of every step to samples/rank-N.jsonl, to prove that each sample was used exactly once an
    epoch."""
    images_every: int = 0
    """Show up to 16 training images in TensorBoard, as the network sees them, of every this manieth step; 0 = never."""
    histograms_every: int = 0
    """Show in TensorBoard how rank 0's weights and clipped gradients are distributed, in every this manieth step; takes
    time and space. Gradients are not shown under deepspeed, which keeps them elsewhere. 0 = never."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of which rank 0 writes a trace to profiles/, at most 10, such as [10, 12]; empty = none. A
    file RUN/profile with a number of steps in it asks for one while the run goes on."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every: must be at least 1, got {self.log_every}")
        for name in ("images_every", "histograms_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        profiling.check_range(self.profile_steps)


@dataclass(frozen=True)
class Size:
    """How large the run is, for progress and rates."""

    total_steps: int
    steps_per_epoch: int
    global_batch_size: int
    world_size: int
    precision: str = "fp32"
    """What the arithmetic is done in, as in `engine.precision`."""
    clip_grad_norm: float = 0.0
    """Gradients with a larger norm are clipped; 0 = none is."""


@dataclass(frozen=True)
class Resumed:
    """Where the run goes on."""

    step: int = 0
    """Optimizer steps done."""
    evaluation_is_due: bool = False
    """The evaluation after that step was cut off and comes now."""


class Monitor:
    """Rank 0's reports; on other ranks every call does nothing."""

    def __init__(self, config: MonitorConfig, folder: RunFolder, size: Size, resumed: Resumed, is_main: bool):
        self.config = config
        self.size = size
        self.is_main = is_main
        self.seconds = self.waited = 0.0
        self.steps = self.macs = self.clipped = 0
        self.largest_norm = 0.0
        self.folder = folder
        self.resumed = resumed
        self.longest_save = 0.0
        """Seconds that the longest save of earlier attempts took."""
        self.curves: SummaryWriter | None = None
        self.plotted = resumed.step - resumed.evaluation_is_due
        """The last step whose points are in TensorBoard and stay there."""
        self.has_failed = False
        self.profiler = Profiler(config.profile_steps, folder.path, is_main)
        if is_main:
            self.continue_from(resumed)

    def continue_from(self, resumed: Resumed) -> None:
        """Forgets what was reported after the step that the run resumes from."""
        try:
            kept = forget_after(self.folder.metrics, resumed)
            self.longest_save = max((row.get(SAVE_SECONDS, 0.0) for row in kept.values()), default=0.0)
            if resumed.evaluation_is_due:
                # TensorBoard forgets whole steps: this one is written again, without the evaluation that is to come.
                self.open_curves(resumed.step)
                self.plot(resumed.step, kept.get(resumed.step, {}))
            else:
                self.open_curves(resumed.step + 1)
            self.tell_events(resumed.step)
        except OSError as error:
            self.failed("earlier metrics could not be read or written", error)

    def open_curves(self, first_step: int) -> None:
        """Opens a TensorBoard file whose curves begin at `first_step`; what earlier files say from there on is void."""
        if not self.config.tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            log.warning("no TensorBoard curves: %s (install tensorboard, or set monitor.tensorboard=false)", error)
            return
        self.curves = SummaryWriter(str(self.folder.tensorboard), purge_step=first_step)

    def plot(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point per TensorBoard curve."""
        if self.curves is not None:
            for name, value in scalars.items():
                self.curves.add_scalar(name, value, step)
            self.curves.flush()
            self.plotted = max(self.plotted, step)  # a save may be reported some steps later

    def show(self, step: int, what: str, write: Callable[[SummaryWriter], None]) -> None:
        """Lets `write` add more than curves to TensorBoard; a full disk costs `what` that is, not the run."""
        if self.curves is None:
            return
        try:
            write(self.curves)
            self.curves.flush()
        except OSError as error:
            self.failed(f"{what} of step {step} could not be written", error)

    def picture(self, step: int, name: str, drawn: np.ndarray) -> None:
        """Shows a picture, uint8 (H, W, 3)."""
        self.show(step, f"the picture {name}", lambda curves: curves.add_image(name, drawn, step, dataformats="HWC"))

    def shows_images(self, step: int) -> bool:
        """Whether this rank shows training images of this step."""
        return self.curves is not None and is_multiple(step, self.config.images_every)

    def distributions(self, step: int, engine: Engine) -> None:
        """Shows, where it is time to, the weights before this step and their gradients."""
        if self.curves is not None and is_multiple(step, self.config.histograms_every):
            self.show(step, "the histograms", lambda curves: histograms.add(curves, engine, step))

    def tell_events(self, step: int, ending: str = "") -> None:
        """Puts the launcher's events into TensorBoard as a table, with the attempt's `ending` below where it has one.

        Where an attempt begins, a point of the curve run/attempt counts the attempts. Without a launcher there are no
        events, and nothing is written.
        """
        told = events.read(self.folder.events)
        if self.curves is None or not told:
            return
        self.curves.add_text("run/events", events.as_table(told, ending), step)
        if not ending and (attempts := events.attempts(told)):
            self.curves.add_scalar("run/attempt", attempts, step)
        self.curves.flush()

    def failed(self, what: str, error: OSError) -> None:
        """Says what could not be reported; the run goes on."""
        log.error("%s in %s: %s", what, self.folder.path, error)
        self.curves = None  # its writing thread has ended with the error
        self.has_failed = True

    def reports(self, step: int) -> bool:
        """Whether this step is reported; the same on every rank."""
        return step % self.config.log_every == 0 or step == self.size.total_steps

    def begin(self, step: int) -> None:
        """A step begins; what comes between here and its report is in its trace."""
        self.profiler.before(step)

    def end_trace(self, step: int) -> None:
        """Something else than steps comes now, of any length, which no trace shall hold."""
        self.profiler.end(step)

    def step(self, step: int, seconds: float, waited: float, scalars: Mapping[str, float], macs: int = 0) -> None:
        """Notes one optimizer step (`seconds` long, `waited` of them for data) and reports when it is time to.

        `macs`: multiply-accumulates of one forward pass of one of its images; 0 where the network does not say.
        """
        self.profiler.after(step)
        self.seconds += seconds
        self.waited += waited
        self.steps += 1
        self.macs += self.size.global_batch_size * macs
        norm = scalars.get("train/grad_norm", 0.0)
        self.largest_norm = max(self.largest_norm, norm)
        self.clipped += 0 < self.size.clip_grad_norm < norm
        if not self.is_main or not self.reports(step):
            return
        rate = self.steps * self.size.global_batch_size / self.seconds
        rates = {
            "speed/images_per_s": rate,
            "speed/step_seconds": self.seconds / self.steps,
            "speed/data_wait": self.waited / self.seconds,
            "speed/memory_gb": memory_gb(),
        }
        norms = {"train/grad_norm_max": self.largest_norm, "train/clipped_share": self.clipped / self.steps}
        log.info(self.line(step, scalars, rates))
        self.write(step, {**scalars, **norms, **rates, **self.arithmetic_rates()})
        self.seconds = self.waited = self.largest_norm = 0.0
        self.steps = self.macs = self.clipped = 0

    def evaluation(
        self,
        step: int,
        metrics: Mapping[str, float],
        confusion: np.ndarray | None = None,
        answers: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Reports the metrics of one evaluation, and as pictures `confusion`, (classes, classes) samples, and the
        `answers`, drawn onto some images, by sample id."""
        if self.is_main:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            log.info("evaluation after step %d:  %s", step, shown)
            self.write(step, {f"val/{name}": value for name, value in metrics.items()})
            if confusion is not None and self.curves is not None:
                self.picture(step, "val/confusion", pictures.confusion(confusion))
            for sample, drawn in (answers or {}).items():
                self.picture(step, f"val/sample_{sample}", drawn)

    def saved(self, step: int, seconds: float, stall: float) -> None:
        """Reports how long the checkpoint of `step` took, and for how many seconds training stood still.

        A save at the step that the run resumed from only replaced the manifest, which says nothing about the next one.
        """
        if self.is_main and step != self.resumed.step:
            self.write(step, {SAVE_SECONDS: seconds, "speed/stall_seconds": stall})

    def conclude(self, outcome: Outcome, settings: Mapping[str, Any] | None = None) -> None:
        """Adds to the events in TensorBoard how this attempt ended, and to a run's end what it was: its `settings`."""
        stopped = f"was stopped by {signal.Signals(outcome.signal).name}" if outcome.signal else "finished the training"
        try:
            self.tell_events(outcome.step, f"This attempt {stopped} after step {outcome.step}.")
        except OSError as error:
            self.failed("the end of this attempt could not be written", error)
        if outcome.status == "finished" and settings is not None:
            names = [f"val/{name}" for name in outcome.metrics or {}]
            self.show(outcome.step, "the settings", lambda curves: hyperparameters.add(curves, settings, names))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point per TensorBoard curve; a full disk costs points, not the run."""
        try:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            if self.has_failed:
                self.open_curves(max(step, self.plotted + 1))  # what is there of this attempt stays
                self.has_failed = False
            json_lines.append(self.folder.metrics, {"step": step, **finite})
            self.plot(step, scalars)
        except OSError as error:
            self.failed(f"the metrics of step {step} could not be written", error)

    def close(self) -> None:
        """Finishes the TensorBoard file, and a trace."""
        self.profiler.end(self.profiler.until)
        if self.curves is not None:
            with suppress(OSError):
                self.curves.close()

    def epoch(self, step: int) -> int:
        """The epoch of a step, from 0."""
        return (step - 1) // self.size.steps_per_epoch

    def arithmetic_rates(self) -> dict[str, float]:
        """What each device computes for the model: 10^12 operations per second, and as a share of its peak.

        2 operations per multiply-accumulate, backward twice forward; what is computed again does not count. Nothing
        where the network does not say, and no share (MFU) for a device whose peak is not known.
        """
        if not self.macs:
            return {}
        rate = 6 * self.macs / (self.seconds * self.size.world_size)
        peak = peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else "", self.size.precision)
        return {"speed/model_tflops": rate / 1e12} | ({"speed/mfu": rate / peak} if peak else {})

    def line(self, step: int, scalars: Mapping[str, float], rates: Mapping[str, float]) -> str:
        """The console line: where we are, how it goes, how fast, how long still."""
        total = self.size.total_steps
        epochs = -(-total // self.size.steps_per_epoch)
        done = round(20 * step / total)
        left = (total - step) * rates["speed/step_seconds"]
        return (
            f"epoch {self.epoch(step) + 1:>{len(str(epochs))}}/{epochs} "
            f"[{'=' * done}{' ' * (20 - done)}] step {step:>{len(str(total))}}/{total}  "
            f"loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
            f"{rates['speed/images_per_s']:.0f} images/s  data wait {100 * rates['speed/data_wait']:.0f} %  "
            f"ETA {clock(left)}"
        )


def is_multiple(step: int, every: int) -> bool:
    """Whether something that comes after `every` so many steps is due; 0 = never."""
    return every > 0 and step % every == 0


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


def forget_after(metrics: Path, resumed: Resumed) -> dict[int, dict[str, float]]:
    """Drops from metrics.jsonl, at once, what comes after `resumed`, and lines that a kill or full disk has cut off.

    Returns what is left beside evaluations, by step.
    """
    kept: list[str] = []
    training: dict[int, dict[str, float]] = {}
    for row in json_lines.read(metrics, "step") if metrics.exists() else ():
        if not all(isinstance(value, int | float | None) for value in row.values()):
            continue
        line = json.dumps(row)
        step, evaluated = row.pop("step"), any(name.startswith("val/") for name in row)
        if step > resumed.step or (step == resumed.step and evaluated and resumed.evaluation_is_due):
            continue
        kept.append(line + "\n")
        if not evaluated:
            scalars = {name: math.nan if value is None else value for name, value in row.items()}
            training.setdefault(step, {}).update(scalars)  # a step and the save after it have a row each
    if metrics.exists():
        write_durably(metrics, "".join(kept))
    return training
