"""Environment that asks again when the answer to a Reasoning Gym question is wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lightning_rlhf.core.checks import check_count
from lightning_rlhf.environments.environment import Answer, Done, Environment, ToolCall
from lightning_rlhf.rewards.verifiable import ReasoningGym
from lightning_rlhf.types import Row

WRONG = "That is not right. Try again."
_GRADERS: dict[tuple[str, float], ReasoningGym] = {}
_LOCK = threading.Lock()


class ReasoningGymEnvironment(Environment):
    """Environment of a Reasoning Gym question: each turn is an answer, and a wrong one is told until none is left.

    For rows of `ReasoningGymRows`. An answer is right if its task's `score_answer` gives at least 1; the reward is the
    score of the last answer. All episodes of a process share one grader, the process of the reward `ReasoningGym`.

    Args:
        attempts: most answers.
        extract: which part of a turn is the answer, as of the reward `ReasoningGym`.
        seconds: most wall time for one answer; 0 is its score then.

    Raises:
        ImportError: `reasoning-gym` is not installed.
        ValueError: a number is not positive, or `extract` is no regular expression with a group.
    """

    def __init__(self, attempts: int = 2, extract: str = "whole", seconds: float = 5.0) -> None:
        check_count(attempts=attempts)
        self.attempts, self.answers = attempts, 0
        self._reward = _shared(extract, seconds)
        self._graded_by = ""

    def reset(self, row: Row) -> None:
        """Take the question of a row; nothing follows the prompt.

        Raises:
            ValueError: the row is none of `ReasoningGymRows`.
        """
        column = ReasoningGym.column
        if row.get(column) is None:
            raise ValueError(f"a row has no column {column!r}, only {sorted(row)}: make the data by ReasoningGymRows")
        self._graded_by, self.answers = row[column], 0

    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Grade an answer: the end with its score if it is right or the last, else that it is wrong."""
        (score,) = self._reward.score([None], [text], **{ReasoningGym.column: [self._graded_by]})
        self.answers += 1
        is_last = self.answers >= self.attempts
        return Done(score or 0.0) if is_last or (score or 0.0) >= 1 else WRONG


def _shared(extract: str, seconds: float) -> ReasoningGym:
    """Return the reward of these arguments, one for all episodes: it holds a process."""
    with _LOCK:
        if (extract, seconds) not in _GRADERS:
            _GRADERS[extract, seconds] = ReasoningGym(extract=extract, seconds=seconds)
        return _GRADERS[extract, seconds]
