"""Everything that a run tells of its steps: to a person (the monitor), to a proof (the sample log), of slow ranks."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn

from data_pipeline.loader import Batch, Loader
from dgt.tasks import Task
from dgt.training import pictures, run_folder
from dgt.training.inputs import StepInputs
from dgt.training.interrupt import Interruption
from dgt.training.monitor import Monitor, Resumed, Size
from dgt.training.parallel import StepResult
from dgt.training.run_folder import RunFolder
from dgt.training.sample_log import SampleLog
from dgt.training.saver import Saved
from dgt.training.state import Outcome, Progress
from dgt.training.stragglers import Stopwatch, Stragglers
from dgt.training.world import World

if TYPE_CHECKING:
    from dgt.config import Config

log = logging.getLogger("dgt")


class Reports:
    """One rank's part, from where the run begins, resumes or returns to; all ranks call the same methods."""

    def __init__(self, config: Config, world: World, progress: Progress, data: Loader, interruption: Interruption):
        self.config, self.world, self.progress, self.data = config, world, progress, data
        self.interruption = interruption
        self.stopwatch = Stopwatch(world.device)
        self.stragglers = Stragglers(config.guard.straggler_factor, config.guard.straggler_reports)

    def open(self, task: Task, network: nn.Module, last_step: int, evaluation_is_due: bool) -> None:
        """Begins at the step that the progress names, and forgets what was reported of later ones."""

        @functools.cache
        def macs(height: int, width: int) -> int:
            return task.macs(network, height, width) or 0

        self.macs = macs
        config, folder = self.config, RunFolder(self.config.run_dir)
        size = Size(
            last_step, len(self.data), config.steps.global_batch_size, self.world.size,
            config.engine.precision, config.optimizer.clip_grad_norm,
        )  # fmt: skip
        resumed = Resumed(self.progress.step, evaluation_is_due)
        self.monitor = Monitor(config.monitor, folder, size, resumed, self.world.is_main)
        self.samples = SampleLog(folder.samples, self.world, self.progress, config.monitor.log_samples)
        self.interruption.note_save(self.monitor.longest_save)

    def begin(self) -> None:
        """A step begins."""
        self.monitor.begin(self.progress.step + 1)
        self.stopwatch.begin()

    def served(self, batch: Batch, used: bool) -> None:
        """A batch was used for a step, or used up by one that was not taken; before the step counts."""
        self.samples.step(self.progress.step + 1, self.progress.data, batch.ids.tolist(), used)

    def taken(
        self, batch: Batch, prepare: StepInputs, result: StepResult, lr: float, seconds: tuple[float, float]
    ) -> None:
        """A step was taken; `seconds`: that it lasted, and that it waited for its batch."""
        step = self.progress.step
        scalars = {"train/loss": result.loss, "train/lr": lr, "train/grad_norm": result.grad_norm}
        if result.loss_scale is not None:
            scalars["train/loss_scale"] = result.loss_scale
        if self.monitor.reports(step):
            scalars |= self.of_all_ranks(batch)
        if self.monitor.shows_images(step):
            data = self.config.data
            shown = pictures.SHOWN_DENSE if batch.targets else pictures.SHOWN_IMAGES
            inputs = prepare(batch, slice(0, shown))
            drawn = pictures.samples(inputs, data.mean, data.std, self.data.source.class_names)
            self.monitor.picture(step, "train/images", drawn)
        assert isinstance(batch.images, Tensor)
        self.monitor.step(step, *seconds, scalars, self.macs(*batch.images.shape[1:3]))

    def of_all_ranks(self, batch: Batch) -> dict[str, float]:
        """What all ranks together have counted since the last report; names a slow one."""
        told = self.world.gather((self.data.stats(), self.stopwatch.pace()))
        totals: Counter[str] = Counter()
        for stats, _ in told:
            totals.update(stats)
        scalars, warning = self.stragglers.judge([pace for _, pace in told])
        if warning and self.world.is_main:
            log.warning(warning)
        counted = {f"data/{name}": float(value) for name, value in totals.items()}
        assert isinstance(batch.images, Tensor)
        height, width = batch.images.shape[1:3]
        size = {"data/image_size": float(max(height, width))}
        return size | counted | scalars

    def saved(self, saved: Saved) -> None:
        """Tells of a new checkpoint, and learns how long one takes."""
        self.interruption.note_save(saved.seconds)
        self.monitor.saved(saved.step, saved.seconds, saved.stall)

    def conclude(self, outcome: Outcome) -> None:
        """The attempt has ended as planned."""
        self.monitor.conclude(outcome, run_folder.plain(self.config))
