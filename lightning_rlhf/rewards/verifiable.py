"""Rewards that grade an answer by a library's rules: mathematics and Reasoning Gym's tasks."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.rewards.grader import Grader
from lightning_rlhf.rewards.patterns import check_column, compiled, last_group
from lightning_rlhf.rewards.reward import Scores, TextReward
from lightning_rlhf.types import Rollout, Row


class GradedReward(TextReward):
    """Base class of rewards that a `Grader` gives; an answer on which it fails or is late scores 0.

    The share of those among the graded ones is logged as the part `failed`.
    """

    grader: Grader
    column: str

    @abstractmethod
    def request(self, response: str, right: Any) -> dict[str, Any] | None:
        """Return what the grader is asked.

        Args:
            response: text.
            right: cell of the row's `column`, not None.

        Returns:
            arguments; None where the response is not the reward's task, empty where it holds no answer.
        """

    def identity(self) -> dict[str, Any]:
        """Describe what decides the scores."""
        return {name: value for name, value in super().identity().items() if name != "grader"}

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> list[float | None]:
        """Return the score of each response, None where the row lacks the column."""
        right = columns.get(self.column, [None] * len(responses))
        return [score for score, _ in self._graded(responses, right)]

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores, (B,), float32; NaN where the response is not its task."""
        return self.scored(rollout, rows).total

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the scores; the part `failed` is 1 where the grader failed."""
        graded = self._graded(self.responses(rollout), [row.get(self.column) for row in rows])
        table = [(torch.nan, torch.nan) if score is None else (score, float(failed)) for score, failed in graded]
        total, failed = torch.tensor(table, device=rollout.tokens.device).unbind(1)
        return Scores(total, {"failed": failed}, answered=~total.isnan())

    def _graded(self, responses: list[str], right: list[Any]) -> list[tuple[float | None, bool]]:
        """Score of each response with True where the grader failed."""
        return [self._grade(response, answer) for response, answer in zip(responses, right, strict=True)]

    def _grade(self, response: str, right: Any) -> tuple[float | None, bool]:
        request = None if right is None else self.request(response, right)
        if not request:
            return (None if request is None else 0.0), False
        score = self.grader(**request)
        return score or 0.0, score is None


class MathAnswer(GradedReward):
    r"""Score 1 for a response whose answer equals the row's by math-verify, else 0.

    The answer is the last `\boxed{}`, or else the last LaTeX or plain expression; the row's is LaTeX or a number, with
    or without `$`, and where it has `####` (GSM8K) what follows. A row without one is not its task (None).

    Args:
        column: that holds the right answer.
        seconds: most wall time for one response; 0 is its score then.

    Raises:
        ImportError: `math-verify` is not installed.
        ValueError: `seconds` is not positive, or the column is the prompt's.
    """

    def __init__(self, column: str = "answer", seconds: float = 5.0) -> None:
        check_column(column)
        self.column, self.seconds, self.grader = column, seconds, Grader("math_verify", seconds)

    def request(self, response: str, right: Any) -> dict[str, Any] | None:
        """Return the right answer and the response; None where the answer is empty."""
        number = isinstance(right, int | float)
        gold = (format(Decimal(str(right)), "f") if number else str(right)).rpartition("####")[2].strip()
        return {"gold": gold, "response": response} if gold else None


class ReasoningGym(GradedReward):
    r"""Score of a response by its Reasoning Gym task's own `score_answer`, for rows of `ReasoningGymRows`.

    Some tasks evaluate an answer as an expression of sympy, which runs it as Python: keep those to policies you trust.

    Args:
        task: score this task alone and leave rows of others (None); None scores every task.
        extract: which part of a response is the answer: `whole`, `last_number`, `answer_tag` for `<answer>…</answer>`,
            or a regular expression whose last match has it in the first group. No such part scores 0.
        seconds: most wall time for one response; 0 is its score then.

    Raises:
        ImportError: `reasoning-gym` is not installed.
        ValueError: `seconds` is not positive, or `extract` is no regular expression with a group.
    """

    column = "reasoning_gym"
    """Column of the rows that says task, settings and entry, as JSON."""

    def __init__(self, task: str | None = None, extract: str = "whole", seconds: float = 5.0) -> None:
        self.task, self.extract, self.seconds = task, extract, seconds
        self.grader = Grader("reasoning_gym", seconds)
        self._regex = answer_pattern(extract)

    def request(self, response: str, right: Any) -> dict[str, Any] | None:
        """Return the answer in the response with the row's entry; None where the row is of another task."""
        row = json.loads(right)
        if self.task is not None and row["task"] != self.task:
            return None
        answer = last_group(self._regex, response)
        return {} if answer is None else row | {"answer": answer.strip()}


EXTRACTS = {
    "whole": r"(?s)\A(.*)\Z",
    "last_number": r"([+-]?(?:\d[\d,]*\d|\d)(?:\.\d+)?)",
    "answer_tag": r"(?s)<answer>(.*?)</answer>",
}
"""Regular expression by the name of a part of a response."""


def answer_pattern(extract: str) -> re.Pattern[str]:
    """Return the regular expression of a part of a response, by name or as given.

    Raises:
        ValueError: it is no regular expression with a group.
    """
    return compiled(EXTRACTS.get(extract, extract), needs_group=True)
