"""Progress of a rollout while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative


class Progress(NamedTuple):
    """State of the rollout of one process.

    Attributes:
        done: responses that are complete.
        total: responses of the rollout.
        tokens: response tokens so far.
        seconds: since the first of them was waited for.
    """

    done: int
    total: int
    tokens: int
    seconds: float


class Watch:
    """Progress tracker of the rollouts that an engine draws.

    Counting stays on the device, which is synchronized only for a report.

    Args:
        tell: called now and then, and once at the end of each rollout.
        every: least seconds between two calls.

    Raises:
        ValueError: `every` is negative.
    """

    def __init__(self, tell: Callable[[Progress], None], *, every: float) -> None:
        check_not_negative(every=every)
        self.tell, self.every = tell, every

    def begin(self, total: int, device: torch.device) -> None:
        """Start a rollout of `total` responses."""
        self._total, self._tokens = total, 0
        self._done = torch.zeros((), dtype=torch.long, device=device)
        self._start = self._told = perf_counter()

    def add(self, goes_on: Tensor) -> None:
        """Count a token of each of some responses and the responses that ended; `goes_on` is (b,), bool."""
        self._tokens += len(goes_on)
        self._done += (~goes_on).sum()
        if perf_counter() - self._told >= self.every:
            self._tell()

    def count(self, responses: int, tokens: int) -> None:
        """Count complete responses and their tokens."""
        self._tokens += tokens
        self._done += responses
        if perf_counter() - self._told >= self.every:
            self._tell()

    def end(self) -> None:
        """Mark the rollout as complete."""
        self._tell()

    def _tell(self) -> None:
        self._told = perf_counter()
        self.tell(Progress(int(self._done), self._total, self._tokens, self._told - self._start))
