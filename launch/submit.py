"""Start a run, or go on with one: on this machine or through Slurm. Everything is checked before anything starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import checks, layout, options, profiles, program, submission, sweep, wait
from launch.layout import Wish
from launch.runs import LaunchError
from launch.submission import Checked, Request


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, then shows (--dry-run) or starts the job; returns the exit status."""
    parser, words = options.parser(), list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)  # argparse itself does not stop there
    chosen = parser.parse_intermixed_args(words[:end])
    chosen.overrides += words[end + 1 :]
    if not (chosen.config or chosen.prepare):
        parser.error("the following arguments are required: --config (or --prepare)")
    ignored = [f"--{name.replace('_', '-')}" for name in options.TRAINING_ONLY if getattr(chosen, name)]
    if chosen.prepare and ignored:
        parser.error(f"--prepare trains nothing: leave out {', '.join(ignored)}")
    return program.guarded("dgt-submit", lambda: prepare(chosen) if chosen.prepare else submit(chosen))


def submit(chosen: argparse.Namespace) -> int:
    """Loads the configuration, checks everything, and hands the jobs to where they run."""
    requests = requested(chosen)
    checked = [submission.check(request) for request in requests]
    if chosen.dry_run:
        for request, found in zip(requests, checked, strict=True):
            print(show(request, found))
        return 0
    problems = dict.fromkeys(problem for found in checked for problem in found.problems)
    if problems:  # of any of them
        return program.refuse("dgt-submit", *problems)
    for warning in dict.fromkeys(warning for found in checked for warning in found.warnings):
        print(f"dgt-submit: warning: {warning}", file=sys.stderr)
    refused = []
    for request in requests:
        try:
            status = submission.start(request)
        except LaunchError as error:  # of a sweep, the others start all the same: some may be active already
            refused.append(str(error))
            continue
        if status:
            return status
    if refused:
        return program.refuse("dgt-submit", *refused)
    if chosen.wait and requests[0].layout.cluster == "slurm":
        return wait.until_ended([request.run for request in requests])
    return 0


def requested(chosen: argparse.Namespace) -> list[Request]:
    """One request, or one per combination of a sweep."""
    from dgt.config import load

    profile = chosen_profile(chosen)
    wish = Wish(chosen.cluster, chosen.nodes, chosen.gpus_per_node, chosen.processes_per_node, chosen.dry_run)
    where = layout.choose(wish, profile.gpus_per_node)
    if where.cluster == "local" and chosen.max_retries is None:
        profile = replace(profile, max_retries=0)  # whoever watches a console would rather see the error
    requests = []
    for ending, overrides in sweep.combinations(chosen.sweep):
        config = load(chosen.config, [*chosen.overrides, *overrides])
        name = (chosen.name or config.name) + ending
        requests.append(Request(load(chosen.config, [*chosen.overrides, *overrides, f"name={name}"]), where, profile))
    return requests


def chosen_profile(chosen: argparse.Namespace) -> profiles.Profile:
    """The profile, under what the command line says."""
    typed = {name: getattr(chosen, name) for name in options.FROM_COMMAND_LINE}
    return profiles.load(chosen.profile, typed, ask_slurm=chosen.cluster != "local")


def show(request: Request, found: Checked) -> str:
    """What would be started, in words."""
    from launch import plan

    try:
        samples = checks.samples(request.config)[0]
    except checks.known_errors():  # it is among the problems found
        samples = None
    job = submission.described(request)
    planned = plan.Plan(request.config, request.layout, request.profile, found.network)
    return plan.describe(planned, samples, job, [*found.problems, *found.warnings])


def prepare(chosen: argparse.Namespace) -> int:
    """Runs a converter as a job array, or here."""
    from launch import prepare_here, prepare_job

    profile = prepare_job.for_parts(chosen_profile(chosen), vars(chosen))
    work = prepare_job.parse(chosen.overrides, chosen.parts)
    slurm = chosen.cluster == "slurm" or (chosen.cluster == "auto" and layout.has_slurm())
    if chosen.dry_run:
        print(prepare_job.show(work, profile) if slurm else prepare_here.show(work))
        return 0
    if slurm:
        prepare_job.submit(work, profile)
        return 0
    return prepare_here.run(work, chosen.max_retries or 0)


if __name__ == "__main__":
    sys.exit(main())
