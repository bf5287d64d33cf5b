"""`make demo`: the whole line on this machine, with the very commands that a person would type.

Digits to shards, training with two processes under FSDP, a Ctrl-C on purpose, a resume, an evaluation, an export.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

CONFIG = "configs/dgt_nano_digits.yaml"
DATA, RUN, WEIGHTS = Path("data/digits"), Path("runs/dgt_nano_digits"), Path("exports/dgt_nano_digits.safetensors")
REQUIRED_TOP1 = 98.0
INTERRUPT_AT_STEP = 150
"""Optimizer steps after which the demo presses Ctrl-C."""
TRAIN = ("launch/submit.py", "--config", CONFIG, "--cluster", "local", "--processes-per-node", "2")


def main() -> int:
    """Runs the demo; returns 0 where it reached the accuracy that it promises."""
    started = time.monotonic()
    if (RUN / "demo.json").exists():  # an earlier demo came to its end; one that was stopped is continued
        shutil.rmtree(RUN)
    title("1. Data: scikit-learn's handwritten digits as tar shards")
    if call("-m", "data_pipeline.prepare", "digits", "--out", str(DATA)):
        return 1
    title("2. Training: dgt_nano, two processes, FSDP; Ctrl-C on the way")
    print_grouping()
    if not interrupted_training():
        return 1
    title("3. The same command again: it resumes")
    if call(*TRAIN):
        return 1
    title("4. Evaluation and export of the best averaged weights")
    best = ("--config", CONFIG, "--checkpoint", "best")
    echo("launch/evaluate.py", *best, "--json")
    evaluated = subprocess.run([sys.executable, "launch/evaluate.py", *best, "--json"], capture_output=True, text=True)
    print(evaluated.stdout, end="")
    if evaluated.returncode:
        print(evaluated.stderr, file=sys.stderr)
        return 1
    if call("launch/export.py", *best, "--out", str(WEIGHTS)):
        return 1
    return conclude(json.loads(evaluated.stdout.splitlines()[-1]), time.monotonic() - started)


def print_grouping() -> None:
    """Says in which stages queries really are grouped, and with which numbers."""
    import timm

    import dgt  # noqa: F401  (registers the models)

    print("dgt_nano at 64x64, per stage:")
    for number, stage in enumerate(timm.create_model("dgt_nano").grouping(64, 64), start=1):
        if stage.mode == "grouped":
            what = f"{stage.num_groups} groups, each attends to its own top {stage.top_k} keys"
        else:
            what = "plain attention: no more keys than a group would choose"
        print(f"  stage {number}: {stage.tokens:>3} tokens, {what}")


def interrupted_training() -> bool:
    """Trains, and stops the job half way as Ctrl-C does; whether it ended as it should, with a checkpoint."""
    echo(*TRAIN)
    job = subprocess.Popen([sys.executable, *TRAIN])
    pressed = False
    try:
        while job.poll() is None:
            if not pressed and any(row["step"] >= INTERRUPT_AT_STEP for row in rows()):
                print("demo: pressing Ctrl-C now", flush=True)
                job.send_signal(signal.SIGINT)
                pressed = True
            time.sleep(0.2)
    except KeyboardInterrupt:
        job.wait()  # the terminal has sent it the same Ctrl-C; it saves and leaves
        raise
    saved = sorted(path.name for path in (RUN / "checkpoints").glob("step_*"))
    if job.returncode == 130 and saved:
        print(f"demo: stopped with exit status 130, newest checkpoint {saved[-1]}")
        return True
    if job.returncode == 0:
        print("demo: this run was complete already")
        return True
    print(f"demo: training ended with exit status {job.returncode}", file=sys.stderr)
    return False


def rows() -> list[dict[str, float]]:
    """The lines of metrics.jsonl that are whole; a writer that was stopped may have left a part of one."""
    path = RUN / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def conclude(metrics: dict[str, float], seconds: float) -> int:
    """Says what came out, where it is, and what to try next."""
    rates = [row["speed/images_per_s"] for row in rows() if "speed/images_per_s" in row]
    rate = sorted(rates)[len(rates) // 2]
    title("What came out")
    stops = len(list((RUN / "jobs").glob("*.interrupted")))
    story = f"interrupted {'once' if stops == 1 else f'{stops} times'} and resumed" if stops else "not interrupted"
    reached = metrics["top1"] >= REQUIRED_TOP1
    print(f"  accuracy      {metrics['top1']:.2f} % of {metrics['samples']:.0f} held-out digits "
          f"({'at least' if reached else 'MISSES the promised'} {REQUIRED_TOP1:.0f} %)")  # fmt: skip
    print(f"  training      {rate:.0f} images/s (median), {story}")
    print(f"  all of it     {seconds / 60:.1f} minutes")
    print(f"  curves        {RUN / 'tensorboard'}   (tensorboard --logdir {RUN / 'tensorboard'})")
    print(f"  weights       {WEIGHTS}   (timm.create_model('dgt_nano', num_classes=10, checkpoint_path=...))")
    print(f"  next          {activation()}python launch/submit.py --nodes 8 --config configs/dgt_b_in1k.yaml --dry-run")
    (RUN / "demo.json").write_text(json.dumps({**metrics, "seconds": seconds}) + "\n")
    return 0 if reached else 1


def activation() -> str:
    """What a person types before a command, for it to find this environment; empty where it is active already."""
    if "VIRTUAL_ENV" in os.environ or sys.prefix == sys.base_prefix:
        return ""
    return f"source {shlex.quote(os.path.relpath(Path(sys.prefix, 'bin', 'activate')))} && "


def title(text: str) -> None:
    """A heading."""
    print(f"\n== {text} ==", flush=True)


def echo(*arguments: str) -> None:
    """Shows a command as a person would type it."""
    print(f"$ {shlex.join(['python', *arguments])}", flush=True)


def call(*arguments: str) -> int:
    """Shows and runs a command with this Python; returns its exit status."""
    echo(*arguments)
    return subprocess.run([sys.executable, *arguments]).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo: stopped; make demo goes on from here")
        sys.exit(130)
