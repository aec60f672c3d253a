"""The `python` of the tests that forks is like the other one to whoever starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest


def started(python: str, folder: Path, text: str, *arguments: str, **options) -> subprocess.Popen:
    (folder / "program.py").write_text(text, encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, "program.py", *arguments], cwd=folder, **(pipes | options))


def test_program_has_the_arguments_folder_environment_and_streams_it_is_given(forking_python, tmp_path):
    text = "import os, sys\nplace = [os.getcwd(), sys.path[0], sys.executable]\n"
    text += "print(sys.argv, place, os.environ['ONLY'], 'HOME' in os.environ, input())"
    program = started(forking_python, tmp_path, text, "a b", env={"ONLY": "this"})
    out, errors = program.communicate("typed\n", timeout=60)
    place = [str(tmp_path), str(tmp_path), forking_python]
    found = f"['program.py', 'a b'] {place} this False typed\n"
    assert (out, errors, program.returncode) == (found, "", 0)


@pytest.mark.parametrize(
    ("text", "status", "last"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import atexit, sys; atexit.register(print, 'left', file=sys.stderr)", 0, "left"),
    ],
)
def test_program_ends_as_it_would(forking_python, tmp_path, text, status, last):
    program = started(forking_python, tmp_path, text)
    _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors.rstrip("\n").split("\n")[-1]) == (status, last)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_program_dies_with_the_process_that_was_killed(forking_python, tmp_path):
    program = started(forking_python, tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    inner = int(program.stdout.readline())
    assert inner != program.pid
    assert alive(inner)
    program.kill()
    program.communicate(timeout=60)
    end = time.monotonic() + 10.0
    while alive(inner) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(inner)
