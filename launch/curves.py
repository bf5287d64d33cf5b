"""TensorBoard over the curves of several runs, for this machine only: it has no password."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from launch import status
from launch.cluster import free_port
from launch.runs import LaunchError

START_SECONDS = 120
"""How long TensorBoard may take to import everything that it needs."""
POLL_SECONDS = 0.2
ADDRESS = "127.0.0.1"


def serve(runs: Sequence[Path], port: int | None) -> int:
    """Serves the curves of these runs until Ctrl-C or SIGTERM; returns the exit status.

    `port`: None takes a free one. Raises LaunchError where TensorBoard is missing or does not start.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise LaunchError("there is no TensorBoard in this environment: pip install tensorboard")
    with tempfile.TemporaryDirectory(prefix="dgt-curves-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        logdir = link_all(runs, folder / "runs")
        port = free_port() if port is None else checked(port)
        said = folder / "tensorboard.log"
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        command = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(logdir),
            f"--host={ADDRESS}",
            f"--port={port}",
        ]
        with said.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        stack.callback(end, process)
        wait_until_it_answers(process, port, said)
        print(f"TensorBoard: http://localhost:{port}/   ({', '.join(run.name for run in runs)})")
        print("from your own machine, type there and then open that address:")
        print(f"  ssh -N -L {port}:localhost:{port} {status.user()}@{socket.gethostname()}")
        print("Ctrl-C ends it", flush=True)
        process.wait()
        raise LaunchError(f"TensorBoard has ended with status {process.returncode}: {last_words(said)}")


def checked(port: int) -> int:
    """The port. Raises LaunchError where it cannot be had."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
            listener.bind((ADDRESS, port))
    except OSError as error:
        raise LaunchError(f"port {port}: {error.strerror or error}; leave --port out to get a free one") from None
    return port


def link_all(runs: Sequence[Path], folder: Path) -> Path:
    """A folder with a link of each run's name to its curves.

    TensorBoard would walk through all checkpoints in the folder of the runs, and its --logdir_spec splits names and
    paths at commas and colons.
    """
    folder.mkdir()
    for number, run in enumerate(runs):
        link = folder / run.name
        if link.is_symlink():  # a run of the same name in another folder
            link = folder / f"{run.name}-{number}"
        link.symlink_to((run / "tensorboard").absolute())
    return folder


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, said: Path) -> None:
    """Returns when it takes connections. Raises LaunchError where TensorBoard ends instead, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LaunchError(f"TensorBoard did not start: {last_words(said)}")
        try:
            socket.create_connection((ADDRESS, port), timeout=5).close()
            return
        except OSError:
            time.sleep(POLL_SECONDS)
    raise LaunchError(f"TensorBoard has not answered on port {port} for {START_SECONDS} s: {last_words(said)}")


def last_words(said: Path) -> str:
    """The last line that TensorBoard has printed."""
    lines = said.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def stop(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends this program as Ctrl-C does, so that TensorBoard does not outlive it."""
    raise KeyboardInterrupt


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends TensorBoard where it still runs."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
