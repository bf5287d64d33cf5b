"""SIGKILL or Ctrl-C in the middle, then the same command again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.prepare import main

# Sends the program a signal when one image is asked for, from whichever process asks: the program itself, or a worker.
PROGRAM = """
import dataclasses, functools, multiprocessing, os, signal, sys
from pathlib import Path
from data_pipeline.prepare import cli
from data_pipeline.prepare.imagefolder import list_image_folder

def read(real, fatal, item):
    if item.name == fatal:
        parent = multiprocessing.parent_process()
        os.kill(parent.pid if parent else os.getpid(), SIGNAL)
        if SIGNAL == signal.SIGKILL:
            signal.pause()  # a worker gets here, and must be ended although it is waiting
    return real(item)

def listing(arguments):
    found = list_image_folder(arguments.src, arguments.splits, arguments.val_fraction)
    return dataclasses.replace(found, read=functools.partial(read, found.read, FATAL))

if __name__ == "__main__":
    cli._list_source = listing
    sys.exit(cli.main(sys.argv[1:]))
"""


# One worker takes the lock of the progress counter and waits; the program kills it when it next shows its progress.
LOCKED = """
import contextlib, dataclasses, functools, os, signal, sys
from pathlib import Path
from data_pipeline.prepare import cli, parallel
from data_pipeline.prepare.imagefolder import list_image_folder

NOTE = Path(__file__).with_suffix(".pid")

def read(real, fatal, item):
    if item.name == fatal:
        parallel._images_done.get_lock().acquire()
        NOTE.with_suffix(".new").write_text(str(os.getpid()))
        NOTE.with_suffix(".new").rename(NOTE)
        signal.pause()
    return real(item)

def listing(arguments):
    found = list_image_folder(arguments.src, arguments.splits, arguments.val_fraction)
    return dataclasses.replace(found, read=functools.partial(read, found.read, FATAL))

def update(images):
    if NOTE.exists():
        os.kill(int(NOTE.read_text()), signal.SIGKILL)

if __name__ == "__main__":
    cli._list_source = listing
    parallel.progress_bar = lambda what, total: contextlib.nullcontext(update)
    sys.exit(cli.main(sys.argv[1:]))
"""


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _images_of(shard: Path) -> list[str]:
    from data_pipeline.shards import shard_index

    return [f"{shard.parent.name}/{key}.jpg" for key in shard_index.load(shard.with_suffix(".idx")).keys]


def _run_until(tmp_path: Path, arguments: list[str], fatal: str, kind: signal.Signals) -> tuple[int, str]:
    return _run(tmp_path, PROGRAM.replace("FATAL", repr(fatal)).replace("SIGNAL", f"signal.{kind.name}"), arguments)


def _run(tmp_path: Path, text: str, arguments: list[str]) -> tuple[int, str]:
    program = tmp_path / "program.py"
    program.write_text(text)
    process = subprocess.Popen([sys.executable, str(program), *arguments], stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=60)  # ends only when the workers, who share the pipe, have ended too
    finally:
        process.kill()
    return process.returncode, error


def _run_until_killed(tmp_path: Path, arguments: list[str], fatal: str) -> None:
    assert _run_until(tmp_path, arguments, fatal, signal.SIGKILL)[0] == -signal.SIGKILL


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_run_is_continued_with_its_finished_shards_kept(
    shard_folder: Path, shard_source: Path, tmp_path: Path, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", jobs]
    fatal = _images_of(shard_folder / "train" / "shard-000003.tar")[3]
    _run_until_killed(tmp_path, arguments, fatal)
    assert not (out / "index.json").exists()
    finished = {path: path.stat() for path in out.rglob("*.idx")}
    assert out / "train" / "shard-000003.idx" not in finished
    assert len(finished) >= (3 if jobs == "1" else 1)

    assert main(arguments) == 0
    assert f"{6 - len(finished)} shards written, {len(finished)} kept" in capsys.readouterr().out
    for path, status in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert _contents(out) == _contents(shard_folder)


def test_a_worker_killed_while_it_holds_the_counter_s_lock_ends_the_run_and_does_not_hang_it(
    shard_folder: Path, shard_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", "2"]
    fatal = _images_of(shard_folder / "train" / "shard-000001.tar")[2]
    code, error = _run(tmp_path, LOCKED.replace("FATAL", repr(fatal)), arguments)
    assert code == 1
    assert "error: A worker process died" in error
    assert main(arguments) == 0
    assert _contents(out) == _contents(shard_folder)


def test_a_shard_that_was_damaged_in_between_is_written_again(
    shard_folder: Path, shard_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", "1"]
    _run_until_killed(tmp_path, arguments, _images_of(shard_folder / "train" / "shard-000003.tar")[3])
    tar = out / "train" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert main(arguments) == 0
    assert "4 shards written, 2 kept" in capsys.readouterr().out
    assert _contents(out) == _contents(shard_folder)


def test_what_a_killed_run_left_half_written_is_cleared_away(
    shard_folder: Path, shard_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", "1"]
    _run_until_killed(tmp_path, arguments, _images_of(shard_folder / "train" / "shard-000000.tar")[2])
    assert [path.name.startswith(".unfinished-") for path in (out / "train").iterdir()] == [True]
    assert main(arguments) == 0
    assert _contents(out) == _contents(shard_folder)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_ends_with_code_130_leaves_nothing_half_written_and_can_be_continued(
    shard_folder: Path, shard_source: Path, tmp_path: Path, jobs: str
) -> None:
    out = tmp_path / "out"
    arguments = ["imagefolder", "--src", str(shard_source), "--out", str(out), "--shard-size", "6", "--jobs", jobs]
    fatal = _images_of(shard_folder / "train" / "shard-000000.tar")[2]
    code, error = _run_until(tmp_path, arguments, fatal, signal.SIGINT)
    assert (code, error.splitlines()[-1]) == (
        130,
        "interrupted; run the same command again to continue: finished shards are kept.",
    )
    assert "Traceback" not in error
    assert list(out.rglob(".unfinished-*")) == []
    assert main(arguments) == 0
    assert _contents(out) == _contents(shard_folder)
