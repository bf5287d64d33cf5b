"""`make slurm-demo`: a run on a real Slurm of four nodes on this machine is preempted, loses a rank, and finishes.

The cluster is that of launch/local_slurm.py, the commands are those that a person would type. Nobody starts the run
again: its job comes back by itself, and what is left in the run's folder proves in the end that nothing was lost.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgt.training import sample_log
from launch import events, local_slurm, progress, runs, story
from launch.demo import activation, call, title
from launch.local_slurm import LocalSlurm
from launch.runs import LaunchError
from launch.wait import show_events

DATA, RUN = Path("data/digits"), Path("runs/slurm_demo")
GUARD = Path("runs/.slurm_demo")
"""Its lock keeps a second demo out of the same place."""
EPOCHS, STEPS_PER_EPOCH, BATCH = 3, 22, 64
"""Of 1,437 digits; the 29 that fill no batch are others in each epoch."""
STEPS = EPOCHS * STEPS_PER_EPOCH
SUBMIT = (
    "launch/submit.py", "--nodes", "2", "--processes-per-node", "1", "--partition", "low",
    "--config", "configs/dgt_nano_digits.yaml", "--name", RUN.name, f"steps.epochs={EPOCHS}",
    "checkpoint.every_steps=10", "monitor.log_every=1", "monitor.log_samples=true",
)  # fmt: skip
URGENT = ("sbatch", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 2")
PREEMPT_AT_STEP, STEPS_UNTIL_KILL = 12, 12
"""The first is of the run; the second counts from where the second attempt begins."""
STOPS = ("preempted", "crash")
ENDS = ("finished", "gave-up", "cancelled")
PATIENCE_SECONDS, POLL_SECONDS = 300, 0.1


def main() -> int:
    """Runs the demo; returns 0 where the run was disturbed twice, finished by itself, and lost nothing."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, local_slurm.interrupt)
    try:
        with (
            runs.locked(GUARD),
            tempfile.TemporaryDirectory(prefix="slurm-demo-", ignore_cleanup_errors=True) as folder,
            local_slurm.running(Path(folder)) as cluster,
        ):
            shutil.rmtree(RUN, ignore_errors=True)  # its job is another cluster's
            return 0 if demonstrate(cluster) and conclude(time.monotonic() - started) else 1
    except LaunchError as error:
        print(f"slurm-demo: {error}", file=sys.stderr)
        return 2


def demonstrate(cluster: LocalSlurm) -> bool:
    """Submits the run, disturbs it twice and waits for its end; whether all commands did what they should."""
    title("1. Data: scikit-learn's handwritten digits as tar shards")
    if call("-m", "data_pipeline.prepare", "digits", "--out", str(DATA)):
        return False
    title("2. A Slurm of four nodes on this machine")
    typed("sinfo")
    title("3. Training on two of them: submitted once")
    if call(*SUBMIT):
        return False
    console = Console()
    console.wait_for(lambda: steps_done() >= PREEMPT_AT_STEP, f"step {PREEMPT_AT_STEP}")
    title(f"4. After step {steps_done()}, a job of the partition that goes first wants all nodes")
    typed(*URGENT)
    console.wait_for(lambda: len(noted("started")) == 2, "the second attempt")
    wanted = noted("started")[1].get("step", 0) + STEPS_UNTIL_KILL
    console.wait_for(lambda: steps_done() >= wanted, f"step {wanted}")
    title(f"5. After step {steps_done()}, one rank is killed")
    typed("kill", "-KILL", str(process_of(1)))
    console.wait_for(lambda: len(noted("started")) == 3, "the third attempt")
    console.wait_for(lambda: noted("finished"), "the end of training")
    title("6. The whole story")
    local_slurm.wait_for(lambda: not cluster.ask("squeue", "-h").strip(), "an empty queue")
    return call("launch/jobs.py", "events", RUN.name) == 0 and call("launch/jobs.py", "list") == 0


