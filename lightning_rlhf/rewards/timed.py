"""Reward with a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.rewards.reward import Reward, Scores, as_reward
from lightning_rlhf.types import Rollout, Row


class TimedReward(Reward):
    """Wrapper of a reward that raises an error after a time limit.

    It uses an alarm signal in the main thread, so that autocast and gradient modes are those of the caller. The signal
    repeats each second, with an exception that `except Exception` does not catch, until the reward ends; a call into C
    that never returns is not ended. Not on Windows.

    Args:
        reward: what scores.
        seconds: most wall time for one rollout of one process.
    """

    def __init__(self, reward: Reward | Callable[..., Any], seconds: float = 600.0) -> None:
        check_positive(seconds=seconds)
        if not hasattr(signal, "setitimer"):
            raise ValueError("TimedReward needs alarm signals, which this system has not: use the reward without it")
        self.reward, self.seconds = as_reward(reward), seconds

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Prepare the wrapped reward."""
        super().prepare(tokenizer)
        self.reward.prepare(tokenizer)

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if the wrapped reward needs a column that the data lack."""
        self.reward.check_columns(names)

    def networks(self) -> list[nn.Module]:
        """List the networks of the wrapped reward."""
        return self.reward.networks()

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores of the wrapped reward."""
        return self.scored(rollout, rows).total

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the scores of the wrapped reward with their parts.

        Raises:
            TimeoutError: it took too long.
        """
        with _alarm(self.seconds, f"no answer within {self.seconds:g} s; raise `seconds`, or see what it waits for"):
            return self.reward.scored(rollout, rows)


AGAIN = 1.0
"""Seconds between two signals."""


class _Ring(BaseException):
    """Exception raised inside a reward on timeout; no `except Exception` loop of the reward catches it."""


@contextmanager
def _alarm(seconds: float, message: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("TimedReward works in the main thread only: use the reward without it")

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Ring

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _Ring:
        signal.setitimer(signal.ITIMER_REAL, 0.0)  # for it may have rung before the line above
        raise TimeoutError(message) from None
    finally:
        signal.signal(signal.SIGALRM, before)
