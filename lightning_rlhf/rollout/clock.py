"""Seconds of each phase of a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Adds up wall seconds by phase, from one `lap` to the next.

    On a GPU it waits for the device at both ends of a phase: phases are few and long, and without waiting the time of
    one would be charged to the next.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `name`."""
        start = _now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last call, which begin anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def cost(clock: Clock, *, seconds: float, tokens: float) -> dict[str, float]:
    """What a step took: `time/…` in seconds by phase, of this process, `throughput/…` of all, `memory/peak_gib`.

    Args:
        clock: of the phases.
        seconds: of the whole step.
        tokens: response tokens of all processes.
    """
    phases = {f"time/{name}": spent for name, spent in clock.lap().items()}
    total = {"time/step": seconds, "throughput/tokens_per_second": tokens / seconds}
    return phases | total | {"memory/peak_gib": peak_memory()}


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def peak_memory() -> float:
    """The most memory this process has held so far, GiB: of its GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
