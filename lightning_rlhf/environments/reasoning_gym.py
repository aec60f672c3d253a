"""Environment of Reasoning Gym's tasks, in which a wrong answer may be corrected."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lightning_rlhf.environments.environment import Answer, Done, Environment, ToolCall
from lightning_rlhf.rewards import ReasoningGym
from lightning_rlhf.types import Row

WRONG = "That is not right. Try again."


@cache
def _grader(extract: str, seconds: float) -> ReasoningGym:
    """Return the one reward, with its process, that all episodes ask."""
    return ReasoningGym(extract=extract, seconds=seconds)


class ReasoningGymEnvironment(Environment):
    """Environment that grades an answer to a row of `ReasoningGymRows`, and asks again after a wrong one.

    The reward of the end is the task's own score of the last answer, 0 to 1.

    Args:
        attempts: most answers, ≥ 1.
        extract: which part of a turn is the answer, as of the reward `ReasoningGym`.
        seconds: most wall time for grading; 0 is the score then.

    Raises:
        ImportError: `reasoning-gym` is not installed.
        ValueError: `attempts` is below 1, `seconds` is not positive, or `extract` is no pattern with a group.
    """

    def __init__(self, attempts: int = 2, extract: str = "whole", seconds: float = 5.0) -> None:
        if attempts < 1:
            raise ValueError(f"`attempts` must be at least 1: got {attempts}")
        self.reward = _grader(extract, seconds)
        self.attempts = attempts

    def reset(self, row: Row) -> None:
        """Take the entry of the row.

        Raises:
            ValueError: the row has none.
        """
        if self.reward.column not in row:
            raise ValueError(
                f"the row has no column `{self.reward.column}`: train on ReasoningGymRows, as in "
                "--data.train='{task: chain_sum, part: train}'"
            )
        self.entry, self.left = row[self.reward.column], self.attempts

    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Grade an answer; a wrong one is told while attempts are left."""
        (score,) = self.reward.score([None], [text], reasoning_gym=[self.entry])
        self.left -= 1
        return WRONG if (score or 0.0) < 1 and self.left else Done(score or 0.0)