@dataclass
class Console:
    """Shows the events of the run as they come."""

    shown: int = 0

    def wait_for(self, happened: Callable[[], object], what: str) -> None:
        """Waits until `happened` is true. Raises LaunchError where the run ends first, or it takes too long."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            last = events.read(RUN)[-1]  # before the question, as the end may be what is waited for
            has_happened = happened()
            self.shown = show_events(RUN, self.shown, "  ")
            if has_happened:
                return
            if last["event"] in ENDS:
                raise LaunchError(f"the run has ended before {what}: {last['text']}; see {RUN / 'logs'}")
            if time.monotonic() > deadline:
                raise LaunchError(f"waited {PATIENCE_SECONDS} s for {what}; see {RUN / 'logs'}")
            time.sleep(POLL_SECONDS)


def noted(kind: events.Event) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [event for event in events.read(RUN) if event["event"] == kind]


def steps_done() -> int:
    """The last step in metrics.jsonl."""
    return progress.read(RUN).step or 0


def process_of(rank: int) -> int:
    """The process of a rank in the newest attempt, by the rank's own log. Raises LaunchError where it is not alive."""
    said = runs.read_text(RUN / "logs" / f"rank-{rank}.log")
    found = re.findall(rf"rank {rank} of \d+ on \S+, process (\d+),", said)
    if not found or f"{RUN.name}/code/" not in runs.read_text(f"/proc/{found[-1]}/cmdline"):
        raise LaunchError(f"rank {rank} is not alive; see {RUN / 'logs'}")
    return int(found[-1])


def typed(*words: str) -> None:
    """Shows and runs a command. Raises LaunchError where it fails."""
    print(f"$ {shlex.join(words)}", flush=True)
    if subprocess.run(words).returncode:
        raise LaunchError(f"{words[0]} failed, see above")


def conclude(seconds: float) -> bool:
    """Says what came out, by what is in the run's folder; whether all of it is as promised."""
    title("What came out")
    restarts = story.read(RUN, runs.read_record(RUN)).restarts
    lines = progress.REPORT.findall(runs.read_text(RUN / "logs" / "rank-0.log"))
    again = len(lines) - len({step for _, _, step, _ in lines})
    wrong = [*wrong_stops(RUN), *wrong_samples(RUN), *wrong_curve(RUN)]
    metrics = progress.read(RUN, thoroughly=True).evaluation
    why = ", ".join(f"{restart.reason} (went on from step {restart.step})" for restart in restarts)
    print(f"  restarts      {len(restarts)}: {why}")
    print(f"  done twice    {again} of {STEPS} steps: those that the killed rank took with it")
    if not wrong:
        print(f"  samples       each of {EPOCHS} epochs has {STEPS_PER_EPOCH * BATCH:,} different digits, none twice")
        print(f"  curve         steps 1 to {STEPS}, each once, in TensorBoard and in metrics.jsonl")
    for problem in wrong:
        print(f"  NOT TRUE      {problem}")
    print(f"  accuracy      {metrics.get('top1', float('nan')):.1f} % of the held-out digits")
    print(f"  all of it     {seconds:.0f} s")
    print(f"  curves        {activation()}tensorboard --logdir {RUN / 'tensorboard'}")
    print(f"  files         {RUN}   (slurm/README.md says what each is)")
    print(f"  next          {activation()}python -m launch.local_slurm   (the same cluster, for you to type at)")
    return not wrong


def wrong_stops(run: Path) -> Iterator[str]:
    """What contradicts that the run was preempted, lost a rank, and finished in its third attempt."""
    told = events.read(run)
    reasons = tuple(event["reason"] for event in told if event["event"] == "stopped")
    if reasons != STOPS:
        yield f"the run stopped for {', '.join(reasons) or 'nothing'}, not for {', '.join(STOPS)}"
    if told[-1]["event"] != "finished":
        yield f"the last event is {told[-1]['event']}, not finished"


def wrong_samples(run: Path) -> Iterator[str]:
    """What contradicts that every epoch has served as many different samples as fill its batches."""
    samples = sample_log.surviving_samples(run)
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        served = [sample for step in steps for sample in samples.get(step, [])]
        if len(served) != STEPS_PER_EPOCH * BATCH or len(set(served)) != len(served):
            yield f"epoch {epoch + 1} has {len(served)} samples, {len(set(served))} of them different"


def wrong_curve(run: Path) -> Iterator[str]:
    """What contradicts that TensorBoard and metrics.jsonl have every step once, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of the restarts that are wanted here
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curve = [point.step for point in board.Scalars("train/loss")]
    rows = [row["step"] for row in progress.read_rows(run / "metrics.jsonl", None)[0] if "train/loss" in row]
    for name, steps in (("TensorBoard", curve), ("metrics.jsonl", rows)):
        if steps != list(range(1, STEPS + 1)):
            yield f"{name} does not have the steps 1 to {STEPS} once each: {len(steps)} points"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("slurm-demo: stopped; its jobs are cancelled and its cluster has ended")
        sys.exit(130)
