"""The loop."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.loader import Batch, Loader, build_loader
from dgt.tasks import Task, build_task
from dgt.training import checkpoint, run_folder, start
from dgt.training.evaluate import evaluate
from dgt.training.garbage import collected_by_hand
from dgt.training.guard import Guard
from dgt.training.inputs import StepInputs, timed
from dgt.training.interrupt import Interruption
from dgt.training.keeper import Keeper
from dgt.training.parallel import Engine, build_engine
from dgt.training.reports import Reports
from dgt.training.run_folder import RunFolder
from dgt.training.schedule import learning_rate
from dgt.training.state import DivergedError, Outcome, Progress
from dgt.training.watchdog import Watchdog
from dgt.training.world import World, joined, set_deterministic, set_threads

if TYPE_CHECKING:
    from dgt.config import Config

log = logging.getLogger("dgt")


def train(config: Config, interruption: Interruption | None = None) -> Outcome:
    """Trains until the configured end or until a signal asks to stop, continuing from the newest checkpoint.

    Every rank calls it with the same configuration; see `joined` for how ranks find each other. Raises
    RunFolderError, CheckpointError or DivergedError on every rank alike; the data pipeline's errors on the rank that
    meets them, whose end the launcher turns into the others'.
    """
    interruption = interruption or Interruption()
    with joined() as world, ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog.of_run(config, world, interruption.announce_hang))
        set_threads(config.engine.threads)
        set_deterministic(config.engine.deterministic)
        stack.enter_context(collected_by_hand(config.engine.collect_garbage_every))
        folder = RunFolder(config.run_dir)
        world.on_main(lambda: run_folder.claim(folder, run_folder.plain(config)))
        task = build_task(config.task, config.model, config.data)
        torch.manual_seed(config.seed)
        network = task.build_model()
        if config.start.path and not world.on_main(lambda: bool(checkpoint.committed(folder.checkpoints))):
            start.load_into(network, config.start, world)
        engine = build_engine(network, world, config.engine, config.optimizer)

        def loader(split: str, batch_size: int, training: bool) -> Loader:
            return stack.enter_context(
                build_loader(
                    config.data, split, kind=task.kind, train=training, global_batch_size=batch_size,
                    rank=world.rank, world_size=world.size, seed=config.seed, quarantine=folder.quarantine,
                )
            )  # fmt: skip

        per_pass = config.steps.evaluate_batch_size or config.steps.micro_batch_size
        return Trainer(
            config,
            world,
            task,
            engine,
            loader(config.data.train_split, config.steps.global_batch_size, training=True),
            loader(config.data.val_split, per_pass * world.size, training=False),
            interruption,
            watchdog,
        ).run()


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: Config,
        world: World,
        task: Task,
        engine: Engine,
        training_data: Loader,
        validation_data: Loader,
        interruption: Interruption,
        watchdog: Watchdog,
    ):
        self.config, self.world, self.task, self.engine = config, world, task, engine
        self.training_data, self.validation_data = training_data, validation_data
        self.interruption, self.watchdog = interruption, watchdog
        self.progress = Progress()
        self.keeper = Keeper(config, world, engine, self.progress, interruption.check_current)
        self.guard = Guard(config.guard, world, self.progress, RunFolder(config.run_dir).bad_steps)
        self.reports = Reports(config, world, self.progress, training_data, interruption)
        self.steps_per_epoch = len(training_data)
        self.scheduled_steps = config.steps.scheduled(self.steps_per_epoch)
        self.last_step = min(self.scheduled_steps, config.steps.max_steps or self.scheduled_steps)

    def run(self) -> Outcome:
        """The story: take up where the last attempt stopped; then step, evaluate, save, until the end or a signal."""
        if self.keeper.resume():
            self.training_data.load_state_dict(self.progress.data)
        if self.finished():  # by an earlier attempt, which has reported everything
            return self.outcome()
        self.open_reports()
        try:
            if self.evaluate_if_due():  # one that an interruption has cut off
                self.keeper.save()
            leaving = self.leaving()
            while not leaving:
                for batch, waited in timed(self.training_data):
                    taken = self.step(batch, waited)
                    if self.guard.is_lost():
                        self.roll_back()
                    evaluated = self.evaluate_if_due()
                    leaving = self.leaving()
                    if not leaving and (taken or evaluated) and self.save_is_due():
                        # A signal that comes meanwhile leaves nothing else to save.
                        leaving = self.keeper.save() and self.leaving() and self.keeper.conclude()
                    if leaving:
                        break
            self.keeper.save_the_end()
            self.reports.conclude(self.outcome())
            return self.outcome()
        finally:
            self.keeper.close()
            self.reports.monitor.close()

    def step(self, batch: Batch, waited: float) -> bool:
        """One optimizer step on this rank's share of a global batch; `waited`: seconds it took to come.

        Returns whether it was taken. A bad one changes neither weights nor schedule; its batch is used up.
        """
        started, steps, progress = time.perf_counter(), self.config.steps, self.progress
        self.watchdog.beat(f"in step {progress.step + 1}")
        self.reports.begin()
        lr = learning_rate(
            progress.step,
            peak=self.config.optimizer.lr,
            total_steps=self.scheduled_steps,
            steps_per_epoch=self.steps_per_epoch,
            config=self.config.schedule,
        )
        prepare = StepInputs(self.config, progress.step, self.world.device, self.training_data.epoch)
        parts = [slice(i, i + steps.micro_batch_size) for i in range(0, len(batch.labels), steps.micro_batch_size)]
        losses: list[Tensor] = []

        def loss_of(model: nn.Module, part: slice) -> Tensor:
            loss = self.task.loss(model, prepare(batch, part)) / steps.global_batch_size
            self.reports.stopwatch.lap()
            losses.append(loss.detach())
            return loss

        def accept(loss: float, norm: float) -> bool:
            accepted = self.guard.accepts(loss, norm)
            if accepted:
                self.keeper.let_change()
                self.reports.monitor.distributions(progress.step + 1, self.engine)
            return accepted

        result = self.engine.train_step(parts, loss_of, lr, accept)
        while result.rescaled:  # the same batch again, with the loss scale that has been lowered
            losses.clear()
            result = self.engine.train_step(parts, loss_of, lr, accept)
        self.reports.stopwatch.end(waited)
        progress.data = self.training_data.state_dict()
        self.reports.served(batch, used=result.taken)
        if not result.taken:
            self.guard.note_bad(result.loss, result.grad_norm, [batch.ids[part].tolist() for part in parts], losses)
            return False
        if self.keeper.ema:
            self.keeper.ema.update(progress.step)
        self.guard.note_good(result.loss)
        progress.step += 1
        self.reports.taken(batch, prepare, result, lr, (time.perf_counter() - started + waited, waited))
        if self.reports.monitor.reports(progress.step):
            self.keeper.conclude_if_done()
        return True

    def roll_back(self) -> None:
        """Goes back to the last good checkpoint, and on with the data that comes next.

        Raises DivergedError where that was done too often, or where there is no checkpoint.
        """
        report, rollbacks = self.guard.report(), self.progress.rollbacks
        if rollbacks >= self.config.guard.max_rollbacks:
            raise DivergedError(f"{report}, after {rollbacks} returns to a checkpoint; {self.guard.advice()}")
        found = self.keeper.return_point()
        if found is None:
            raise DivergedError(f"{report}, and there is no checkpoint to return to; {self.guard.advice()}")
        self.keeper.return_to(found, rollbacks + 1)
        log.warning("%s: back to step %d, and on with the data that follows", report, self.progress.step)
        self.reports.monitor.close()
        self.open_reports()

    def finished(self) -> bool:
        """All steps are done and evaluated."""
        return self.progress.step >= self.last_step and self.progress.evaluated_at == self.progress.step

    def leaving(self) -> bool:
        """Whether the loop ends here, on all ranks."""
        if self.reports.monitor.reports(self.progress.step + 1):
            self.interruption.look_next()  # what is written to the run must be its own attempt's
        return self.finished() or bool(self.asked_to_stop())

    def outcome(self) -> Outcome:
        """How the loop has ended."""
        if self.finished():
            return Outcome("finished", self.progress.step, metrics=self.progress.metrics)
        return Outcome("interrupted", self.progress.step, signal=self.asked_to_stop())

    def asked_to_stop(self) -> int:
        """The signal that all ranks agree to obey; 0 = go on."""
        self.watchdog.beat(f"after step {self.progress.step}")
        return self.interruption.agreed(self.world)

    def evaluation_is_due(self) -> bool:
        """At the ends of epochs, or after steps, as configured, and after the last step."""
        step, every = self.progress.step, self.config.steps.evaluate_every(self.steps_per_epoch)
        return step != self.progress.evaluated_at and (step >= self.last_step or (every > 0 and step % every == 0))

    def evaluate_if_due(self) -> bool:
        """Evaluates where it is time to; False where it was not, or where a signal cut it off: it runs on resume."""
        if not self.evaluation_is_due():
            return False
        self.reports.monitor.end_trace(self.progress.step)
        self.keeper.let_change()
        with self.engine.averaged_weights(self.keeper.ema):
            found = evaluate(self.engine, self.task, self.validation_data, lambda: bool(self.asked_to_stop()))
        if found is None:
            return False
        metrics = self.world.on_main(lambda: self.task.metrics(found.totals, found.records))
        progress, value = self.progress, metrics[self.task.best_metric]
        progress.metrics, progress.evaluated_at = metrics, progress.step
        if progress.best_metric is None or value > progress.best_metric:
            progress.best_metric, progress.best_step = value, progress.step
        self.reports.monitor.evaluation(progress.step, metrics, self.task.confusion(found.totals), found.pictures)
        return True

    def save_is_due(self) -> bool:
        """At the configured steps, after an evaluation that was the best, and at the end."""
        step = self.progress.step
        return step % self.config.checkpoint.every_steps == 0 or step == self.progress.best_step or self.finished()

    def open_reports(self) -> None:
        """Begins what is reported, at the step where the run is."""
        self.reports.open(self.task, self.engine.network, self.last_step, self.evaluation_is_due())
        self.keeper.report = self.reports.saved
        self.guard.forget_later()
