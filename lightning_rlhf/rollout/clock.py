"""Wall-clock seconds of each phase of a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Timer that adds up wall-clock seconds by phase, from one `lap` to the next.

    On a GPU it waits for the device at both ends of a phase: phases are few and long, and without waiting the time of
    one would be charged to the next.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context that adds the time inside to phase `name`."""
        start = _now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start

    def lap(self) -> dict[str, float]:
        """Return the seconds by phase since the last call and reset them."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def cost(clock: Clock, *, seconds: float, tokens: float) -> dict[str, float]:
    """Return a step's time by phase (`time/…`, s), throughput over all processes and peak memory (GiB).

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
    """Return the peak memory of this process in GiB: of its GPU if it uses one, otherwise resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
