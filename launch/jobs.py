"""Look at runs and steer them: their state, logs and story; cancel, resume, curves. Starts without torch, at once."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: what is imported must come from beside it, and `launch` is a package
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

from launch import cluster, events, follow, program, runs, status, story, tables
from launch.runs import LaunchError
from launch.status import RunStatus

PROGRAM = "dgt-jobs"
RUNS = Path("runs")
LINES = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status: 2 with one sentence where it cannot be done."""
    options = parser().parse_args(argv)
    options.runs = Path(getattr(options, "runs", RUNS))
    try:
        done: int = options.act(options)
        sys.stdout.flush()
        return done
    except LaunchError as error:
        return program.refuse(PROGRAM, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # its reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return program.refuse(PROGRAM, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--runs", metavar="DIR", default=argparse.SUPPRESS, help=f"folder of all runs (default: {RUNS})"
    )
    result = argparse.ArgumentParser(
        prog=PROGRAM,
        parents=[common],
        description="Look at runs and steer them. RUN is a run's name in the folder of all runs, or the path of "
        "a run's folder.",
    )
    commands = result.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, act: object, text: str, run: str | None = "RUN") -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(act=act)
        if run:
            made.add_argument("run", metavar=run, help="name or folder of a run")
        return made

    listed = command("list", list_runs, "a table of all runs", run=None)
    shown = command("status", show_status, "all that is known of one run, and what to type next")
    logs = command("logs", show_logs, "the end of a log; with -f also what comes, over all restarts")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended, or until Ctrl-C")
    whose = logs.add_mutually_exclusive_group()
    whose.add_argument(
        "--rank", type=int, default=0, metavar="N", help="whose log (default: 0, which reports progress)"
    )
    whose.add_argument("--batch", action="store_true", help="the log of Slurm's batch script")
    logs.add_argument(
        "-n",
        "--lines",
        type=line_count,
        default=LINES,
        metavar="N",
        help=f"lines of its end, or all (default: {LINES})",
    )
    told = command("events", show_events, "the story of a run: starts, stops and their reasons")
    for one in (listed, shown, told):
        one.add_argument("--json", action="store_true", help="for programs")
    cancel_parser = command("cancel", cancel, "stop a run for good; resume goes on with it")
    cancel_parser.add_argument("--yes", action="store_true", help="do not ask")
    command("resume", resume, "submit the last job of a run again, exactly as it was")
    board = command("tensorboard", tensorboard, "show curves with TensorBoard, on this machine only", run=None)
    board.add_argument("names", nargs="*", metavar="RUN", help="name or folder of a run (default: all)")
    board.add_argument("--port", type=port_number, metavar="P", help="default: a free one")
    return result


def line_count(text: str) -> int | None:
    """A number of lines; None for all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of lines nor `all`")
    return int(text)


def port_number(text: str) -> int:
    """A TCP port."""
    if not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: use a number from 1 to 65535")
    return int(text)


def list_runs(options: argparse.Namespace) -> int:
    """The table of all runs."""
    found = status.collect(status.all_runs(options.runs))
    if options.json:
        print(json.dumps([one.facts() for one in found], indent=1))
        return 0
    if found:
        tables.show_runs(found)
    else:
        print(f"there are no runs in {options.runs}")
    for problem in dict.fromkeys(problem for one in found for problem in one.problems):
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
    return 0


def look_at(options: argparse.Namespace) -> RunStatus:
    """The status of the run that was asked for. Raises LaunchError where there is none, or its record is damaged."""
    run = status.find(options.runs, options.run)
    runs.read_record(run)
    return status.collect([run], thoroughly=True)[0]


def show_status(options: argparse.Namespace) -> int:
    """The page of one run."""
    found = look_at(options)
    if options.json:
        print(json.dumps(found.facts(), indent=1))
    else:
        tables.show_run(found, tables.command_name(options.runs, RUNS), options.run)
    return 0


def show_logs(options: argparse.Namespace) -> int:
    """The end of a log, and what comes."""
    run = status.find(options.runs, options.run)
    path = follow.log_file(run, None if options.batch else options.rank)
    if not options.follow:
        follow.check_exists(path)
    log = follow.Log(path, follow.last_lines(path, options.lines))
    log.show()
    if options.follow:
        runs.read_record(run)  # where this is damaged, the end of the run cannot be known
        watch = follow.Watch([run])
        if not watch.has_ended():
            missing = () if path.exists() else (f"waiting for {path}; the run is {watch.found[0].end}",)
            for line in (*watch.problems, *missing):
                print(f"{PROGRAM}: {line}", file=sys.stderr)
        follow.follow(log, watch.has_ended)
        print(f"{PROGRAM}: the run is {watch.found[0].end}", file=sys.stderr)
    return 0


def show_events(options: argparse.Namespace) -> int:
    """The timeline."""
    run = status.find(options.runs, options.run)
    noted = events.read(run)
    if options.json:
        print(json.dumps(noted, indent=1))
    elif noted:
        tables.show_timeline(noted)
    else:
        print(f"nothing is noted in {run / events.FILE}")
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Stops a run, after a question where somebody can answer it."""
    found = cancellable(options)
    print(what_happens(found))
    if not options.yes:
        if not is_agreed():
            print("nothing was changed")
            return 1
        asked, found = found, cancellable(options)  # it may have ended while nobody answered, or be another job by now
        if holder(found) != holder(asked):
            raise LaunchError(f"meanwhile the run {found.name} has another job than the one that was shown")
    (cancel_in_slurm if is_in_slurm(found) else cancel_here)(found)
    command = tables.command_name(options.runs, RUNS)
    print(f"done; `{command} events {options.run}` tells how it ends, `{command} resume {options.run}` goes on with it")
    return 0


