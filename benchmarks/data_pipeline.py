"""The image pipeline against its peers, side by side in one run: python benchmarks/data_pipeline.py [--threads 1 2]

The work is the same for all: read a JPEG, decode it, random resized crop to 224x224, flip, collect uint8 batches; a
whole shuffled epoch, from a warm page cache. Every contestant lives in a process of its own and has as many threads (or
worker processes) as the others. Rounds are interleaved: each contestant serves one epoch per round while the others are
idle, so that a busy moment of the machine meets all of them; every other round goes backwards, and every second one
begins with the next contestant, so that none has the same place or the same one before it throughout. Round 0 is
not counted: it compiles, starts worker processes and warms the page cache. Ratios are to FFCV's Loader in the same
round; tables show medians over the rounds with the least and the largest. CPU time per image, of all processes of a
contestant, is less noisy than wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this folder's data_pipeline.py must not be taken for the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from benchmarks import data_resume
from benchmarks.data import report, sets
from benchmarks.data.contestants import CONTESTANTS, Task
from benchmarks.data.summary import checks, summarize
from benchmarks.data.team import ContestantError, Worker, prepare_in_worker, start_worker

_INSTALL = """\
Contestants need packages: pip install -r benchmarks/requirements-data.txt. MosaicML Streaming wants an older numpy than
this repository; give it and DALI an environment of their own that sees this one's packages behind its own:

  python -m venv .venv-bench
  SITE=lib/python$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/site-packages
  echo "$PWD/.venv/$SITE" > .venv-bench/$SITE/project.pth
  .venv-bench/bin/pip install -r benchmarks/requirements-data-peers.txt
  python benchmarks/data_pipeline.py --python streaming-pil=.venv-bench/bin/python dali-cpu=.venv-bench/bin/python

