"""One contestant in a process of its own: python -m benchmarks.data.worker, driven by lines of JSON.

Orders come in on stdin, one answer to each goes out on what was stdout (libraries that print go to stderr instead):

    {"do": "prepare", "contestant", "files", "folder"}   -> {}
    {"do": "start", "task": {...}}                       -> {"versions": {...}}
    {"do": "epoch", "number": 3}                         -> what `measure_epoch` gives
    {"do": "stop"}                                       -> {}, and the process ends

An answer with "error" says that the contestant failed and how.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.data.contestants import Running, Task, module_of
from benchmarks.data.processes import anonymous_bytes, cpu_seconds


def main() -> None:
    """Obey until told to stop or until the parent is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    running: Running | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if order["do"] == "prepare":
                module_of(order["contestant"]).prepare(order["files"], order["folder"])
            elif order["do"] == "start":
                task = Task(**order["task"])
                running = module_of(task.contestant).start(task)
                answer = {"versions": running.versions}
            elif order["do"] == "epoch" and running is not None:
                answer = measure_epoch(running.epoch(order["number"]), order.get("look", False))
            elif order["do"] == "stop" and running is not None:
                running.close()
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if order["do"] == "stop":
            break
    answers.close()


def measure_epoch(batches: Iterator[Any], look: bool) -> dict[str, Any]:
    """Take every batch of an epoch and drop it.

    Gives `images`, wall `seconds`, `cpu_seconds` and `anonymous_bytes` (at the end) of this process and all below it;
    with `look`, outside of any measurement that counts, also `shape`, `dtype` and the `mean` of the pixels.
    """
    images, sums, shape, dtype = 0, 0.0, (), ""
    cpu, started = cpu_seconds(), time.perf_counter()
    for batch in batches:
        images += len(batch)
        if look:
            shape, dtype = tuple(batch.shape[1:]), str(batch.dtype).removeprefix("torch.")
            sums += float(np.asarray(batch).mean()) * len(batch)
    seconds = time.perf_counter() - started
    result = {
        "images": images,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "anonymous_bytes": anonymous_bytes(),
    }
    return result | ({"shape": shape, "dtype": dtype, "mean": sums / max(1, images)} if look else {})


if __name__ == "__main__":
    main()
