"""The loop."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from data_pipeline.loader import Batch, Loader, build_loader
from dgt.tasks import Task, build_task
from dgt.training import checkpoint, guard, pictures, run_folder
from dgt.training.ema import Ema
from dgt.training.evaluate import evaluate
from dgt.training.inputs import StepInputs, timed
from dgt.training.interrupt import Interruption
from dgt.training.monitor import Monitor, Resumed, Size
from dgt.training.parallel import Engine, StepResult, build_engine
from dgt.training.pieces import Pieces
from dgt.training.run_folder import RunFolder
from dgt.training.sample_log import SampleLog
from dgt.training.saver import Saver
from dgt.training.schedule import learning_rate
from dgt.training.state import DivergedError, Outcome, Progress
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
    with joined() as world, ExitStack() as stack:
        set_threads(config.engine.threads)
        set_deterministic(config.engine.deterministic)
        folder = RunFolder(config.run_dir)
        world.on_main(lambda: run_folder.claim(folder, run_folder.plain(config)))
        task = build_task(config.task, config.model, config.data)
        torch.manual_seed(config.seed)
        engine = build_engine(task.build_model(), world, config.engine, config.optimizer)

        def loader(split: str, batch_size: int, training: bool) -> Loader:
            return stack.enter_context(
                build_loader(
                    config.data, split, train=training, global_batch_size=batch_size,
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
            interruption or Interruption(),
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
    ):
        self.config, self.world, self.task, self.engine = config, world, task, engine
        self.training_data, self.validation_data = training_data, validation_data
        self.interruption = interruption
        self.folder = RunFolder(config.run_dir)
        self.saver = Saver(self.folder.checkpoints, world, interruption.check_current, config.checkpoint)
        self.ema = Ema(engine.weights(), config.ema) if config.ema.enabled else None
        self.progress = Progress()
        self.saved_best: tuple[float | None, int | None] = (None, None)
        self.metrics: dict[str, float] | None = None
        self.steps_per_epoch = len(training_data)
        self.scheduled_steps = config.steps.epochs * self.steps_per_epoch
        self.last_step = min(self.scheduled_steps, config.steps.max_steps or self.scheduled_steps)

    def run(self) -> Outcome:
        """The story: take up where the last attempt stopped; then step, evaluate, save, until the end or a signal."""
        self.resume()
        if self.finished():  # by an earlier attempt, which has reported everything
            return self.outcome()
        self.open_reports()
        try:
            if self.evaluate_if_due():  # one that an interruption has cut off
                self.save(must=True)
            leaving = self.leaving()
            while not leaving:
                for batch, waited in timed(self.training_data):
                    if self.step(batch, waited):
                        self.evaluate_if_due()
                    elif self.progress.bad_in_a_row >= self.config.guard.max_bad_in_a_row:
                        self.roll_back()
                    leaving = self.leaving()
                    if leaving or self.save_is_due():
                        saved = self.save(must=leaving)
                        # A signal that came meanwhile: all is saved, or about to be.
                        leaving = leaving or (saved and self.leaving() and self.conclude_save())
                    if leaving:
                        break
            self.monitor.conclude(self.outcome(), run_folder.plain(self.config))
            return self.outcome()
        finally:
            self.saver.close()
            self.monitor.close()

    def step(self, batch: Batch, waited: float) -> bool:
        """One optimizer step on this rank's share of a global batch; `waited`: seconds it took to come.

        Returns whether it was taken. A bad one changes neither weights nor schedule; its batch is used up.
        """
        started, steps, progress = time.perf_counter(), self.config.steps, self.progress
        self.monitor.begin(progress.step + 1)
        if self.world.is_main and self.monitor.reports(progress.step + 1):
            self.interruption.check_current()  # what is written to the run must be its own attempt's
        lr = learning_rate(
            progress.step,
            peak=self.config.optimizer.lr,
            total_steps=self.scheduled_steps,
            warmup_steps=round(self.config.schedule.warmup_epochs * self.steps_per_epoch),
            config=self.config.schedule,
        )
        prepare = StepInputs(self.config, progress.step, self.world.device)

        def accept(loss: float, norm: float) -> bool:
            if guard.fault(loss, norm, progress, self.config.guard):
                return False
            self.monitor.distributions(progress.step + 1, self.engine.network)
            return True

        result = self.engine.train_step(
            [slice(i, i + steps.micro_batch_size) for i in range(0, len(batch.labels), steps.micro_batch_size)],
            lambda model, part: self.task.loss(model, prepare(batch, part)) / steps.global_batch_size,
            lr,
            accept,
        )
        progress.data = self.training_data.state_dict()
        if not result.taken:
            self.report_bad(batch, result)
            return False
        if self.ema:
            self.ema.update(progress.step)
        guard.note_good(result.loss, progress, self.config.guard)
        progress.step += 1
        scalars = {"train/loss": result.loss, "train/lr": lr, "train/grad_norm": result.grad_norm}
        if self.monitor.reports(progress.step):
            scalars |= self.data_scalars(batch)
        if self.monitor.shows_images(progress.step):
            data, names = self.config.data, self.training_data.source.class_names
            drawn = pictures.samples(prepare(batch, slice(0, 16)), data.mean, data.std, names)
            self.monitor.picture(progress.step, "train/images", drawn)
        self.samples.step(progress.step, batch.ids.tolist())
        self.monitor.step(progress.step, time.perf_counter() - started + waited, waited, scalars)
        if self.monitor.reports(progress.step) and self.saver.is_done():
            self.conclude_save()
        return True

    def data_scalars(self, batch: Batch) -> dict[str, float]:
        """What the data pipeline of all ranks together counted since the last report; all ranks call it."""
        totals: Counter[str] = Counter()
        for stats in self.world.gather(self.training_data.stats()):
            totals.update(stats)
        return {"data/image_size": float(batch.images.shape[1])} | {f"data/{k}": float(v) for k, v in totals.items()}

    def report_bad(self, batch: Batch, result: StepResult) -> None:
        """Says which samples gave a step that was not taken, and why."""
        progress = self.progress
        if result.rescaled:
            return
        progress.bad_in_a_row += 1
        ids = [int(i) for part in self.world.gather(batch.ids.tolist()) for i in part]
        why = guard.fault(result.loss, result.grad_norm, progress, self.config.guard)
        log.warning("step %d skipped: %s (sample ids %s)", progress.step + 1, why, ids)

    def roll_back(self) -> None:
        """Goes back to the newest checkpoint, and on with the data that comes next.

        Raises DivergedError where that was done too often, or where there is no checkpoint.
        """
        rollbacks, bad, data = self.progress.rollbacks, self.progress.bad_in_a_row, self.progress.data
        report = f"{bad} steps in a row were bad after step {self.progress.step}"
        if rollbacks >= self.config.guard.max_rollbacks:
            raise DivergedError(f"{report}, after {rollbacks} returns to a checkpoint; training stops")
        self.conclude_save()
        found = self.newest()
        if found is None:
            raise DivergedError(f"{report}, and there is no checkpoint to return to; training stops")
        self.restore(found)
        self.progress.rollbacks, self.progress.data = rollbacks + 1, data
        log.warning("%s: back to step %d, and on with the data that follows", report, self.progress.step)
        self.monitor.close()
        self.open_reports()
        self.save(must=True)  # an interruption must not forget that these data were bad

    def finished(self) -> bool:
        """All steps are done and evaluated."""
        return self.progress.step >= self.last_step and self.progress.evaluated_at == self.progress.step

    def leaving(self) -> bool:
        """Whether the loop ends here, on all ranks."""
        return self.finished() or bool(self.asked_to_stop())

    def outcome(self) -> Outcome:
        """How the loop has ended."""
        if self.finished():
            return Outcome("finished", self.progress.step, metrics=self.metrics)
        return Outcome("interrupted", self.progress.step, signal=self.asked_to_stop())

    def asked_to_stop(self) -> int:
        """The signal that all ranks agree to obey; 0 = go on."""
        return self.interruption.agreed(self.world)

    def evaluation_is_due(self) -> bool:
        """At an epoch's end as configured and after the last step."""
        step, every = self.progress.step, self.config.steps.evaluate_every_epochs * self.steps_per_epoch
        return step != self.progress.evaluated_at and (step >= self.last_step or (every > 0 and step % every == 0))

    def evaluate_if_due(self) -> bool:
        """Evaluates where it is time to; False where it was not, or where a signal cut it off: it runs on resume."""
        if not self.evaluation_is_due():
            return False
        self.monitor.end_trace(self.progress.step)
        with self.engine.averaged_weights(self.ema):
            totals = evaluate(
                self.engine, self.task, self.validation_data, self.config.data, lambda: bool(self.asked_to_stop())
            )
        if totals is None:
            return False
        metrics = self.task.metrics(totals)
        progress, value = self.progress, metrics[self.task.best_metric]
        self.metrics, progress.evaluated_at = metrics, progress.step
        if progress.best_metric is None or value > progress.best_metric:
            progress.best_metric, progress.best_step = value, progress.step
        self.monitor.evaluation(progress.step, metrics, self.task.confusion(totals))
        return True

    def save_is_due(self) -> bool:
        """At the configured steps, after an evaluation that was the best, and at the end."""
        step = self.progress.step
        return step % self.config.checkpoint.every_steps == 0 or step == self.progress.best_step or self.finished()

    def pieces(self) -> Pieces:
        """This rank's pieces of all tensors that decide the next step."""
        averages = self.ema.averages if self.ema else {}
        return self.engine.state() | {f"ema.{name}": piece for name, piece in averages.items()}

    def save(self, must: bool) -> bool:
        """Starts a checkpoint, and waits for its commit where it `must` succeed because the run ends here.

        False where one is known to have failed and the run goes on.
        """
        concluded = self.conclude_save()
        facts = {"progress": asdict(self.progress), "config": run_folder.plain(self.config)}
        self.saver.begin(self.progress.step, self.pieces(), facts)
        wait = must or not self.config.checkpoint.asynchronous
        return (not wait or self.conclude_save(must)) and concluded

    def conclude_save(self, must: bool = False) -> bool:
        """Waits for a save under way and reports it; False where it has failed.

        A failed save raises SaveError where it `must` succeed or where the configuration says so. A best result whose
        checkpoint failed does not count as the best.
        """
        saved, progress = self.saver.finish(), self.progress
        if saved is None:
            return True
        best = (saved.facts["progress"]["best_metric"], saved.facts["progress"]["best_step"])
        if saved.error and (must or self.config.checkpoint.on_error == "stop"):
            raise checkpoint.SaveError(saved.error)
        if saved.error:
            log.error("%s; training goes on, the previous checkpoint stays", saved.error)
            if best == (progress.best_metric, progress.best_step):
                progress.best_metric, progress.best_step = self.saved_best
            return False
        self.saved_best = best
        self.interruption.note_save(saved.seconds)
        self.monitor.saved(saved.step, saved.seconds, saved.stall)
        if self.world.is_main:
            text = "checkpoint of step %d saved in %.1f s; training stood still for %.1f s of it"
            log.info(text, saved.step, saved.seconds, saved.stall)
        return True

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, the same on all ranks."""
        return self.world.on_main(lambda: checkpoint.newest(self.folder.checkpoints, log.warning))

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Takes over everything from a checkpoint but the position in the data."""
        pieces = self.pieces()
        checkpoint.read_pieces(found, pieces, self.world)
        self.engine.adopt(pieces)
        self.progress = Progress(**found.manifest["progress"])
        self.saved_best = (self.progress.best_metric, self.progress.best_step)

    def resume(self) -> None:
        """Continues from the newest whole checkpoint; without any, starts at step 0."""
        self.world.on_main(lambda: checkpoint.discard_unfinished(self.folder.checkpoints))
        found = self.newest()
        if found is None:
            log.info("starting at step 0: there is no checkpoint in %s", self.folder.checkpoints)
            return
        self.restore(found)
        self.training_data.load_state_dict(self.progress.data)
        log.info("resuming after step %d from %s", self.progress.step, found.path)

    def open_reports(self) -> None:
        """Begins what this attempt reports, at the step it starts from."""

        @functools.cache
        def macs(epoch: int) -> int | None:
            return self.task.macs(self.engine.network, self.config.data.train_image_size(epoch))

        config = self.config
        size = Size(
            self.last_step, self.steps_per_epoch, config.steps.global_batch_size, self.world.size, macs,
            config.engine.precision, config.optimizer.clip_grad_norm,
        )  # fmt: skip
        resumed = Resumed(self.progress.step, self.evaluation_is_due())
        self.monitor = Monitor(self.config.monitor, self.folder, size, resumed, self.world.is_main)
        self.interruption.note_save(self.monitor.longest_save)
        self.samples = SampleLog(self.folder.samples, self.world, self.progress.step, self.config.monitor.log_samples)
