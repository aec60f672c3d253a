"""Sides that take turns: one process each, and only the one that holds the baton computes.

A worker hands in one JSON line for every turn. Both ends of the pipe are here; this file and `work.py` import no
torch, so that the process which waits is small and a worker's peak memory is its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from work import Work

HERE = Path(__file__).parent
SCRIPTS = {"ours": "ours.py", "trl": "trl_side.py", "floor": "floor.py"}
Row = dict[str, Any]


class Turns:
    """The worker's end: measures what lies between two calls of `next`.

    Args:
        wait: for what the device still has to do.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait = wait
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print; only turns go to the pipe
        self._start: tuple[float, float] | None = None

    def next(self, found: Mapping[str, float] | None = None) -> None:
        """End the turn, hand in its measures and what was `found`, wait for the next."""
        row: Row = {}
        self._wait()
        if self._start is not None:
            wall, cpu = (now - before for now, before in zip(self._now(), self._start, strict=True))
            row = {"wall": wall, "cpu": cpu, "rss": peak_rss(), **(found or {})}
        print(json.dumps(row), file=self._out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # nobody asks for more
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def peak_rss() -> float:
    """Largest resident memory of this process so far, MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Worker:
    """The other end: a side's process, which sleeps until it is asked for a turn."""

    def __init__(self, side: str, work: Work, threads: int) -> None:
        self.side = side
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / SCRIPTS[side]), work.json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(threads),
        )
        self._read()  # it has loaded and waits

    def turn(self) -> Row:
        """One turn's measures.

        Raises:
            RuntimeError: the worker ended.
        """
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return {"side": self.side, **self._read()}

    def close(self) -> None:
        """Nobody asks for more turns: it ends."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> Row:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the process of side {self.side!r} ended:\n{self._errors.read()[-4000:]}")
        return json.loads(line)


def environment(threads: int) -> dict[str, str]:
    """Without the hub, and with threads that do not spin while they wait."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    return os.environ | offline | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def prepared(work: Work) -> Iterator[Work]:
    """The work with a folder from which all sides load."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "models.py"), work.json(), folder]
        subprocess.run(command, check=True, env=environment(1))
        yield work.having(folder=folder)


def alternate(work: Work, sides: Sequence[str], *, warmup: int, blocks: int, threads: int) -> Iterator[Row]:
    """Turns of all sides, one step each, block by block; whoever begins changes from block to block.

    Args:
        work: what all do.
        sides: names out of `SCRIPTS`.
        warmup: turns of each side that are not reported.
        blocks: turns of each side that are.
        threads: of torch in each process.
    """
    work = work.having(steps=warmup + blocks)
    with ExitStack() as stack:
        workers = []
        for side in sides:
            workers.append(Worker(side, work, threads))
            stack.callback(workers[-1].close)
        for block in range(-warmup, blocks):
            first = block % len(workers)
            for worker in workers[first:] + workers[:first]:
                row = {"block": block, **worker.turn()}
                print(f"{worker.side}, turn {block}: {row['wall']:.2f} s", file=sys.stderr, flush=True)
                if block >= 0:
                    yield row