A contestant that is not installed or fails is named with its error, and the others go on.
"""


class Run:
    """One run: what was asked for, and what has been found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pythons = dict(options.python)
        self.records: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.versions: dict[str, dict[str, str]] = {}
        self.log: Path = options.folder / "workers.log"

    def fail(self, contestant: str, where: str, error: Exception) -> None:
        """Name a contestant that does not run; the others go on."""
        title = CONTESTANTS[contestant].title
        self.failures.append({"contestant": contestant, "title": title, "where": where, "error": str(error)})
        say(f"{title}: {error}")

    def python(self, contestant: str) -> str:
        """The interpreter of a contestant's worker."""
        return self.pythons.get(contestant, sys.executable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, report; with --check the exit code is 1 where a target is missed."""
    options = _parser().parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    started = time.time()
    facts = {"machine": report.machine(), "commit": report.commit(), "command": shlex.join(sys.argv)}
    images = {f"generated ({options.images})": sets.generated_files(options.folder, options.images)}
    if options.photos:
        images[f"photographs ({options.photos.stem})"] = sets.photo_files(options.folder, options.photos)
    for name, files in images.items():
        places = prepare_forms(run, name, files)
        for threads in options.threads:
            run_rounds(run, name, files, places, threads)
    rows = summarize(run.records)
    if options.resume:
        say("resume within huge data sets")
    resume = data_resume.measure() if options.resume else []
    found = checks(rows, resume)
    console = Console(width=160)
    report.print_rows(rows, run.failures, console)
    report.print_resume(resume, console)
    report.print_checks(found, console)
    if options.out:
        content = facts | {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "settings": {"rounds": options.rounds, "threads": options.threads, "batch_size": options.batch_size},
            "versions": run.versions,
            "summary": [asdict(row) for row in rows],
            "resume": resume,
            "checks": [asdict(check) for check in found],
            "failures": run.failures,
            "epochs": run.records,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot and any(row.ratio for row in rows):
        report.plot(rows, options.plot)
    return int(options.check and not all(check.passed for check in found))


def prepare_forms(run: Run, name: str, files: Path) -> dict[str, Path]:
    """Where each contestant's form of the images is; contestants whose form cannot be made are left out."""
    places: dict[str, Path] = {}
    problems: dict[str, Exception] = {}
    for contestant in run.options.contestants:
        form = CONTESTANTS[contestant].form
        folder = files if form == "files" else files.parent / form
        if form not in places and form not in problems:
            try:
                if form in sets.FORMS:
                    say(f"{name}: preparing {form}")
                    sets.prepare_form(files, form)
                elif not folder.is_dir():
                    say(f"{name}: preparing {form}")
                    prepare_in_worker(run.python(contestant), contestant, files, folder, run.log)
                places[form] = folder
            except (sets.PrepareError, ContestantError) as error:
                problems[form] = error
        if form in problems:
            run.fail(contestant, name, problems[form])
    return {
        contestant: places[CONTESTANTS[contestant].form]
        for contestant in run.options.contestants
        if CONTESTANTS[contestant].form in places
    }


def run_rounds(run: Run, name: str, files: Path, places: dict[str, Path], threads: int) -> None:
    """All rounds of one set of images with one number of threads."""
    where = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    count = sets.num_files(files)
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contestant, folder in places.items():
            task = Task(contestant, str(files), str(folder), count, threads, run.options.batch_size)
            try:
                worker, versions = start_worker(run.python(contestant), task, run.log)
            except ContestantError as error:
                run.fail(contestant, where, error)
                continue
            stack.callback(worker.stop)
            workers[contestant], run.versions[contestant] = worker, versions
        for number in range(run.options.rounds + 1):
            say(f"{where}: " + (f"round {number} of {run.options.rounds}" if number else "warming up"))
            for contestant in turns(list(workers), number):
                worker = workers[contestant]
                try:
                    epoch = worker.order(do="epoch", number=number, look=number == 0)
                except ContestantError as error:
                    run.fail(contestant, where, error)
                    del workers[contestant]
                    continue
                run.records.append({"set": name, "threads": threads, "contestant": contestant, "round": number} | epoch)


def turns(contestants: Sequence[str], number: int) -> list[str]:
    """The order of a round: each pair of rounds begins with the next contestant, and its second goes backwards."""
    first = number // 2 % len(contestants) if contestants else 0
    order = [*contestants[first:], *contestants[:first]]
    return order[::-1] if number % 2 else order


def say(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_INSTALL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=1024, help="generated images; default %(default)s")
    add("--photos", type=Path, metavar="TAR", help="a tar of JPEG files as a second set of images")
    add("--threads", type=int, nargs="+", default=[1, 2], help="threads of every contestant; default 1 2")
    add("--rounds", type=int, default=5, help="interleaved rounds; default %(default)s")
    add("--batch-size", type=int, default=64, help="default %(default)s")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME",
        help=f"default: all, which are {', '.join(CONTESTANTS)}")  # fmt: skip
    add("--python", nargs="+", type=_python, default=[], metavar="CONTESTANT=PYTHON",
        help="the interpreter of an environment in which a contestant is installed")  # fmt: skip
    add("--folder", type=Path, default=sets.REPOSITORY / "build" / "benchmarks" / "data",
        help="images and shards are made here and kept; default %(default)s")  # fmt: skip
    add("--no-resume", dest="resume", action="store_false", help="leave the resume latency out")
    add("--out", type=Path, metavar="JSON", help="write the machine, versions and every round to this file")
    add("--plot", type=Path, metavar="PNG", help="draw the ratios")
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    return parser


def _python(text: str) -> tuple[str, str]:
    contestant, _, python = text.partition("=")
    if contestant not in CONTESTANTS or not python:
        raise argparse.ArgumentTypeError(f"'{text}' is not CONTESTANT=PYTHON, such as dali-cpu=.venv-bench/bin/python")
    return contestant, python


if __name__ == "__main__":
    sys.exit(main())