def cancellable(options: argparse.Namespace) -> RunStatus:
    """The status of the run that was asked for. Raises LaunchError where there is nothing to cancel, or no way to."""
    found = look_at(options)
    if found.is_active is None:
        raise LaunchError(f"{'; '.join(found.problems)}. Nothing was cancelled")
    if not found.is_active:
        raise LaunchError(f"the run {found.name} is not active ({found.state}), so there is nothing to cancel")
    if found.story.end == story.FINISHED or (
        found.story.is_final and found.entry and found.entry.state == "COMPLETING"
    ):
        raise LaunchError(
            f"the run {found.name} has ended already ({found.story.end}: {found.story.why}); its job leaves by itself"
        )
    if not is_in_slurm(found) and found.state == "locked":
        raise LaunchError(
            f"the run {found.name} has no job in Slurm, but {found.detail}; wait for it, or stop that process"
        )
    if not is_in_slurm(found) and status.launcher_of(found.path) is None:
        raise LaunchError(
            f"the run {found.name} is held by {found.detail}, which is not (or no longer) a process of this machine, "
            f"{status.this_host()}; stop it on its own"
        )
    return found


def is_in_slurm(found: RunStatus) -> bool:
    """Whether its job waits, runs or is leaving in Slurm."""
    return found.entry is not None and found.entry.is_active


def holder(found: RunStatus) -> tuple[str, str | int | None]:
    """What would be ended: the submission, and Slurm's number for it or that of the launcher's process."""
    number = found.entry.number if found.entry and is_in_slurm(found) else status.launcher_of(found.path)
    return found.record.token if found.record else "", number


def what_happens(found: RunStatus) -> str:
    """What cancelling the run does, in words."""
    _, number = holder(found)
    if not is_in_slurm(found):
        return (
            f"process {number} trains the run {found.name} on this machine; it is told to save and leave, as by Ctrl-C"
        )
    if found.state == "PENDING":
        return f"Slurm job {number} of the run {found.name} waits; it leaves the queue, and no work is lost"
    return (
        f"Slurm job {number} of the run {found.name} is {found.state} on {found.nodes}; its ranks are told to save "
        "and killed after Slurm's KillWait (30 s unless the cluster has changed it). It is not requeued"
    )


def cancel_in_slurm(found: RunStatus) -> None:
    """Ends the job, and then notes who wanted it. Raises LaunchError where Slurm does not do it.

    Nothing is noted before, which would be wrong where scancel fails. Where this program dies in between, the job's
    batch script notes that it was cancelled; of a job that had not started, Slurm tells it.
    """
    assert found.entry is not None
    number = found.entry.number
    answer = cluster.ask("scancel", number)
    if answer is None or answer.returncode:
        why = " ".join(answer.stderr.split()) or "no reason given" if answer else "it is not installed or says nothing"
        raise LaunchError(f"scancel {number} failed, so the job may go on: {why}. Cancel it again")
    after = status.collect([found.path])[0].entry  # scancel also succeeds where it does nothing
    if after and after.is_active and after.state != "COMPLETING":
        raise LaunchError(f"scancel {number} has had no effect, the job is {after.state}. Cancel it again")
    token = found.record.token if found.record else None
    try:
        events.note(
            found.path, "cancelled", f"cancelled by {status.user()} with launch/jobs.py", job=number, token=token
        )
    except OSError as error:
        print(f"{PROGRAM}: warning: not noted in {events.FILE}: {error.strerror or error}", file=sys.stderr)


def cancel_here(found: RunStatus) -> None:
    """Asks the launcher on this machine to save and leave, as Ctrl-C does. Raises LaunchError where it cannot."""
    process = status.launcher_of(found.path)
    try:
        if process is None:
            raise ProcessLookupError
        os.kill(process, signal.SIGINT)
    except ProcessLookupError:
        raise LaunchError("the process has just ended by itself") from None
    except PermissionError:
        raise LaunchError(f"process {process} is another user's, so it cannot be told to stop") from None


def is_agreed() -> bool:
    """Whether it is to be done. Raises LaunchError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise LaunchError("there is no terminal to ask on; --yes says that it is meant")
    try:
        answer = input("Cancel it? [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")


def resume(options: argparse.Namespace) -> int:
    """Submits the last job again."""
    found = look_at(options)
    if found.record is None:
        raise LaunchError(
            f"the run {found.name} was never submitted, so there is nothing to repeat: "
            f"python launch/submit.py --config FILE --name {found.name}"
        )
    if found.story.end == story.FINISHED:
        raise LaunchError(f"the run {found.name} is finished ({found.story.why}); {how_to_go_further(found.path)}")
    from launch import submission

    return program.guarded(PROGRAM, lambda: submission.resume(found.path))


def how_to_go_further(run: Path) -> str:
    """How a finished run can be trained for longer."""
    import yaml

    try:
        steps = yaml.safe_load((run / "config.yaml").read_text())["steps"]["max_steps"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        steps = 0
    if steps:
        return f"it ended at steps.max_steps={steps}: submit its configuration again with a larger one to train longer"
    return "to train longer, submit its configuration under another --name with more steps.epochs"


def tensorboard(options: argparse.Namespace) -> int:
    """Curves."""
    wanted = [status.find(options.runs, name) for name in options.names] or status.all_runs(options.runs)
    found = [run.absolute() for run in wanted if (run / "tensorboard").is_dir()]
    for run in wanted if options.names else ():
        if run.absolute() not in found:
            print(f"{PROGRAM}: {run} has no curves yet", file=sys.stderr)
    if not found:
        raise LaunchError(f"no run {'of these' if options.names else f'in {options.runs}'} has a tensorboard folder")
    from launch import curves

    return curves.serve(found, options.port)


if __name__ == "__main__":
    sys.exit(main())
