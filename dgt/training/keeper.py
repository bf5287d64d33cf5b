"""Keeping a run's state: what a checkpoint holds, when one counts, and to which one a run returns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from dgt.training import checkpoint, retention, run_folder
from dgt.training.ema import Ema
from dgt.training.parallel import Engine
from dgt.training.pieces import Pieces
from dgt.training.run_folder import RunFolder
from dgt.training.saver import Saved, Saver
from dgt.training.state import Progress
from dgt.training.world import World

if TYPE_CHECKING:
    from dgt.config import Config

log = logging.getLogger("dgt")


class Keeper:
    """One rank's part in saving and restoring a run; all ranks call the same methods in the same order."""

    def __init__(self, config: Config, world: World, engine: Engine, progress: Progress, permit: Callable[[], None]):
        """`progress` is saved with the tensors, and overwritten by what is restored; `permit`: see `Saver`."""
        self.config, self.world, self.engine, self.progress = config, world, engine, progress
        self.ema = Ema(engine.weights(), config.ema) if config.ema.enabled else None
        self.folder = RunFolder(config.run_dir).checkpoints
        self.saver = Saver(self.folder, world, permit, config.checkpoint)
        self.lost_best: tuple[float | None, int | None] = None, None
        """Value and step of the last best result whose checkpoint failed."""
        self.saved = asdict(progress)
        """The progress of the newest checkpoint; where there is none, that of a beginning."""
        self.report: Callable[[Saved], None] = lambda saved: None
        """Called with each new checkpoint; one whose manifest alone was replaced is none."""

    def pieces(self) -> Pieces:
        """This rank's pieces of all tensors that decide the next step."""
        averages = self.ema.averages if self.ema else {}
        return self.engine.state() | {f"ema.{name}": piece for name, piece in averages.items()}

    def save(self) -> bool:
        """Begins a checkpoint; False where one is known to have failed, this or the one before."""
        concluded, progress = self.conclude(), self.progress
        if progress.step == self.lost_best[1]:  # its checkpoint is tried again
            progress.best_metric, progress.best_step = self.lost_best
        facts = {"progress": asdict(self.progress), "config": run_folder.plain(self.config)}
        self.saver.begin(self.progress.step, self.pieces(), facts)
        return concluded and (self.config.checkpoint.asynchronous or self.conclude())

    def let_change(self) -> None:
        """Waits until weights, moments and averages may change; called before each change."""
        self.saver.let_change()

    def conclude_if_done(self) -> None:
        """Reports a save that has ended beside the training."""
        if self.saver.is_done():
            self.conclude()

    def conclude(self, must: bool = False) -> bool:
        """Waits for a save under way and reports it; False where it has failed and the run goes on.

        Raises SaveError where it `must` succeed or the configuration says so. A best result whose checkpoint failed
        does not count as the best.
        """
        saved, progress = self.saver.finish(), self.progress
        if saved is None:
            return True
        if saved.error and (must or self.config.checkpoint.on_error == "stop"):
            raise checkpoint.SaveError(saved.error)
        if saved.error:
            log.error("%s; training goes on, the previous checkpoint stays", saved.error)
            lost = saved.facts["progress"]["best_metric"], saved.facts["progress"]["best_step"]
            # Where only a manifest was to be replaced, the checkpoint of that step is there all the same.
            if saved.step != self.saved["step"] and progress.best_step == lost[1] != self.saved["best_step"]:
                progress.best_metric, progress.best_step = self.saved["best_metric"], self.saved["best_step"]
                self.lost_best = lost
            return False
        is_new = saved.step != self.saved["step"]
        self.saved = saved.facts["progress"]
        if is_new:
            text = "checkpoint of step %d saved in %.1f s; training stood still for %.1f s of it"
            log.info(text, saved.step, saved.seconds, saved.stall)
            self.report(saved)
        return True

    def save_the_end(self) -> None:
        """Sees to it that the newest checkpoint is of this very progress. Raises SaveError."""
        self.conclude()
        if self.saved != asdict(self.progress):
            self.save()
            self.conclude(must=True)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint's tensors and progress; a best result whose checkpoint has gone does not count.

        Raises CheckpointError, UnreadableError.
        """
        try:
            progress = Progress(**found.manifest["progress"])
        except (KeyError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{found.path}: its progress is of another version: {error}") from None
        best = self.folder / f"step_{progress.best_step or 0:08d}"
        if progress.best_step is not None and not self.world.on_main(lambda: best in checkpoint.committed(self.folder)):
            log.warning("the best result, of step %d, is forgotten: %s has gone", progress.best_step, best)
            progress.best_metric = progress.best_step = None
        pieces = self.pieces()
        checkpoint.read_pieces(found, pieces, self.world)
        self.engine.adopt(pieces)
        self.saved = asdict(progress)
        vars(self.progress).update(asdict(progress))

    def resume(self) -> bool:
        """Restores the newest whole checkpoint; False where there is none."""

        def find() -> checkpoint.Checkpoint | None:
            retention.discard_unfinished(self.folder)
            retention.abandon(self.folder)  # what a return to an older one that was cut off has not come to
            return checkpoint.newest(self.folder, log.warning)

        found = self.world.on_main(find)
        if found is None:
            log.info("starting at step 0: there is no checkpoint in %s", self.folder)
            return False
        self.restore(found)
        log.info("resuming after step %d from %s", self.progress.step, found.path)
        return True

    def return_point(self) -> checkpoint.Checkpoint | None:
        """The checkpoint that bad steps lead back to, the same on all ranks; None where there is none.

        The newest from which a good step was taken. One of this very step is of the weights that only bad steps come
        from; one that the run has gone back to before has led to bad steps again. Both are returned to only where
        there is no older one.
        """

        def find() -> checkpoint.Checkpoint | None:
            newest = checkpoint.newest(self.folder, log.warning)
            if newest is None or newest.step not in (self.progress.step, self.progress.returned_to):
                return newest
            for path in checkpoint.committed(self.folder)[1:]:
                try:
                    return checkpoint.verify(path)
                except checkpoint.DamagedError as error:
                    log.warning("checkpoint passed over: %s", error)
            return newest

        self.conclude()
        return self.world.on_main(find)

    def return_to(self, found: checkpoint.Checkpoint, rollbacks: int) -> None:
        """Restores all but the position in the data, and saves that at once, so that no interruption forgets it.

        Checkpoints of later steps lose their names: no attempt goes on from them. A resume does it where this is cut
        off, and knows them by the smaller number of `rollbacks`.
        """
        data = self.progress.data
        self.restore(found)
        self.progress.data, self.progress.rollbacks, self.progress.bad_in_a_row = data, rollbacks, 0
        self.progress.returned_to = found.step
        self.save()
        self.conclude(must=True)
        self.world.on_main(lambda: retention.abandon(self.folder))

    def close(self) -> None:
        """Lets go of a save under way; called at the end, however it came."""
        self.saver.close()
