"""A reward that fails: one error on every process, and what it was asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_rlhf.rewards.reward import Reward, Scores, checked_scores
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.types import Rollout, Row

T = TypeVar("T")
FOLDER = Path("failed-rewards")
"""Below the working directory: the prompts and responses of rollouts that could not be scored."""


class RewardError(ValueError):
    """The reward raised, took too long, or returned something else than a finite number for each response."""


def scored_or_told(
    reward: Reward, rollout: Rollout, rows: Sequence[Row], *, agreed: Callable[[bool], bool], iteration: int
) -> Scores:
    """The reward's scores, checked, once it succeeded on every process.

    Args:
        reward: called once.
        rollout: B responses.
        rows: the records of their prompts.
        agreed: whether something is true on every process.
        iteration: which rollout it is, for the error and the file in `FOLDER`.

    Raises:
        RewardError: it failed here or on another process.
    """

    def score() -> Scores:
        total, parts, *_ = reward.scored(rollout, rows)
        name, trained_in = type(reward).__name__, rollout.logprobs.dtype
        return Scores(checked_scores(total, count=len(rollout), source=name, dtype=trained_in), parts)

    scores, problem = _attempt(score)
    if agreed(problem is None):
        return scores
    if problem is None:
        raise RewardError(f"rollout {iteration}: the reward failed on another process, which says more")
    path = FOLDER / f"rollout-{iteration}.process-{os.getpid()}.jsonl"
    kept = _written(reward, rollout, rows, path)
    raise RewardError(
        f"rollout {iteration}: the reward failed with {type(problem).__name__}: {problem}. {kept}; nothing was "
        "learned from them, and the last checkpoint is whole: mend the reward and resume"
    ) from problem


def _written(reward: Reward, rollout: Rollout, rows: Sequence[Row], path: Path) -> str:
    """Where the prompts and responses are."""
    tokens = rollout.tokens[:, rollout.prompt_width :].tolist()
    responses: list[Any] = [row[:length] for row, length in zip(tokens, rollout.lengths.tolist(), strict=True)]
    if reward.tokenizer is not None:
        responses = texts_of(responses, reward.tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair
            for row, response in zip(rows, responses, strict=True):
                file.write(json.dumps(dict(row) | {"response": response}, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        return f"Its prompts and responses could not be written ({error})"
    return f"Its prompts and responses are in {path}"


def on_all(call: Callable[[], T], *, agreed: Callable[[bool], bool], what: str) -> T:
    """What `call` returns, once it succeeded on every process: or else those that wait for this one would hang.

    Args:
        call: runs no collective.
        agreed: whether something is true on every process.
        what: failed, for the error.

    Raises:
        ValueError: it failed here or on another process.
    """
    result, problem = _attempt(call)
    if agreed(problem is None):
        return result
    if problem is None:
        raise ValueError(f"{what} failed on another process, which says more")
    raise ValueError(f"{what} failed with {type(problem).__name__}: {problem}") from problem


def _attempt(call: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
    """The result of a call, or the exception it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error
