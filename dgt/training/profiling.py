"""Traces of a few optimizer steps: which operations ran when, on the host and on the GPU.

    RUN/profile                                        a request: the number of steps; removed when it is taken
    RUN/profiles/steps-00000010-00000012.pt.trace.json.gz
        Chrome's trace format: open it with ui.perfetto.dev, chrome://tracing, or TensorBoard's profiler plugin

Only rank 0 looks, and only it is traced: no other rank waits for it but in the collectives that it reaches later.
Nothing that is computed depends on it. At most 10 steps make a trace, and the newest 8 traces are kept.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("dgt")

MAX_STEPS, MAX_TRACES = 10, 8
SUFFIX = ".pt.trace.json.gz"


def check_range(steps: tuple[int, ...]) -> None:
    """Raises ValueError unless `steps` is empty or a first and a last step, not too far apart."""
    if not steps:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] < steps[0] + MAX_STEPS:
        raise ValueError(
            f"profile_steps: must be the first and the last step, at most {MAX_STEPS} of them, such as [10, 12]; "
            f"got {list(steps)}"
        )


class Profiler:
    """Traces the steps that the configuration names, and those that a person asks for while the run goes on."""

    def __init__(self, steps: tuple[int, ...], run: Path, is_main: bool):
        self.first, self.last = steps or (0, -1)
        self.request, self.folder = run / "profile", run / "profiles"
        self.is_main = is_main
        self.running: profile | None = None
        self.begun = self.until = 0

    def before(self, step: int) -> None:
        """Begins a trace where `step` is the first of one."""
        if not self.is_main or self.running is not None:
            return
        count = self.last - step + 1 if self.first <= step <= self.last else self.requested()
        if count > 0:
            self.start(step, count)

    def after(self, step: int) -> None:
        """Ends a trace where `step` is its last."""
        if self.running is not None and step >= self.until:
            self.end(step)

    def requested(self) -> int:
        """Steps that the file of the run's folder asks for, which is taken away; 0 where there is none."""
        try:
            text = self.request.read_text().strip()
            if not text:  # it is being written
                return 0
            self.request.unlink()
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeDecodeError) as error:
            log.warning("%s cannot be taken: %s", self.request, error)
            return 0
        if not text.isdecimal() or not int(text):
            log.warning("%s should hold a number of steps, such as 3; it held %r", self.request, text[:40])
            return 0
        if int(text) > MAX_STEPS:
            log.warning("%s asks for %s steps; a trace has at most %d", self.request, text, MAX_STEPS)
        return min(int(text), MAX_STEPS)

    def start(self, step: int, count: int) -> None:
        """Traces from here on."""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        tracer = profile(activities=activities)
        try:
            with warnings.catch_warnings():  # of events that get lost between the cycles of a schedule; there is none
                warnings.simplefilter("ignore", UserWarning)
                tracer.start()
        except RuntimeError as error:  # another profiler watches this process, or CUPTI may not be used
            log.warning("steps from %d on cannot be traced: %s", step, error)
            return
        self.running, self.begun, self.until = tracer, step, step + count - 1

    def end(self, step: int) -> None:
        """Writes the trace of what was run; a full disk costs the trace, not the run."""
        tracer, self.running = self.running, None
        if tracer is None:
            return
        name = f"steps-{self.begun:08d}-{step:08d}{SUFFIX}"
        plain, unfinished = self.folder / f".{name.removesuffix('.gz')}", self.folder / f".{name}"
        try:
            tracer.stop()
            self.folder.mkdir(exist_ok=True)
            tracer.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=5) as compressed:
                shutil.copyfileobj(source, compressed, 1 << 20)  # torch would compress line by line
            os.replace(unfinished, self.folder / name)
            traces = sorted(self.folder.glob(f"steps-*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
            for old in traces[:-MAX_TRACES]:
                old.unlink()
            log.info("trace of steps %d to %d: %s", self.begun, step, self.folder / name)
        except (OSError, RuntimeError) as error:
            log.error(
                "the trace of steps %d to %d could not be written to %s: %s", self.begun, step, self.folder, error
            )
        finally:
            for path in (plain, unfinished):
                with suppress(OSError):
                    path.unlink()
