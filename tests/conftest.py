from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Many processes and threads share few cores here: an idle one must sleep, not spin. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if os.environ.get("CI") == "true":  # everything is installed there: a package that is missing is a failure, not a skip
    pytest.importorskip = lambda name, *_, **__: importlib.import_module(name)  # type: ignore[assignment]


# A shell starts its background jobs with SIGINT ignored, and they hand that on; tests interrupt programs with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def why_no_ffcv() -> str:
    """Why the ffcv package cannot be used here; empty where it can."""
    try:
        from ffcv import loader  # noqa: F401
    except ImportError as error:
        return f"ffcv cannot be imported ({error}): make setup-test installs it"
    return ""


@functools.cache
def why_no_deepspeed() -> str:
    """Why DeepSpeed cannot be used here; empty where it is installed."""
    return "" if importlib.util.find_spec("deepspeed") else "deepspeed is not installed: make setup-test does"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ffcv or deepspeed are skipped where it cannot be used, but not under CI."""
    for marker, why_not in (("ffcv", why_no_ffcv), ("deepspeed", why_no_deepspeed)):
        if item.get_closest_marker(marker) and why_not():
            pytest.fail(why_not()) if os.environ.get("CI") == "true" else pytest.skip(why_not())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
