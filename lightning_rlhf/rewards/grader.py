"""Grader in a process of its own, which is ended when it takes too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from lightning_rlhf.core.checks import check_positive

PROGRAM = Path(__file__).with_name("grader_program.py")
START = 120.0
"""Most seconds until the process is ready."""


class Grader:
    """Process that grades answers one at a time, started at the first and again after each failure.

    Unlike a limit by signals this one works in every thread, beside a `TimedReward`, and on code that never returns.

    Args:
        package: `math_verify` or `reasoning_gym`.
        seconds: most wall time of one answer.

    Raises:
        ImportError: the package is not installed.
        ValueError: `seconds` is not positive.
    """

    def __init__(self, package: str, seconds: float) -> None:
        check_positive(seconds=seconds)
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise ImportError(f"this reward needs {name}: pip install 'lightning-rlhf[rewards]', or {name} alone")
        self.package, self.seconds = package, seconds
        self._process: subprocess.Popen[str] | None = None
        self._replies: SimpleQueue[str] = SimpleQueue()
        self._owner, self._lock = 0, threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it without its process."""
        return Grader, (self.package, self.seconds)

    def __call__(self, **request: Any) -> float | None:
        """Return the score of an answer; None if the grader failed or took too long.

        Raises:
            RuntimeError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # that of another process, before it forked
                self._start()
            try:
                reply = self._reply(json.dumps(request), self.seconds)
            except BaseException:  # an interrupt: its reply would be taken for the next one's
                self._stop()
                raise
            if reply is None:
                self._stop()
            return None if reply is None else reply.get("score")

    def _start(self) -> None:
        command = [sys.executable, "-P", str(PROGRAM), self.package]
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, encoding="utf-8", **pipe)
        self._replies, self._owner = SimpleQueue(), os.getpid()
        weakref.finalize(self, _end, self._process)
        threading.Thread(target=_pump, args=(self._process, self._replies), daemon=True).start()
        reply = self._reply(None, START)
        if reply is None or "problem" in reply:
            self._stop()
            why = "no reply" if reply is None else reply["problem"]
            raise RuntimeError(
                f"{self.package} does not start in a process of its own ({why}): try `import {self.package}`"
            )

    def _reply(self, request: str | None, seconds: float) -> dict[str, Any] | None:
        """Send a request and return the reply; None if the process ended or is late."""
        process: Any = self._process
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            line = self._replies.get(timeout=seconds)
        except (Empty, BrokenPipeError):
            return None
        return json.loads(line) if line else None

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = None


def _pump(process: subprocess.Popen[str], replies: SimpleQueue[str]) -> None:
    """Put each line of a process into a queue, and an empty one at its end."""
    for line in process.stdout or ():
        replies.put(line)
    replies.put("")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
